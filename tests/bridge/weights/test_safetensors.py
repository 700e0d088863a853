"""The safetensors format: every dtype kept, every claim checked, nothing half-written."""

import contextlib
import json
import resource

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bridge.weights import read_safetensors, write_safetensors
from bridge.weights.safetensors_ import DTYPES


def tensors_of(dtype, rng):
    raw = (
        rng.integers(0, 2, (2, 3, 4), np.uint8)
        if dtype.kind == "b"
        else rng.integers(0, 256, 24 * dtype.itemsize, np.uint8)
    )
    full = raw.reshape(-1).view(dtype).reshape(2, 3, 4)
    return {
        "full": full,
        "turned": full.T,
        "strided": full[:, ::2],
        "scalar": full[0, 0, 0].reshape(()),
        "none": full[:0],
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def raw_file(path, header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@contextlib.contextmanager
def a_disk_with(size):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", DTYPES.values())
def test_every_dtype_comes_back_bit_for_bit(name, seed, tmp_path):
    tensors = tensors_of(np.dtype(name), np.random.default_rng(seed))
    write_safetensors(tmp_path / "a.safetensors", tensors)
    back = read_safetensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)


def test_the_reference_implementation_reads_and_writes_the_same(seed, tmp_path):
    torch = pytest.importorskip("torch")
    raw = np.random.default_rng(seed).integers(0, 256, 64, np.uint8)
    dtypes = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int64", "uint8")
    theirs = {name: torch.from_numpy(raw.copy()).view(getattr(torch, name)) for name in dtypes}
    ours = {name: raw.view(name) for name in dtypes}
    save_file(theirs, tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", ours)
    read = read_safetensors(tmp_path / "theirs.safetensors")
    loaded = load_file(tmp_path / "ours.safetensors")
    for name in dtypes:
        assert same(read[name], ours[name])
        assert loaded[name].dtype == theirs[name].dtype
        assert loaded[name].view(torch.uint8).equal(theirs[name].view(torch.uint8))


def test_what_is_read_can_be_written_to_without_changing_the_file(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(3, np.float32)})
    read_safetensors(tmp_path / "a.safetensors")["a"][:] = 1
    assert read_safetensors(tmp_path / "a.safetensors")["a"].tolist() == [0, 0, 0]


LIES = {
    "10^15 elements": ({"a": entry([10**15], 0, 4)}, 4, "claims 1000000000000000 elements"),
    "10^15 elements, and bytes": ({"a": entry([10**15], 0, 4 * 10**15)}, 4, "truncated"),
    "more axes than NumPy has": ({"a": entry([1] * 65, 0, 4)}, 4, "expected counts"),
    "a product beyond 64 bits": ({"a": entry([2**40, 2**40, 0], 0, 0)}, 0, "claims shape"),
    "a negative size": ({"a": entry([-1], 0, 4)}, 4, "expected counts"),
    "a size that is true": ({"a": entry([True], 0, 4)}, 4, "expected counts"),
    "a size that is no integer": ({"a": entry([1.0], 0, 4)}, 4, "expected counts"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' begins at byte 4, expected 8"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "'b' begins at byte 8, expected 4"),
    "backwards": ({"a": entry([1], 4, 0)}, 4, "has -4 bytes"),
    "truncated data": ({"a": entry([2], 0, 8)}, 5, "need 8 bytes of data and the file has 5"),
    "data left over": ({"a": entry([2], 0, 8)}, 9, "need 8 bytes of data and the file has 9"),
    "unknown dtype": ({"a": entry([8], 0, 4, "F4")}, 4, "dtype 'F4'"),
    "a field too many": ({"a": {**entry([1], 0, 4), "code": "x"}}, 4, "not exactly dtype"),
    "no object": ([1], 0, "expected an object"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, 0, "not text"),
    "duplicate keys": (b'{"a": 1, "b": 2, "a": 3}', 0, "duplicate keys 'a'"),
    "duplicate fields": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, "duplicate keys 'dtype'"),
    "no JSON": (b"{", 0, "cannot be"),
    "no UTF-8": (b"\xff\xfe", 0, "cannot be"),
    "deep nesting": (b"[" * 100_000, 0, "cannot be"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    header, size, message = LIES[lie]
    path = raw_file(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**63).to_bytes(8, "little"), b"version https://git-lfs.github.com/"]
)
def test_a_file_that_is_no_safetensors_is_refused(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file.*Likely causes: \(a\)"):
        read_safetensors(tmp_path / "a.safetensors")


@given(st.data())
def test_a_flipped_bit_or_a_cut_is_found_or_changes_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32), "b": np.arange(4, dtype=ml_dtypes.bfloat16)}
    write_safetensors(path, tensors)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), "flip"):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        back = read_safetensors(path)
        assert back.keys() == tensors.keys() and all(same(back[name], tensors[name]) for name in tensors)


def test_equal_tensors_give_equal_files(tmp_path):
    a, b = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float64)
    write_safetensors(tmp_path / "1.safetensors", {"a": a, "b": b})
    write_safetensors(tmp_path / "2.safetensors", {"b": b, "a": a})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    with a_disk_with(10_000), pytest.raises(OSError, match=r"a\.safetensors was not written: File too large"):
        write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(2)})
    with a_disk_with(10_000), pytest.raises(OSError):
        write_safetensors(path, {"a": np.zeros(10_000)})
    assert read_safetensors(path)["a"].tolist() == [1, 1] and list(tmp_path.iterdir()) == [path]


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(TypeError, match="tensor 'a' has dtype complex128"):
        write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(2, complex)})
