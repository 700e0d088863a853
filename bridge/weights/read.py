"""Read weights from anything in which PyTorch keeps them, as NumPy arrays of the same dtype."""

from __future__ import annotations

import itertools
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
import numpy as np

from bridge.files import open_regular, read_json
from bridge.weights.merge import in_parts, live_state, merged
from bridge.weights.names import is_average, plain_names
from bridge.weights.safetensors_ import read_safetensors

#: What a Hugging Face folder may hold, the first found is read; as `transformers` has it.
_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

#: Mappings of tensors in one checkpoint: a pickle can name the same one without end.
_MOST_PARTS = 1000

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def load_weights(
    source: Any, *, part: str | None = None, prefix: str | None = None, merge: bool = False
) -> dict[str, np.ndarray]:
    """Read the tensors of a checkpoint or a live model by name. Dtypes are kept, also bfloat16, float16 and float64.

    Files are mapped, not read: an array takes memory when it is used. A live model is copied.

    Args:
      source: a `.safetensors`, `.pt`, `.pth` or `.bin` file; an index of shards (`*.index.json`); a Hugging Face
        folder; a state_dict; or an `nn.Module`.
      part: which entry of a training checkpoint, such as "state_dict" or "model_ema"; needed where there is a choice,
        and always for an average of weights (EMA, SWA).
      prefix: keep only the names that start with it, without it. `module.`, `_orig_mod.` and others that wrappers add
        are taken off without being named.
      merge: multiply out weights that are there in parts: weight and spectral normalization, pruning, and any
        parametrization of a live model.

    Raises:
      ValueError: a file that is damaged, holds pickled code, or leaves a choice open; the message says which.
      TypeError: a source or tensor of another kind.
      OSError: a file or a shard is missing.

    >>> import numpy as np
    >>> load_weights({"module.conv.weight": np.zeros((8, 1, 3, 3), np.float16)})["conv.weight"].dtype
    dtype('float16')
    """
    if isinstance(source, (str, os.PathLike)):
        tensors = _from_path(Path(source), part)
    else:
        is_live = callable(getattr(source, "state_dict", None))
        live = source if not is_live else live_state(source) if merge else source.state_dict()
        if not isinstance(live, Mapping):
            raise TypeError(f"`source` is a {type(source).__name__}, expected a path, a state_dict or an nn.Module")
        _refuse_lazy(live)
        tensors = {name: _array(name, value).copy() for name, value in _choose_part(live, part).items()}
    return prepared(tensors, prefix, merge)


def prepared(tensors: Mapping[str, np.ndarray], prefix: str | None, merge: bool) -> dict[str, np.ndarray]:
    """Return arrays under their plain names, multiplied out where `merge` asks for it."""
    plain = plain_names(tensors, prefix)
    if not merge:
        return plain
    torch_tensors = tensors_of({part: plain[part] for _, parts, _ in in_parts(plain) for part in parts})
    whole = merged(dict(plain) | torch_tensors)
    return {name: _array(name, value) for name, value in whole.items()}


