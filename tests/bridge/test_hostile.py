"""Files of an attacker, through the command: one line and exit code 2, and nothing raw on the terminal."""

import json
import os
import random
import re
import signal
import struct
import sys

import numpy as np
import pytest
import torch

from bridge import Case, cli, parity
from bridge._census.record import CensusRecord, CensusSettings, append_record, read_records
from bridge.console import printable
from bridge.files import read_npy
from bridge.report.bundle import load_bundle, save_bundle
from bridge.weights import load_weights, write_safetensors
from bridge.weights.manifest import WeightsManifest

#: What no terminal may be sent: control characters but newline, and what turns the direction of text.
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: A name that would clear the screen, ring, set the title, hide what follows, and close markup.
EVIL = "a\x1b[2J\x07\x1b]0;t\x07\x9b31m\u202eb[/][link=x]"


@pytest.fixture
def jaxdw(monkeypatch, capfd):
    """The command, run here: its exit code, standard output and error."""

    def run(*arguments, seconds=60):
        monkeypatch.setattr(sys, "argv", ["jaxdw", *map(str, arguments)])
        signal.alarm(seconds)  # something that hangs ends the tests
        with pytest.raises(SystemExit) as ended:
            cli.run()
        signal.alarm(0)
        out, error = capfd.readouterr()
        assert not RAW.search(out) and not RAW.search(error) and "a bug in jaxdw" not in error
        return ended.value.code, out, error

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((1, 3, 3, 2), np.float32), rng.standard_normal((2, 2, 1, 2), np.float32))
    save_bundle(parity(case, ["numpy.exact", "torch.conv2d"], explain=False), folder)
    return folder


def header(entries, data=b""):
    encoded = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def index(**shards):
    return json.dumps({"weight_map": shards}).encode()


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

