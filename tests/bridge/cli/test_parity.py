"""`jaxdw parity`, as a user types it."""

import json
import os

import numpy as np
import pytest

from bridge.diagnosis import DEFAULT
from tests.bridge.cli.command import jaxdw


def test_without_arguments_it_answers_the_question():
    code, out, _ = jaxdw("parity")
    assert code == 0
    for words in (
        "The question's own case",
        "torch.unfold_matmul",
        "It is rounding, not a bug",
        "jaxdw.depthwise_conv",
    ):
        assert words in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_function_of_the_question_is_answered_on_one_screen():
    name = "tests.bridge.implementations.question:depthwise_conv2d_matmul"
    code, out, _ = jaxdw("parity", "--implementations", name)
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    words = " ".join(out.split())
    assert "Against torch.conv2d" in words and "(input, weight, padding=1): PyTorch tensors, channels first" in words
    assert "Verdict: " in words and "windowed_conv" in words and "times as long" not in words
    assert len(jaxdw("parity")[1].splitlines()) <= 40
    told = jaxdw("--verbose", "parity", "--implementations", name)[1]
    assert "The same bits: = yes, . no" in told and "The same bits" not in out


def test_json_holds_every_pair_and_is_valid(tmp_path):
    path = tmp_path / "report.json"
    code, _, _ = jaxdw("parity", "--json", path)
    report = json.loads(path.read_text())
    assert code == 0 and report["schema"].startswith("jaxdw.parity/")
    assert {"environment", "case", "verdict", "comparisons"} <= set(report)
    assert len(report["comparisons"]) == len(DEFAULT) * (len(DEFAULT) - 1) // 2
    fields = {
        "a",
        "b",
        "verdict",
        "elements",
        "different",
        "max_abs",
        "max_ulp",
        "max_bound_ratio",
        "explained",
        "cause",
    }
    assert all(fields | {"fix"} <= set(c) for c in report["comparisons"])
    assert list(tmp_path.iterdir()) == [path]


def test_every_option_reaches_the_case(tmp_path):
    path = tmp_path / "report.json"
    options = "--shape 1x9x8x4 --kernel-size 3x2 --strides 2,1 --padding 0:1,-1:2 --dilation 1,2 --multiplier 2 --bias"
    names = "torch.conv2d,jax.grouped[dtype=bfloat16,precision=high]"
    code, _, _ = jaxdw(
        "parity", *options.split(), "--dtype", "float64", "--seed", 3, "--implementations", names, "--json", path
    )
    case = json.loads(path.read_text())["case"]
    assert case["x"] == [1, 9, 8, 4] and case["kernel"] == [3, 2, 1, 8] and case["bias"] == [8]
    assert case["strides"] == [2, 1] and case["padding"] == [[0, 1], [-1, 2]] and case["kernel_dilation"] == [1, 2]
    assert case["dtype"] == "float64"
    assert [c["b"] for c in json.loads(path.read_text())["comparisons"]] == [
        "jax.grouped[dtype=bfloat16,precision=high]"
    ]
    assert code == 0  # bfloat16 is declared in the name, so its rounding is no surprise


def test_files_are_read(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.standard_normal((2, 6, 6, 3), np.float32))
    np.save(tmp_path / "w.npy", rng.standard_normal((3, 3, 1, 6), np.float32))
    code, out, _ = jaxdw("parity", "--input", tmp_path / "x.npy", "--kernel", tmp_path / "w.npy")
    assert code == 0 and "multiplier 2" in " ".join(out.split())


@pytest.mark.parametrize("text", ["1,6,7,2", "1x6x7x2", "1X6 x 7x2", "(1, 6, 7, 2)", "[1,6,7,2]"])
def test_sizes_are_written_as_people_write_them(text, tmp_path):
    names = ("--implementations", "torch.conv2d,jax.taps", "--json", tmp_path / "report.json")
    code, _, _ = jaxdw("parity", "--shape", text, "--kernel-size", "3,2", "--padding", "VALID", *names)
    case = json.loads((tmp_path / "report.json").read_text())["case"]
    assert code == 0 and case["x"] == [1, 6, 7, 2] and case["kernel"] == [3, 2, 1, 2]


