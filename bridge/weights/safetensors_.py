"""Read and write safetensors in NumPy: every dtype is kept, and every claim of the header is checked.

A file is 8 bytes (the header's length n, little-endian), n bytes of JSON
`{name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {text: text}}`, then the data; the
tensors cover the data without hole or overlap. Of the package's own loaders (`safetensors` 0.8.0) NumPy's refuses
bfloat16 and float8, and Flax's refuses float8 and narrows float64; here they are kept, as `ml_dtypes` has them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
import numpy as np

from bridge.files import atomic_file, open_regular, parse_json

#: The format's names of dtypes, and NumPy's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

#: Bytes of an element.
_SIZES = {code: np.dtype(name).itemsize for code, name in DTYPES.items()}

_NAMES = {name: code for code, name in DTYPES.items()}

#: The longest header that the format allows, in bytes.
_MAX_HEADER = 100_000_000

#: Where a file written here keeps the hash of its tensors, so that a flipped bit is found; other writers have no hash.
_HASH = "jaxdw.sha256"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read tensors by name, mapped from the file copy-on-write.

    Only the header is read, but for a file with a hash of its own (`write_safetensors` makes one): it is checked.

    Raises:
      ValueError: the file is no safetensors file, is truncated, lies about its sizes, or fails its own hash.
    """
    header, metadata, start = _read_header(path)
    data = np.zeros(0, np.uint8)
    if path.stat().st_size > start:
        # as a plain array: each slice of a memmap takes ten times as long
        data = np.memmap(path, np.uint8, "c", offset=start).view(np.ndarray)
    if _HASH in metadata and (found := _digest(header, [data])) != metadata[_HASH]:
        raise ValueError(
            f"{path} is damaged: its tensors have SHA-256 {found[:16]}..., and it says {metadata[_HASH][:16]}.... "
            "Likely causes: (a) bits flipped on disk or on the way; (b) another program changed tensors and copied "
            f"the old metadata, whose entry {_HASH!r} it should have dropped"
        )
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        try:
            tensors[name] = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # a size that NumPy cannot index, which an empty tensor may claim
            raise ValueError(f"{path}: tensor {name!r} claims shape {entry['shape']}: {error}") from None
    return tensors


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    track: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write tensors under their names, whole or not at all; equal tensors give equal files.

    Args:
      path: the file.
      tensors: NumPy arrays of any of `DTYPES`, in any memory order.
      metadata: text for the header.
      track: wraps the loop over tensors, for a progress bar.

    Raises:
      TypeError: a dtype that the format lacks.
      OSError: the file could not be written; nothing of it stays.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _NAMES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, expected one of {', '.join(_NAMES)}")
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # widest first: all are aligned
    header, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        span = [offset, offset := offset + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": span}
    text = {**(metadata or {}), _HASH: _digest(header, (octets(tensors[name]) for name in names))}
    encoded = json.dumps({"__metadata__": text, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in track(names):
            file.write(octets(tensors[name]))


def octets(array: np.ndarray) -> memoryview:
    """Return the array's bytes, little-endian in C order, whatever its memory order."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return array.reshape(-1).view(np.uint8).data


def _digest(header: Mapping[str, Any], data: Iterable) -> str:
    """Return the SHA-256 of the names, dtypes, shapes, offsets and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the tensors' entries, the metadata, and the data's offset, all checked against the file's size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is no whole safetensors file: it has {size} bytes, and its header claims {length} "
                f"(at most {_MAX_HEADER}). Likely causes: (a) an interrupted download; (b) a text file such as a "
                "git-lfs pointer; (c) another format"
            )
        encoded = file.read(length)
    try:
        header = parse_json(encoded)
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}, expected an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("`__metadata__` is not text by name")
        _check_entries(header, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that cannot be: {error}") from None
    return header, metadata, 8 + length


def _check_entries(header: Mapping[str, Any], available: int) -> None:
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} has not exactly dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}, expected counts")
        claimed = math.prod(shape) * _SIZES[entry["dtype"]]
        if offsets[1] - offsets[0] != claimed:
            raise ValueError(
                f"tensor {name!r} claims {math.prod(shape)} elements ({claimed} bytes) "
                f"and has {offsets[1] - offsets[0]} bytes of data"
            )
        spans.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise ValueError(f"tensor {name!r} begins at byte {begin}, expected {end}: tensors overlap or leave a hole")
        end = stop
    if end != available:
        raise ValueError(f"the tensors need {end} bytes of data and the file has {available}: truncated, or damaged")


def _counts(value: Any) -> bool:
    """Return True for a list of as many and as great numbers as NumPy can index."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)