def tensors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arrays as `torch.Tensor`s of their own memory and the same bytes."""
    import torch

    tensors = {}
    for name, array in arrays.items():
        raw = torch.from_numpy(np.array(array, order="C").reshape(-1).view(np.uint8))
        tensors[name] = raw.view(getattr(torch, array.dtype.name)).reshape(array.shape)
    return tensors


def _from_path(path: Path, part: str | None) -> dict[str, np.ndarray]:
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected weights")
    plain = path.suffix == ".safetensors" or path.name.endswith(".index.json")
    if plain and part is not None:
        raise ValueError(f"`part` is {part!r}, expected None: {path} has tensors alone and no parts; `prefix` chooses")
    if plain:
        return read_safetensors(path) if path.suffix == ".safetensors" else _sharded(path)
    with open_regular(path) as file:
        start = file.read(4)
    if start.startswith((_ZIP, _PICKLE)):
        return _torch_file(path, start == _ZIP, part)
    raise ValueError(
        f"{path} is neither a PyTorch checkpoint nor .safetensors: it starts with {start!r}. Likely causes: (a) an "
        "interrupted download; (b) a text file such as a git-lfs pointer; (c) weights of another framework"
    )


def _in_folder(folder: Path) -> Path:
    for name in _FOLDER:
        if (folder / name).exists():
            return folder / name
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} has none of {', '.join(_FOLDER)}; it has {', '.join(found[:10]) or 'no files'}. "
        "Name the file of weights itself if it is called otherwise"
    )


def _sharded(index: Path) -> dict[str, np.ndarray]:
    """Read every tensor of the index from the shard that the index names, and no other."""
    try:
        shard_of = read_json(index)["weight_map"]
        if not all(isinstance(name, str) for name in shard_of.values()):
            raise TypeError("a shard's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards: expected a `weight_map` of files by tensor: {error}"
        ) from None
    shards = sorted(set(shard_of.values()))
    if outside := [name for name in shards if Path(name).name != name or name in ("", ".", "..")]:
        raise ValueError(f"{index} names shards outside its own folder: {', '.join(outside)}")
    if indexes := [name for name in shards if name.endswith(".index.json")]:
        raise ValueError(f"{index} names indexes as its shards, expected files of weights: {', '.join(indexes)}")
    if absent := [name for name in shards if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index} needs {len(shards)} shards, and {len(absent)} are missing: {', '.join(absent)}. "
            "Likely causes: (a) an interrupted download; (b) git-lfs files not fetched"
        )
    tensors: dict[str, np.ndarray] = {}
    wrong = []
    names_in: dict[str, set[str]] = {shard: set() for shard in shards}
    for name, shard in shard_of.items():
        names_in[shard].add(name)
    for shard, expected in names_in.items():
        held = _from_path(index.parent / shard, None)
        wrong += [f"{name!r} is not in {shard}" for name in sorted(expected - held.keys())]
        wrong += [
            f"{name!r} is in {shard}, the index says {shard_of.get(name)}" for name in held if name not in expected
        ]
        tensors.update(held)
    if wrong:
        raise ValueError(f"{index} and its shards disagree: {'; '.join(wrong)}")
    return tensors


def _torch_file(path: Path, is_zip: bool, part: str | None) -> dict[str, np.ndarray]:
    """Read a file of `torch.save`: tensors and plain containers alone. No pickled code is run."""
    import torch

    if is_zip:
        _refuse_programs(path)
        _check_archive(path)
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if is_zip else []
        # the format before PyTorch 1.6 cannot be mapped
        loaded = None if unsafe else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the unpickler raises almost anything on a damaged file
        unsafe = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not unsafe:
            raise ValueError(f"{path} is no whole PyTorch checkpoint: {_first_line(error)}") from None
    if unsafe:
        raise ValueError(
            f"{path} holds pickled code, which is not run: {', '.join(unsafe)}. Expected tensors alone: save "
            "`model.state_dict()` where the checkpoint was made"
        )
    tensors = _choose_part(loaded, part, str(path))
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > size:  # strides of 0 claim any number from one
            raise ValueError(
                f"{path}: tensor {name!r} claims {tensor.numel()} elements, more than the file of {size} bytes holds"
            )
    return {name: _array(name, tensor) for name, tensor in tensors.items()}


#: A record that only one kind of archive has, the name of that kind, and how to get its weights in PyTorch or NumPy.
_OTHERS = (
    (
        r"(^|/)constants\.pkl$",
        "TorchScript, a program",
        "If you trust it: `torch.save(torch.jit.load({0!r}).state_dict(), 'weights.pt')`",
    ),
    (
        r"(^|/)(archive_format|serialized_exported_program\.json)$",
        "an exported program (`torch.export`, a .pt2 archive)",
        "If you trust it: `torch.save(dict(torch.export.load({0!r}).state_dict), 'weights.pt')`",
    ),
    (r"(^|/)\.data/extern_modules$", "a `torch.package`, a program", "Save the `state_dict()` of the model in it"),
    (r"\.npy$", "an archive of NumPy (.npz)", "Call `bridge.load_weights(dict(np.load({0!r})))`"),
)


def _refuse_programs(path: Path) -> None:
    """Raise for a sound archive that is no checkpoint, and say what it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return  # `_check_archive` says what is damaged
    if any(re.search(r"(^|/)data\.pkl$", name) for name in names) and not any(
        name.endswith("/constants.pkl") for name in names
    ):
        return
    for pattern, kind, fix in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"{path} is {kind}, and no checkpoint, expected tensors of `torch.save`. {fix.format(str(path))}"
            )
    raise ValueError(
        f"{path} is a zip archive, and no PyTorch checkpoint: it has no data.pkl; it has "
        f"{', '.join(map(repr, names[:6])) or 'nothing'}"
    )


