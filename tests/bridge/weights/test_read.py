"""Reading what PyTorch writes: dtypes kept, no code run, every choice the user's."""

import contextlib
import functools
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bridge import load_weights
from bridge.weights import write_safetensors

WEIGHTS = {"conv.weight": torch.arange(18.0).reshape(2, 1, 3, 3), "conv.bias": torch.tensor([1.0, 2.0])}


class Marked:
    """Pickles as a call that leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def bits(tensor):
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(arrays, tensors):
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrays[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].tobytes() == bits(tensor)


def awkward(seed):
    """Tensors of many dtypes and memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=generator)
    shared = torch.randn(3, 4, generator=generator)
    names = ("bfloat16", "float16", "float64", "float32", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "complex64")
    return {name: raw.clone().view(getattr(torch, name)) for name in names} | {
        "shared": shared,
        "shared again": shared,
        "a part of shared": shared[1:],
        "transposed": shared.T,
        "channels last": torch.randn(1, 2, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "bool": torch.tensor([True, False]),
    }


def test_a_file_of_torch_save_keeps_every_dtype_and_bit(seed, tmp_path):
    tensors = awkward(seed)
    assert_same(load_weights(saved(tmp_path / "a.pt", tensors)), tensors)


def test_the_format_before_pytorch_1_6_is_read_too(seed, tmp_path):
    tensors = {name: tensor for name, tensor in awkward(seed).items() if not name.startswith("float8")}
    path = saved(tmp_path / "a.pt", tensors, _use_new_zipfile_serialization=False)
    assert_same(load_weights(path), tensors)


def test_a_state_dict_is_copied(seed):
    tensors = awkward(seed)
    arrays = load_weights(tensors)
    assert_same(arrays, tensors)
    before = arrays["float32"].tobytes()
    tensors["float32"].zero_()
    assert arrays["float32"].tobytes() == before


def test_a_live_module_gives_its_state_dict():
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8))
    assert_same(load_weights(module), module.state_dict())


def test_wrappers_are_taken_off():
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    expected = plain.state_dict()
    assert_same(load_weights(nn.DataParallel(plain)), expected)
    compiled = functools.partial(torch.compile, backend="eager")
    assert_same(load_weights(compiled(nn.DataParallel(compiled(plain)))), expected)
    part = nn.Sequential(compiled(plain[0]), plain[1])
    assert_same(load_weights(part), expected)


def test_a_prefix_that_not_every_name_has_stays():
    arrays = load_weights({"module.a": torch.ones(1), "b": torch.ones(1)})
    assert list(arrays) == ["module.a", "b"]


def test_pickled_code_is_named_and_not_run(tmp_path):
    path = saved(tmp_path / "a.pt", {"state_dict": WEIGHTS, "config": Marked(tmp_path / "mark"), "other": np.float32})
    with pytest.raises(ValueError, match=r"a\.pt holds pickled code, which is not run: numpy\.float32, posix\.mkdir"):
        load_weights(path)
    assert not (tmp_path / "mark").exists()


def test_pickled_code_in_the_old_format_is_named_and_not_run(tmp_path):
    path = saved(tmp_path / "a.pt", {"code": Marked(tmp_path / "mark")}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"holds pickled code, which is not run: posix\.mkdir"):
        load_weights(path)
    assert not (tmp_path / "mark").exists()


def test_a_bare_pickle_is_not_run(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Marked(tmp_path / "mark"), protocol=2))
    with pytest.raises(ValueError, match=r"a\.bin"):
        load_weights(tmp_path / "a.bin")
    assert not (tmp_path / "mark").exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "a.pt", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*save `model\.state_dict\(\)`"):
        load_weights(path)


@given(st.data())
def test_a_flipped_bit_or_a_cut_of_a_zip_is_found_or_changes_nothing(tmp_path_factory, data):
    path = saved(tmp_path_factory.mktemp("flip") / "a.pt", WEIGHTS)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), "flip"):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert_same(load_weights(path), WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_tensor_that_claims_10_to_the_15_elements_is_refused(zipped, tmp_path):
    path = saved(tmp_path / "a.pt", {"a": torch.ones(1).expand(10**15)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="'a' claims 1000000000000000 elements, more than the file"):
        load_weights(path)


def test_a_storage_that_claims_more_than_it_has_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"a": torch.ones(5)})
    forged = tmp_path / "forged.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl"):  # the size of the storage and of the tensor, as one-byte numbers
                content = content.replace(b"K\x05", b"M\xff\xff")
            new.writestr(record.filename, content)
    with pytest.raises(ValueError, match=r"forged\.pt"):
        load_weights(forged)


def test_compressed_records_are_refused(tmp_path):
    path = saved(tmp_path / "a.pt", WEIGHTS)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(ValueError, match="records are compressed"):
        load_weights(tmp_path / "b.pt")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        load_weights(tmp_path / "a.pt")


