"""`jaxdw convert`: from file to file, whole or not at all."""

import functools
import json

import numpy as np
import orbax.checkpoint
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from typer.testing import CliRunner

from bridge import load_weights
from bridge.cli import app, run
from bridge.weights import WeightsManifest, checkpoint, convert_checkpoint, read_orbax, write_orbax
from bridge.weights.trees import empty_model
from tests.bridge.weights.test_safetensors import a_disk_with
from tests.references import reference

NAME = "torchvision.mobilenet_v3_small"


@pytest.fixture(scope="module")
def original(tmp_path_factory, request):
    """A training checkpoint of PyTorch, and the weights in it."""
    module = reference(NAME, width=0.5, seed=request.config.option.seed)
    path = tmp_path_factory.mktemp("original") / "v3.pth"
    torch.save({"state_dict": {f"module.{name}": t for name, t in module.state_dict().items()}, "epoch": 3}, path)
    return path, module


@pytest.fixture(autouse=True, scope="module")
def one_model_for_all():
    """A model without values takes half a second to trace, and nothing changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "empty_model", functools.cache(checkpoint.empty_model))
        yield


def jaxdw(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


@pytest.mark.parametrize("to, name", [("flax", "v3.safetensors"), ("orbax", "v3")])
def test_there_and_back_through_files_is_byte_exact(to, name, original, tmp_path):
    path, module = original
    there = jaxdw(path, tmp_path / name, "--to", to, "--width", "0.5")
    assert there.exit_code == 0, there.output
    words = " ".join(there.output.split())
    assert "210 tensors moved, 34 kept that only PyTorch has; none missing, none left over" in words
    back = jaxdw(tmp_path / name, tmp_path / "back.safetensors", "--to", "torch")
    assert back.exit_code == 0, back.output
    loaded = load_file(tmp_path / "back.safetensors")
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
    plain = convert_checkpoint(path, tmp_path / "plain.safetensors", to="torch")
    assert plain.manifest is None
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "back.safetensors").read_bytes()


def test_the_manifest_has_the_hashes_of_what_was_written(original, tmp_path):
    written = convert_checkpoint(original[0], tmp_path / "v3.safetensors", width=0.5)
    manifest = WeightsManifest.read(tmp_path / "v3.safetensors.manifest.json")
    assert manifest == written.manifest and manifest.rules == NAME
    assert manifest.changed(load_weights(tmp_path / "v3.safetensors")) == []
    assert json.loads(manifest.to_json())["schema"] == "jaxdw.weights/1"


def test_flax_restores_the_orbax_checkpoint_into_a_model(original, tmp_path):
    written = convert_checkpoint(original[0], tmp_path / "v3", to="orbax", width=0.5)
    model = empty_model("mobilenet_v3_small", "torchvision", num_classes=10, width=0.5)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        nnx.update(model, nnx.restore_int_paths(checkpointer.restore(tmp_path / "v3")))
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        assert np.array_equal(variable.get_value(), written.arrays[".".join(map(str, path))])


def test_an_orbax_checkpoint_of_a_state_is_read_too(tmp_path):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", nnx.state(layer))
    assert {name: leaf.shape for name, leaf in read_orbax(tmp_path / "a").items()} == {"kernel": (2, 3), "bias": (3,)}


def test_an_orbax_checkpoint_keeps_every_dtype(tmp_path):
    leaves = {f"a.{name}": np.arange(3).astype(name) for name in ("float64", "bfloat16", "float16", "float8_e4m3fn")}
    write_orbax(tmp_path / "a", leaves)
    back = read_orbax(tmp_path / "a")
    assert {name: (leaf.dtype, leaf.tobytes()) for name, leaf in back.items()} == {
        name: (leaf.dtype, leaf.tobytes()) for name, leaf in leaves.items()
    }


def test_what_orbax_cannot_save_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no arrays without elements: a"):
        write_orbax(tmp_path / "a", {"a": np.zeros((0, 3)), "b": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_orbax_checkpoint_is_refused(tmp_path):
    write_orbax(tmp_path / "a", {"a": np.zeros(3)})
    for part in (tmp_path / "a" / "d").iterdir():
        part.write_bytes(b"")
    with pytest.raises(ValueError, match="is no whole Orbax checkpoint"):
        read_orbax(tmp_path / "a")


@pytest.mark.parametrize("to", ["flax", "orbax"])
def test_a_full_disk_leaves_nothing(to, original, tmp_path):
    with a_disk_with(100_000), pytest.raises((OSError, ValueError)):
        convert_checkpoint(original[0], tmp_path / "v3", to=to, width=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["v3.safetensors", "v3.safetensors.manifest.json"])
def test_nothing_is_overwritten_without_force(taken, original, tmp_path):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists, expected a new name.*--force"):
        convert_checkpoint(original[0], tmp_path / "v3.safetensors", width=0.5)
    assert (tmp_path / taken).read_text() == "mine"
    convert_checkpoint(original[0], tmp_path / "v3.safetensors", width=0.5, force=True)
    assert len(load_weights(tmp_path / "v3.safetensors")) == 210


def test_a_checkpoint_of_another_kind_takes_the_place_of_the_old_and_its_manifest(original, tmp_path):
    convert_checkpoint(original[0], tmp_path / "v3", to="orbax", width=0.5)
    convert_checkpoint(original[0], tmp_path / "v3", to="orbax", width=0.5, force=True)
    convert_checkpoint(original[0], tmp_path / "v3.safetensors", width=0.5)
    convert_checkpoint(original[0], tmp_path / "v3.safetensors", to="torch", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v3", "v3.manifest.json", "v3.safetensors"]


def test_float64_weights_stay_float64(tmp_path):
    module = reference(NAME, width=0.5).double()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    written = convert_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors", width=0.5)
    assert {array.dtype for array in written.arrays.values()} == {np.dtype(np.float64)}


def test_what_the_user_got_wrong_is_told_without_a_traceback(original, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["jaxdw", "convert", str(original[0]), str(tmp_path / "a"), "--model", "mobilenet_v2"]
    )
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxdw: the weights do not fit (rules: ")
    assert f"(a) the wrong architecture: the names look like {NAME}" in error
    assert list(tmp_path.iterdir()) == []


def test_the_way_back_without_a_manifest_needs_a_model(original, tmp_path):
    convert_checkpoint(original[0], tmp_path / "a.safetensors", width=0.5)
    (tmp_path / "a.safetensors.manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest a\.safetensors\.manifest\.json beside it, expected `model`"):
        convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="torch")
    written = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="torch", model=NAME)
    assert len(written.arrays) == 244


class Small(nnx.Module):
    """A network that is none of jaxdw.models."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.scale = nnx.Param(np.ones(8, np.float32))
        self.head = nnx.Linear(8, 3, rngs=rngs)


