"""What both models are given: arrays by position and by keyword, and settings by keyword."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: The dtypes that both frameworks take.
_DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "bool")


@dataclasses.dataclass(frozen=True)
class Mode:
    """How both models run.

    Attributes:
      gradients: also backward, to the gradient of every parameter.
      training: in training mode; else in inference.
    """

    gradients: bool = False
    training: bool = False


INFERENCE = Mode()


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """The inputs of one model.

    Attributes:
      arrays: all arrays, those by position first.
      keywords: the names of the last arrays, which are given by keyword.
      settings: what else is given by keyword: booleans, numbers, strings, None.
    """

    arrays: Sequence[np.ndarray]
    keywords: Sequence[str] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def split(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the positional arguments and the keyword arguments, with other arrays in the place of `arrays`."""
        by_position = len(arrays) - len(self.keywords)
        return arrays[:by_position], {**dict(zip(self.keywords, arrays[by_position:])), **self.settings}


def both(inputs: Any) -> tuple[ModelInputs, ModelInputs]:
    """Return the inputs of JAX and of PyTorch: images are channels last for JAX and channels first for PyTorch.

    Args:
      inputs: an array, several, a mapping of keywords to arrays and settings, or `{"jax": ..., "torch": ...}` of these.

    Raises:
      ValueError: something else.
    """
    if isinstance(inputs, Mapping) and set(inputs) & {"jax", "torch"}:
        if set(inputs) != {"jax", "torch"}:
            raise ValueError(f"`inputs` has the keys {sorted(inputs)}, expected 'jax' and 'torch'")
        ours, theirs = (_read(inputs[key]) for key in ("jax", "torch"))
        if len(ours.arrays) != len(theirs.arrays):
            raise ValueError(
                f"`inputs` has {len(ours.arrays)} arrays for JAX and {len(theirs.arrays)} for PyTorch, expected as many"
            )
        return ours, _in_order_of(ours, theirs)
    ours = _read(inputs)
    channels_first = [np.moveaxis(x, -1, 1) if x.ndim == 4 and x.dtype.kind not in "iub" else x for x in ours.arrays]
    return ours, dataclasses.replace(ours, arrays=channels_first)


def _in_order_of(ours: ModelInputs, theirs: ModelInputs) -> ModelInputs:
    """Return PyTorch's inputs with the keywords in JAX's order, where both have the same."""
    if ours.keywords == theirs.keywords or set(ours.keywords) != set(theirs.keywords):
        return theirs
    first = len(theirs.arrays) - len(theirs.keywords)
    known = dict(zip(theirs.keywords, theirs.arrays[first:]))
    arrays = [*theirs.arrays[:first], *(known[name] for name in ours.keywords)]
    return ModelInputs(arrays, ours.keywords, theirs.settings)


def _read(inputs: Any) -> ModelInputs:
    if isinstance(inputs, Mapping):
        settings = {k: v for k, v in inputs.items() if v is None or isinstance(v, (bool, int, float, str))}
        arrays = {k: v for k, v in inputs.items() if k not in settings}
        found = ModelInputs([*arrays.values()], [*map(str, arrays)], settings)
    else:
        found = ModelInputs(list(inputs) if isinstance(inputs, (list, tuple)) else [inputs])
    if not found.arrays:
        raise ValueError("`inputs` has no array, expected at least one")
    for x in found.arrays:
        if not isinstance(x, np.ndarray) or not x.size or x.dtype.name not in _DTYPES:
            said = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise ValueError(f"`inputs` has a {said}, expected NumPy arrays of {', '.join(_DTYPES)} that are not empty")
    return found
