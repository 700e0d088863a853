"""Bundles: the same case and bits back, what changed is said, and a damaged bundle is refused in one line."""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

import bridge
from bridge.numerics import same_bits
from bridge.report import bundle as bundles
from bridge.report.bundle import load_bundle, replay_bundle, save_bundle
from tests.bridge.report import planted

NAMES = ["torch.conv2d", "jax.taps", "numpy.exact"]


def edit(folder, change):
    """Change the manifest as a program would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.fixture
def saved(tmp_path, seed):
    folder = tmp_path / "bundle"
    save_bundle(bridge.parity(planted.case(seed), NAMES), folder)
    return folder


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "SAME", "strides": 2},
        {"padding": ((0, 1), (-1, 2)), "kernel_dilation": (1, 2)},
        {"padding": "CIRCULAR"},
        {"padding": "REFLECT"},
        {"padding": 1, "input_dilation": 2},
        {"shape": (3, 7, 2), "kernel_size": (3,), "padding": "CAUSAL"},
        {"dtype": ml_dtypes.bfloat16},
        {"dtype": np.float16},
        {"dtype": np.float64},
    ],
    ids=str,
)
def test_the_case_and_every_bit_come_back(options, tmp_path, seed, full):
    for biased in (False, True) if full else [bool(np.random.default_rng(seed).integers(2))]:
        folder = tmp_path / str(biased)
        folder.mkdir()
        assert_that_all_comes_back(options, biased, folder, seed)


def assert_that_all_comes_back(options, biased, folder, seed):
    diagnosis = planted.rounding(seed, **options)
    if biased:
        bias = np.random.default_rng(seed).standard_normal(diagnosis.case.geometry.features)
        asked = diagnosis.case.replace(bias=bias.astype(diagnosis.case.dtype))
        diagnosis = planted.diagnosis_of(asked, {"other": diagnosis.outputs["up"]})
    save_bundle(diagnosis, folder / "bundle")
    bundle = load_bundle(folder / "bundle")
    case, again = diagnosis.case, bundle.case
    assert (again.geometry, again.name) == (case.geometry, case.name)
    assert not isinstance(case.padding, str) or again.padding == case.padding
    for name in ("x", "kernel", "bias"):
        a, b = getattr(case, name), getattr(again, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and same_bits(a, b).all())
    assert list(bundle.outputs) == diagnosis.names
    assert all(same_bits(bundle.outputs[name], y).all() for name, y in diagnosis.outputs.items())
    assert list(folder.iterdir()) == [folder / "bundle"]


def test_a_replay_on_the_same_machine_changes_nothing(saved):
    diagnosis, changes = replay_bundle(saved)
    assert changes == [] and diagnosis.names == NAMES


def test_a_replay_says_which_environment_output_and_verdict_changed(saved):
    y = np.load(saved / "output-1.npy")
    y[0, 0, 0, 0] += np.float32(1)
    np.save(saved / "output-1.npy", y)
    digest = hashlib.sha256((saved / "output-1.npy").read_bytes()).hexdigest()

    def change(manifest):
        manifest["outputs"][1]["sha256"] = digest
        manifest["environment"] |= {"torch": "1.0", "gone": "then"}
        del manifest["environment"]["numpy"]
        manifest["verdict"] = manifest["verdicts"][0]["verdict"] = "BUG"

    edit(saved, change)
    diagnosis, changes = replay_bundle(saved)
    kinds = [line.split(":")[0] for line in changes]
    assert kinds == ["environment", "environment", "environment", "output", "verdict", "verdict"]
    assert changes[0].startswith("environment: torch was 1.0, is ")
    assert changes[1] == "environment: gone was then, is absent"
    assert changes[2].startswith("environment: numpy was absent, is ")
    assert changes[3].startswith(f"output: jax.taps has different bits in 1 of {y.size} elements")
    assert changes[4] == f"verdict: of the whole diagnosis, was BUG, is {diagnosis.verdict}"
    assert changes[5].startswith("verdict: of torch.conv2d and jax.taps, was BUG, is ")


def test_an_implementation_that_does_not_run_here_is_named_and_the_rest_is_repeated(saved):
    edit(saved, lambda manifest: manifest["outputs"][1].update(implementation="torch.of_another_machine"))
    diagnosis, changes = replay_bundle(saved)
    assert diagnosis.names == ["torch.conv2d", "numpy.exact"]
    assert any(line.startswith("not run here: torch.of_another_machine") for line in changes)


def test_a_function_that_a_bundle_names_is_not_imported_unasked(saved, monkeypatch):
    monkeypatch.setattr(
        bundles, "implementation", lambda name, _: pytest.fail(name) if ":" in name else bridge.implementation(name)
    )
    edit(saved, lambda manifest: manifest["outputs"][0].update(implementation="os:system"))
    _, changes = replay_bundle(saved)
    assert any(line.startswith("not run here: os:system") for line in changes)


def test_arrays_that_no_implementation_is_named_after_are_compared_as_they_were_saved(tmp_path, seed):
    saved = planted.scaled_tap(seed)
    save_bundle(saved, tmp_path / "bundle")
    diagnosis, changes = replay_bundle(tmp_path / "bundle")
    assert (diagnosis.verdict, changes) == (saved.verdict, [])
    assert diagnosis.names == saved.names and diagnosis.comparisons[0].place == saved.comparisons[0].place


def test_a_bundle_is_replaced_only_where_that_is_asked_for(tmp_path, seed):
    save_bundle(planted.rounding(seed), tmp_path / "bundle")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_bundle(planted.rounding(seed), tmp_path / "bundle")
    save_bundle(planted.scaled_tap(seed), tmp_path / "bundle", replace=True)
    assert list(load_bundle(tmp_path / "bundle").outputs)[:2] == ["right", "wrong"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"schema": "mine/1"}')
    (tmp_path / "bundle" / "notes.txt").touch()
    for foreign in ("mine", "bundle"):
        with pytest.raises(FileExistsError, match="is not empty"):
            save_bundle(planted.rounding(seed), tmp_path / foreign, replace=True)


def test_a_bundle_of_which_nothing_runs_here_is_refused(tmp_path, seed):
    diagnosis = planted.rounding(seed)
    gone = dict(zip(("torch.gone", "jax.gone", "numpy.gone"), diagnosis.outputs.values()))
    save_bundle(dataclasses.replace(diagnosis, outputs=gone), tmp_path / "bundle")
    with pytest.raises(ValueError, match="cannot be repeated: fewer than two implementations run here"):
        replay_bundle(tmp_path / "bundle")


def cut(folder):
    path = folder / "x.npy"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "output-2.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])


def rehashed(folder, file, array):
    np.save(folder / file, array)
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    edit(folder, lambda manifest: manifest["outputs"][0].update(sha256=digest))


DAMAGES = [
    (cut, "x.npy was cut or changed"),
    (flip, "output-2.npy was cut or changed"),
    (lambda f: (f / "kernel.npy").unlink(), "an incomplete bundle: kernel.npy is missing"),
    (cut_manifest, "manifest.json was cut or changed: "),
    (lambda f: (f / "manifest.json").unlink(), "is not a bundle: it has no manifest.json"),
    (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{"), "manifest.json was cut or changed: "),
    (lambda f: (f / "manifest.json").write_text("[]"), "has schema None, expected 'jaxdw.bundle/2'"),
    (lambda f: edit(f, lambda m: m.update(schema="jaxdw.bundle/3")), "newer than 'jaxdw.bundle/2'"),
    (lambda f: edit(f, lambda m: m.update(schema="jaxdw.parity/2")), "expected 'jaxdw.bundle/2'"),
    (lambda f: edit(f, lambda m: m.pop("case")), "malformed: `case`: Field required"),
    (lambda f: edit(f, lambda m: m["arrays"].pop("x")), "does not describe a valid case"),
    (lambda f: edit(f, lambda m: m["outputs"][0].update(file="../x.npy")), "malformed: `outputs.0.file`"),
    (lambda f: edit(f, lambda m: m["outputs"][0].update(shape=[1])), "output-0.npy holds float32"),
    (lambda f: edit(f, lambda m: m["case"].update(strides=[2, 2])), "has an output torch.conv2d of"),
    (lambda f: edit(f, lambda m: m["case"].update(strides=[0, 2])), "does not describe a valid case: `strides`"),
    (lambda f: edit(f, lambda m: m["case"].update(padding_word="VALID")), "but padding_word VALID gives"),
    (lambda f: rehashed(f, "output-0.npy", np.ones(3)), "output-0.npy holds float64"),
    (lambda f: rehashed(f, "output-0.npy", np.array(["a"])), "output-0.npy is not a valid array: it holds <U1"),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_bundle_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError) as caught:
        load_bundle(saved)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_holds_something_is_never_written_to(tmp_path, seed):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_bundle(planted.identical(seed), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_bundle(planted.identical(seed), tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_bundle(planted.identical(seed), tmp_path / "missing" / "bundle")


def test_an_empty_folder_may_be_filled(tmp_path, seed):
    (tmp_path / "bundle").mkdir()
    save_bundle(planted.identical(seed), tmp_path / "bundle")
    load_bundle(tmp_path / "bundle")


def test_an_interrupted_save_leaves_nothing(tmp_path, seed, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "environment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(planted.identical(seed), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