WEIGHTS = {
    "itself.index.json": (index(a="itself.index.json"), "names indexes as its shards"),
    "deep.index.json": (b'{"weight_map":' + b"[" * 100_000, "recursion"),
    "nan.index.json": (b'{"weight_map": NaN}', "NaN is not a JSON number"),
    "twice.index.json": (b'{"weight_map": {}, "weight_map": {}}', "duplicate keys 'weight_map'"),
    "list.index.json": (b"[]", "is no index of shards"),
    "outside.index.json": (index(a="../b.safetensors"), "outside its own folder"),
    "deep.safetensors": (header(b'{"a":' + b"[" * 100_000), "cannot be"),
    "huge.safetensors": (header({"a": {**F32, "shape": [2**62, 2**62]}}), "claims"),
    "empty.safetensors": (header({"a": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}), "claims"),
    "overlap.safetensors": (header({"a": F32, "b": F32}, b"1234"), "overlap"),
    "utf8.safetensors": (header(b'{"\xff": 1}'), "codec"),
    "surrogate.safetensors": (header({"\ud800" + EVIL: F32}, b"1234"), "do not fit"),
    "names.safetensors": (header({EVIL: F32}, b"1234"), r"a\x1b[2J\x07"),
    "bytes.pt": (b"\x80\x02" + b"(" * 100_000, "is no whole PyTorch checkpoint"),
    "zip.pt": (b"PK\x03\x04" + b"\0" * 99, "is no whole PyTorch checkpoint"),
    "other.bin": (b"hello", "is neither a PyTorch checkpoint"),
    "nothing.pt": (b"", "is neither a PyTorch checkpoint"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_one_line(name, tmp_path, jaxdw):
    content, message = WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    code, _, error = jaxdw("convert", tmp_path / name, tmp_path / "out.safetensors")
    assert code == 2 and message in error and list(tmp_path.iterdir()) == [tmp_path / name]


def test_whatever_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, jaxdw, bundle):
    pipe, out = tmp_path / "pipe.npy", tmp_path / "out.safetensors"
    os.mkfifo(pipe)
    weights = tmp_path / "pipe.safetensors"
    os.mkfifo(weights)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text("{}")
    os.mkfifo(hub / "model.safetensors")
    for arguments in (
        ("parity", "--input", pipe),
        ("parity", "--kernel", pipe),
        ("parity", "--input", "/dev/zero"),
        ("parity", "--input", tmp_path),
        ("convert", pipe, out),
        ("convert", weights, out),
        ("convert", hub, out),
        ("convert", "/dev/zero", out),
        ("model", "mobilenet_v2", "--weights", weights),
        ("model", "mobilenet_v2", "--image", pipe),
        ("bench", "--from-json", pipe),
        ("census", f"transformers:{hub}"),
        ("census", "timm:resnet18", "--out", pipe),
        ("replay", pipe),
    ):
        code, out_, error = jaxdw(*arguments)
        assert code == 2 and re.search("regular file|is not a bundle", error + out_.replace("\n", " ")), arguments


def copied(bundle, folder, **changes):
    """A copy of the bundle with other values in its manifest, and hashes that fit."""
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        at = manifest
        for key in parents:
            at = at[int(key) if isinstance(at, list) else key]
        at[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_hostile_bundle_is_one_line(tmp_path, jaxdw, bundle):
    piped = copied(bundle, tmp_path / "piped")
    (piped / "x.npy").unlink()
    os.mkfifo(piped / "x.npy")
    linked = copied(bundle, tmp_path / "linked")
    (linked / "x.npy").unlink()
    (linked / "x.npy").symlink_to(bundle / "x.npy")
    deep = copied(bundle, tmp_path / "deep")
    (deep / "manifest.json").write_text('{"a":' + "[" * 100_000)
    strides = copied(bundle, tmp_path / "strides", case__strides=[2**70, 1])
    far = {"case__padding": [[2**30, 2**30], [0, 0]], "case__strides": [2**31, 1], "case__padding_word": None}
    padded = copied(bundle, tmp_path / "padded", **far)
    for folder, message in (
        (piped, "expected a regular file"),
        (linked, "leads out of the bundle"),
        (deep, "recursion"),
        (strides, ""),
        (padded, "needs about"),
    ):
        code, _, error = jaxdw("replay", folder)
        assert code == 2 and message in error and error.count("\n") == 1


def test_foreign_text_reaches_neither_terminal_nor_page_raw(tmp_path, jaxdw, bundle):
    named = copied(bundle, tmp_path / "named", case__name=EVIL, environment__numpy=EVIL)
    code, out, _ = jaxdw("replay", named)
    assert code == 0 and r"a\x1b[2J" in out and "[link=x]" in out.replace("\n", "")
    array = copied(bundle, tmp_path / "array", outputs__0__implementation=EVIL, verdicts=[])
    code, out, _ = jaxdw("replay", array)
    assert code == 0 and r"\x1b[2J" in out.replace("\n", "") and "\x1b[2J" not in out
    unknown = copied(bundle, tmp_path / "unknown", outputs__0__implementation=f"torch.{EVIL}", verdicts=[])
    code, _, error = jaxdw("replay", unknown)
    assert code == 2 and r"\x1b" in error
    (tmp_path / EVIL.replace("/", "")).mkdir()
    folder = tmp_path / EVIL.replace("/", "")
    np.save(folder / "x.npy", np.ones((1, 4, 4, 2), np.float32))
    page = tmp_path / "page.html"
    options = ("--no-explain", "--implementations", "torch.conv2d,jax.taps", "--html", page)
    assert jaxdw("parity", "--input", folder / "x.npy", *options)[0] == 0
    assert not RAW.search(page.read_text()) and r"\x1b" in page.read_text()
    for arguments in (
        ("parity", EVIL),
        ("parity", f"--{EVIL}"),
        ("parity", "--implementations", f"{EVIL},jax.taps"),
        ("parity", "--padding", EVIL),
        ("parity", "--json", folder),
        ("reveal", EVIL),
        ("invariance", EVIL),
        ("audit", EVIL),
        ("census", f"timm:{EVIL}"),
        ("census", f"{EVIL}:b"),
        ("model", EVIL),
        ("bench", "--suite", EVIL),
        ("bench", "--from-json", folder / EVIL),
        ("convert", folder / EVIL, folder / "out.safetensors"),
        (EVIL,),
    ):
        code, _, error = jaxdw(*arguments)
        told = [line for line in error.splitlines() if "torchvision" not in line]  # which may be of another build
        assert code == 2 and len(told) <= 1, (arguments, error)


@pytest.mark.parametrize("held", [b'{"precious":1}', b"\x93NUMPY\x01\x00", b'{"schema": "jaxdw.bundle/2"}'])
def test_no_command_overwrites_a_foreign_file(held, tmp_path, jaxdw):
    path = tmp_path / "r.json"
    path.write_bytes(held)
    for command in (
        ("parity", "--json"),
        ("parity", "--input", path, "--html"),
        ("reveal", "--json"),
        ("model", "mobilenet_v2", "--html"),
        ("census", "timm:resnet18", "--out"),
        ("census", "timm:resnet18", "--html"),
        ("bench", "--svg"),
        ("bench", "--json"),
        ("parity", "--bundle"),
        ("convert", path),
    ):
        code, _, error = jaxdw(*command, path)
        assert code == 2 and re.search("exists|is a file", error) and path.read_bytes() == held
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "precious").write_bytes(held)
    write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(1, np.float32)})
    for to in ("orbax", "flax"):
        code, _, error = jaxdw("convert", tmp_path / "a.safetensors", folder, "--to", to, "--force")
        assert code == 2 and "is a folder and no Orbax checkpoint" in error and (folder / "precious").exists()