def _check_archive(path: Path) -> None:
    """Check that the zip archive is whole: every record is stored plainly and has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its records are larger than the file: they overlap, or claim what is not there")
            if packed := [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"records are compressed, which PyTorch never does: {', '.join(packed[:4])}")
            if damaged := archive.testzip():
                raise ValueError(
                    f"record {damaged} fails its checksum. Likely causes: (a) bits flipped on disk or on the way; "
                    "(b) the file was saved with `torch.serialization.set_crc32_options(False)`: save it without"
                )
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no whole PyTorch checkpoint: {error}") from None


def _choose_part(loaded: Any, part: str | None, where: str = "the state_dict") -> Mapping[str, Any]:
    """Return the one mapping of tensors in a checkpoint, or the one that `part` names."""
    parts = dict(itertools.islice(_parts(loaded), _MOST_PARTS + 1))
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{where} holds more than {_MOST_PARTS} mappings of tensors, expected a checkpoint")
    if part is not None:
        if part not in parts:
            raise ValueError(f"`part` is {part!r}, expected one of {_sizes(parts)} of {where}")
        return parts[part]
    if "" in parts:
        return parts[""]
    if len(parts) == 1 and not is_average(next(iter(parts))):
        return next(iter(parts.values()))
    if parts:
        raise ValueError(
            f"{where} holds {_sizes(parts)}: choose with `part`; an average of weights is never chosen for you"
        )
    if isinstance(loaded, Mapping):
        others = [f"{name!r} ({type(value).__name__})" for name, value in loaded.items() if not _is_tensor(value)]
        raise ValueError(f"{where} is no mapping of tensors by name: {', '.join(others[:8]) or 'it is empty'}")
    raise ValueError(f"{where} is a {type(loaded).__name__}, expected a mapping of tensors by name")


def _parts(
    loaded: Any, name: str = "", depth: int = 0, seen: dict[int, bool] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping of names to tensors alone, by its dotted place; nested at most 4 deep.

    A mapping of other things is entered once, and each is looked through once: a pickle can nest one in itself.
    """
    if not isinstance(loaded, Mapping) or not loaded:
        return
    seen = {} if seen is None else seen
    known = id(loaded) in seen
    if not known:
        seen[id(loaded)] = all(map(_is_tensor, loaded.values())) and all(isinstance(key, str) for key in loaded)
    if seen[id(loaded)]:
        yield name, loaded
    elif depth < 4 and not known and all(isinstance(key, str) for key in loaded):
        for key, value in loaded.items():
            yield from _parts(value, f"{name}.{key}" if name else key, depth + 1, seen)


def _sizes(parts: Mapping[str, Mapping]) -> str:
    return ", ".join(f"{name!r} ({len(tensors)} tensors)" for name, tensors in parts.items()) or "nothing"


def _refuse_lazy(tensors: Mapping[str, Any]) -> None:
    lazy = [name for name, value in tensors.items() if type(value).__name__.startswith("Uninitialized")]
    if lazy:
        raise ValueError(
            f"{', '.join(lazy[:8])} of the model are lazy: they have no shape before its first forward. Run the model "
            "once on an input, then convert it"
        )


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _array(name: str, value: Any) -> np.ndarray:
    """Return a NumPy array of the same bytes; a view where a tensor is contiguous in memory."""
    if not hasattr(value, "element_size"):
        return native(name, np.asarray(value))
    import torch

    word = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        kind = "quantized" if value.is_quantized else "without data" if value.layout is torch.strided else "sparse"
        raise TypeError(
            f"tensor {name!r} is {kind} ({value.layout}, {value.device}), expected a dense tensor with data"
        )
    try:
        dtype = np.dtype(word)
    except TypeError:
        raise TypeError(f"tensor {name!r} has dtype {value.dtype}, which NumPy and ml_dtypes lack") from None
    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if math.prod(dense.shape) == 0:
        return np.zeros(tuple(dense.shape), dtype)
    return dense.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tuple(dense.shape))


def native(name: str, array: np.ndarray) -> np.ndarray:
    """Return the numbers in this machine's byte order, which JAX and PyTorch need.

    Raises:
      TypeError: no numbers.
    """
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise TypeError(f"tensor {name!r} has dtype {array.dtype}, expected numbers")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