def small():
    """Return the model without values."""
    return nnx.eval_shape(lambda: Small(nnx.Rngs(0)))


def small_pair():
    return None, small(), np.zeros(1)


def number():
    return 3


@pytest.mark.parametrize("factory", ["small", "small_pair"])
def test_the_model_of_a_function_takes_the_weights(factory, tmp_path, seed):
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (5, 8), "norm.weight": (8,), "scale": (8,), "head.weight": (3, 8), "head.bias": (3,)}
    state = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "small.pth")
    made = jaxdw(tmp_path / "small.pth", tmp_path / "small.safetensors", "--like", f"{__name__}:{factory}")
    assert made.exit_code == 0, made.output
    weights = load_weights(tmp_path / "small.safetensors")
    assert sorted(weights) == ["embed.embedding", "head.bias", "head.kernel", "norm.scale", "scale"]
    assert (weights["head.kernel"] == state["head.weight"].numpy().T).all()
    back = jaxdw(tmp_path / "small.safetensors", tmp_path / "back.safetensors", "--to", "torch")
    assert back.exit_code == 0, back.output
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(tmp_path / "back.safetensors").items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--like", "no_such_package:model"], "cannot be imported"),
        (["--like", "numpy"], "expected package.module:function"),
        (["--like", f"{__name__}:number"], "returned a int, expected a Flax model"),
        (["--like", f"{__name__}:small", "--width", "0.5"], "expected none with --like"),
        (["--like", f"{__name__}:small", "--to", "torch"], "expected PyTorch's weights"),
    ],
)
def test_an_unusable_function_is_refused(words, said, tmp_path):
    torch.save({"scale": torch.ones(8)}, tmp_path / "small.pth")
    result = jaxdw(tmp_path / "small.pth", tmp_path / "out.safetensors", *words)
    assert result.exit_code != 0 and said in " ".join((result.output + str(result.exception)).split())
    assert not (tmp_path / "out.safetensors").exists()