def test_reports_of_the_same_kind_are_overwritten(tmp_path, jaxdw):
    path, page = tmp_path / "r.json", tmp_path / "r.html"
    command = ("parity", "--no-explain", "--implementations", "torch.conv2d,jax.taps", "--json", path, "--html", page)
    assert [jaxdw(*command)[0] for _ in range(2)] == [0, 0]
    assert jaxdw("reveal", "jax.taps", "--json", path)[0] == 2


def test_windows_of_many_taps_are_not_revealed_unless_it_is_asked_for(jaxdw):
    wide = ("--shape", "1x16x16x1", "--kernel-size", "12x12", "--padding", "VALID")
    for command in (("reveal", "torch.conv2d", *wide), ("parity", "--explain", *wide)):
        code, _, error = jaxdw(*command)
        assert code == 2 and "windows of 144 taps" in error and "`--max-taps 144`" in error
    two = ("--implementations", "torch.conv2d,numpy.exact")
    code, out, error = jaxdw("parity", *wide, *two)
    assert code == 0 and "EXPLAINED" not in out and "no accumulation order is revealed" in error


def test_text_is_made_printable_and_nothing_else():
    plain = "tab\tnewline\n \u00e4 \u4e2d \u0645 \U0001f600 \u00a0"
    assert printable(plain) == plain
    assert printable("\x00\r\x1b\x7f\x85\x9b\u200b\u202e\u2066\u2028\ufeff\ud800\U000e0041") == (
        r"\x00\r\x1b\x7f\x85\x9b\u200b\u202e\u2066\u2028\ufeff\ud800\U000e0041"
    )


def originals(folder, bundle):
    """Sound files, and what reads each."""
    rng = np.random.default_rng(0)
    tensors = {f"layer{i}.weight": rng.standard_normal((2, 1, 2, 2), np.float32) for i in range(3)}
    torch_tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    np.save(folder / "a.npy", tensors["layer0.weight"])
    write_safetensors(folder / "a.safetensors", tensors)
    (folder / "b.index.json").write_bytes(index(**dict.fromkeys(tensors, "a.safetensors")))
    torch.save({"state_dict": torch_tensors}, folder / "a.pt")
    torch.save(torch_tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "a.manifest.json").write_text(WeightsManifest(rules="a", moved=[], kept=[]).to_json())
    settings = CensusSettings(
        size=None, batch=1, seed=0, pretrained=False, weights=None, implementations=("a", "b"), explain=False
    )
    empty = {"layers": [], "idle": [], "passed_over": [], "error": "", "environment": {}}
    append_record(folder / "a.jsonl", CensusRecord(model="m", settings=settings, seconds=1.0, verdict=None, **empty))
    return {
        "a.npy": read_npy,
        "a.safetensors": load_weights,
        "b.index.json": load_weights,
        "a.pt": load_weights,
        "old.pt": load_weights,
        "a.manifest.json": WeightsManifest.read,
        "a.jsonl": read_records,
        **dict.fromkeys((path.name for path in bundle.iterdir()), lambda path: load_bundle(path.parent)),
    }


def mutated(content, draw):
    """The content with a few bytes flipped, cut, doubled, or its words replaced."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.choice((1, 8, 10**9))]
        elif kind == 2:
            content[at:at] = content[max(0, at - draw.randrange(64)) : at]
        elif kind == 3:
            content[at:at] = draw.choice(
                (b"[" * 5000, b"\xff", b"\0" * 9, b"9" * 20, b'"', b"-", b"NaN", b"}", b"\x1b")
            )
        else:
            words = list(re.finditer(rb'\d+|"[^"]*"|null|true', bytes(content)))
            if words:
                word = draw.choice(words)
                content[word.start() : word.end()] = draw.choice(
                    (
                        b"-1",
                        b"0",
                        b"1e999",
                        b"18446744073709551616",
                        b"null",
                        b'""',
                        b"[]",
                        b"{}",
                        b"NaN",
                        b"0.5",
                        b'"a"',
                    )
                )
    return bytes(content)


def test_a_damaged_file_is_read_or_refused(tmp_path, bundle, seed, full):
    draw = random.Random(seed)
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    readers = originals(folder, bundle)
    contents = {name: (folder / name).read_bytes() for name in readers}
    for number in range(20_000 if full else 400):
        name = draw.choice(list(readers))
        (folder / name).write_bytes(mutated(contents[name], draw))
        signal.alarm(30)
        try:
            readers[name](folder / name)
        except (ValueError, TypeError, OSError) as error:
            assert str(error), (number, name)
        except BaseException as error:
            raise AssertionError(f"mutation {number}, of {name}: {(folder / name).read_bytes()[:2000]!r}") from error
        finally:
            signal.alarm(0)
        (folder / name).write_bytes(contents[name])