def test_files_in_pytorchs_layout_are_recognised_and_taken(tmp_path):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 7, 4), np.float32), rng.standard_normal((3, 2, 1, 8), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", w)
    np.save(tmp_path / "x_first.npy", np.moveaxis(x, -1, 1))
    np.save(tmp_path / "w_first.npy", np.moveaxis(w, (-1, -2), (0, 1)))
    base = ["parity", "--implementations", "torch.conv2d,jax.taps"]

    def parity(x, w, *more):
        return jaxdw(*base, "--input", tmp_path / f"{x}.npy", "--kernel", tmp_path / f"{w}.npy", *more)

    code, out, _ = parity("x_first", "w_first", "--layout", "channels_first")
    assert code == 0 and "input 2x6x7x4, kernel 3x2" in out and out == parity("x", "w")[1]
    for x, w, more, message in (
        ("x_first", "w_first", (), "`--input` and `--kernel` fit as channels_first: pass --layout channels_first"),
        ("x", "w", ("--layout", "channels_first"), "fit as channels_last: pass --layout channels_last"),
        ("x", "w_first", (), "`--kernel` fits as channels_first: save np.moveaxis(w, (0, 1), (-1, -2)) instead"),
        ("x_first", "w", (), "`--input` fits as channels_first: save np.moveaxis(x, 1, -1) instead"),
    ):
        code, _, error = parity(x, w, *more)
        assert code == 2 and message in error
    np.save(tmp_path / "image.npy", rng.standard_normal((1, 3, 8, 8), np.float32))
    said = jaxdw(*base, "--input", tmp_path / "image.npy")[2]
    assert "read as 8 channels last. If it has PyTorch's layout, pass --layout channels_first" in said
    code, out, _ = jaxdw(*base, "--shape", "2,4,6,7", "--layout", "channels_first")
    assert code == 0 and "input 2x6x7x4" in out


def test_fail_on_tightens_the_exit_code():
    assert jaxdw("parity", "--fail-on", "explained")[0] == 1
    assert jaxdw("parity", "--fail-on", "rounding")[0] == 0
    names = "torch.conv2d,jax.taps"
    assert jaxdw("parity", "--implementations", names, "--fail-on", "ROUNDING")[0] == 0


def bad(tmp_path):
    objects, integers, archive = tmp_path / "objects.npy", tmp_path / "integers.npy", tmp_path / "archive.npz"
    np.save(objects, np.array([{}], object), allow_pickle=True)
    np.save(integers, np.zeros((1, 5, 5, 2), int))
    np.savez(archive, a=np.zeros(1))
    text = tmp_path / "text.npy"
    text.write_text("hello")
    return {
        "missing file": (["--input", tmp_path / "no.npy"], "expected an .npy file: it does not exist"),
        "objects": (["--input", objects], "expected an .npy file of numbers"),
        "integers": (["--input", integers], "with dtype int64, expected one of float32"),
        "archive": (["--input", archive], "expected one array, found an archive"),
        "no array": (["--input", text], "expected an .npy file of numbers"),
        "shape": (["--shape", "2x"], "`--shape` is '2x', expected sizes such as 2x5x5x3 or 2,5,5,3"),
        "padding": (["--padding", "1;2"], "`--padding` is '1;2', expected a word such as SAME"),
        "padding word": (["--padding", "FULL"], "`padding` is 'FULL', expected one of SAME"),
        "dtype": (["--dtype", "int8"], "`--dtype` is 'int8', expected one of float32"),
        "strides": (["--strides", "0"], "`strides` is 0, expected a positive int"),
        "implementation": (
            ["--implementations", "torch.conv2d,jax.winograd"],
            "`implementation` is 'jax.winograd', expected a function of your own as package.module:function, or one",
        ),
        "one implementation": (["--implementations", "torch.conv2d"], "expected at least two, each once"),
        "twice": (["--implementations", "jax.taps,jax.taps"], "expected at least two, each once"),
        "both": (["--shape", "1x5x5x2", "--input", integers], "both given, expected one of them"),
        "no folder": (["--json", tmp_path / "no" / "report.json"], "cannot be written: there is no folder"),
        "a folder": (["--json", tmp_path], "is a folder, expected a file"),
    }


@pytest.mark.parametrize("name", bad(__import__("pathlib").Path(__import__("tempfile").mkdtemp())))
def test_bad_arguments_are_one_line_and_exit_code_2(name, tmp_path):
    arguments, message = bad(tmp_path)[name]
    code, _, error = jaxdw("parity", *arguments)
    assert code == 2 and message in error and "\n" not in error.strip()


def test_a_users_own_function_is_compared_and_revealed(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch.nn.functional as F\n"
        "def conv(x, weight): return F.conv2d(x, weight, padding=1, groups=x.shape[1])\n"
        "def cropped(x, weight): return conv(x, weight)[:, :, 1:]\n"
        "def broken(x, weight): raise KeyError('planted')\n"
    )
    (tmp_path / "neither.py").write_text("def conv(x, kernel): return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = jaxdw("parity", "--implementations", "torch.conv2d,mine:conv")
    assert code == 0 and "IDENTICAL" in out
    assert jaxdw("reveal", "mine:conv")[0] == 0
    for name, message in {
        "mine:cropped": "mine:cropped returned shape (2, 3, 4, 5), expected shape (2, 3, 5, 5)",
        "mine:broken": "mine:broken raised KeyError",
        "mine:missing": "mine has no 'missing'",
        "nowhere:conv": "'nowhere' cannot be imported",
        "neither:conv": "whose code does not say which arrays it takes, and it takes none of these",
    }.items():
        code, _, error = jaxdw("parity", "--implementations", f"torch.conv2d,{name}")
        assert code == 2 and message in error


def test_rounded_inputs_are_precision_even_where_an_order_replays(tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text(
        "import jax.numpy as jnp\nimport jaxdw\n"
        "def inputs(x, kernel):\n"
        "    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)\n"
        "    return jaxdw.depthwise_conv(x, kernel, padding=1).astype(jnp.float32)\n"
        "def output(x, kernel):\n"
        "    return jaxdw.depthwise_conv(x, kernel, padding=1).astype(jnp.float16).astype(jnp.float32)\n"
        "def leaves(x, kernel): raise SystemExit(0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("inputs", "output"):
        code, out, _ = jaxdw("parity", "--implementations", f"torch.conv2d,narrow:{name}")
        assert code == 3 and "PRECISION" in out and "not a bug" not in out
    code, _, error = jaxdw("parity", "--implementations", "torch.conv2d,narrow:leaves")
    assert code == 2 and "narrow:leaves raised SystemExit" in error


def test_a_report_replaces_files_alone(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "real.json"
    os.mkfifo(pipe)
    target.touch()
    target.chmod(0o600)
    link.symlink_to(target)
    names = ("--implementations", "torch.conv2d,jax.taps")
    code, _, error = jaxdw("parity", *names, "--json", pipe)
    assert code == 2 and "is not a regular file" in error and pipe.is_fifo()
    assert jaxdw("parity", *names, "--json", link)[0] == 0
    assert link.is_symlink() and json.loads(target.read_text()) and target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--padding", "100000000"], "elements at most"),
        (["--shape", "99999999x9999x9999x99"], "elements at most"),
        (
            ["--implementations", "torch.conv2d,torch.conv2d[threads=999999]"],
            "expected a positive integer, at most 256",
        ),
    ],
)
def test_what_no_machine_can_hold_is_refused(arguments, message):
    code, _, error = jaxdw("parity", *arguments)
    assert code == 2 and message in error