def test_other_files_are_refused_with_likely_causes(tmp_path):
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a\.pth is neither.*\(b\) a text file such as a git-lfs pointer"):
        load_weights(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(TypeError, match="`source` is a int"):
        load_weights(3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.eye(2).to_sparse(), "'a' is sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "'a' is quantized"),
        (lambda: torch.ones(2, device="meta"), "'a' is without data"),
        (lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2), "float4_e2m1fn_x2, which NumPy and ml_dtypes lack"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, that these tensors are deprecated or experimental
def test_a_tensor_without_a_dense_form_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        load_weights({"a": make()})


AVERAGED = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "checkpoint, options, expected",
    [
        ({"state_dict": WEIGHTS, "epoch": 3, "best": torch.tensor(1.0)}, {}, WEIGHTS),
        ({"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}, {}, WEIGHTS),
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, {"part": "state_dict_ema"}, AVERAGED),
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, {"part": "state_dict"}, WEIGHTS),
        ({"a": {"b": WEIGHTS}}, {"part": "a.b"}, WEIGHTS),
        ({f"net.{name}": t for name, t in WEIGHTS.items()} | {"loss.a": torch.ones(1)}, {"prefix": "net."}, WEIGHTS),
        (
            {"n_averaged": torch.tensor(2)} | {f"module.{n}": t for n, t in AVERAGED.items()},
            {"prefix": "module."},
            AVERAGED,
        ),
    ],
)
def test_the_part_that_is_asked_for_is_taken(checkpoint, options, expected, tmp_path):
    assert_same(load_weights(saved(tmp_path / "a.pt", checkpoint), **options), expected)
    assert_same(load_weights(checkpoint, **options), expected)


@pytest.mark.parametrize(
    "checkpoint, options, message",
    [
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, {}, "an average of weights is never chosen for you"),
        ({"model_ema": AVERAGED}, {}, r"holds 'model_ema' \(2 tensors\): choose"),
        ({"generator": WEIGHTS, "critic": WEIGHTS}, {}, r"'generator' \(2 tensors\), 'critic' \(2 tensors\)"),
        ({"state_dict": WEIGHTS}, {"part": "ema"}, r"`part` is 'ema', expected one of 'state_dict'"),
        ({"epoch": 3, "lr": 0.1}, {}, r"no mapping of tensors by name: 'epoch' \(int\), 'lr' \(float\)"),
        ({}, {}, "it is empty"),
        ({**WEIGHTS, "conv.extra": 3}, {}, r"'conv\.extra' \(int\)"),
        ({"n_averaged": torch.tensor(2), "module.a": torch.ones(1)}, {}, r'choose them with `prefix="module\."`'),
        ({"net.a": torch.ones(1), "net_ema.a": torch.ones(1)}, {}, r"`prefix='net_ema\.'`, or the others \(net\)"),
        (WEIGHTS, {"prefix": "net."}, r"`prefix` is 'net\.', and no name starts with it"),
        ({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, {}, r"duplicate keys.*a\._orig_mod\.b and a\.b"),
    ],
)
def test_a_choice_that_is_open_is_left_to_the_user(checkpoint, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_weights(saved(tmp_path / "a.pt", checkpoint), **options)


def sharded(folder, shards, index=None):
    """Writes {file: {name: array}} and an index of them."""
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    index = index or {name: file for file, tensors in shards.items() for name in tensors}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


SHARDS = {f"model-{i}.safetensors": {f"layer.{i}": np.full(2, i, np.float32)} for i in range(4)}


def test_shards_are_read_as_one(tmp_path):
    expected = {f"layer.{i}": [i, i] for i in range(4)}
    index = sharded(tmp_path, SHARDS)
    assert {name: array.tolist() for name, array in load_weights(index).items()} == expected
    assert {name: array.tolist() for name, array in load_weights(tmp_path).items()} == expected


def test_missing_shards_are_all_named(tmp_path):
    index = sharded(tmp_path, SHARDS)
    for i in (1, 3):
        (tmp_path / f"model-{i}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs 4 shards, and 2 are missing: model-1\.s.*, model-3\.s"):
        load_weights(index)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"layer.0": "model-0.safetensors", "layer.9": "model-0.safetensors"}, "'layer.9' is not in model-0"),
        ({"layer.0": "model-1.safetensors"}, "'layer.0' is not in model-1.*'layer.1' is in model-1.*index says None"),
        ({"a": "../secret.safetensors"}, r"outside its own folder: \.\./secret"),
        ({"a": "/etc/passwd"}, "outside its own folder"),
        ({"a": 3}, "no index of shards"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(index, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_weights(sharded(tmp_path, SHARDS, index))


def test_a_key_in_two_shards_is_refused(tmp_path):
    index = {"a": "1.safetensors"}
    path = sharded(tmp_path, {"1.safetensors": {"a": np.ones(1)}, "2.safetensors": {"a": np.ones(1), "b": np.ones(1)}})
    path.write_text(json.dumps({"weight_map": index | {"b": "2.safetensors"}}))
    with pytest.raises(ValueError, match=r"'a' is in 2\.safetensors, the index says 1\.safetensors"):
        load_weights(path)


def test_an_index_that_is_no_index_is_refused(tmp_path):
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        (tmp_path / "a.index.json").write_text(text)
        with pytest.raises(ValueError, match="no index of shards"):
            load_weights(tmp_path / "a.index.json")


def test_a_hugging_face_folder_is_read_safetensors_first(tmp_path):
    saved(tmp_path / "pytorch_model.bin", WEIGHTS)
    assert_same(load_weights(tmp_path), WEIGHTS)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(1)})
    assert list(load_weights(tmp_path)) == ["a"]


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors.*it has config\.json"):
        load_weights(tmp_path)
