"""The bound on the errors of jaxdw's method "fft" on a case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bridge.case import Case
from bridge.numerics import Format, Normwise, fourier_error
from jaxdw.geometry import Geometry
from jaxdw.lowerings.fft import blocks_of
from jaxdw.padding import padded_geometry


def normwise(case: Case, fmt: Format, *, in_parts: bool = False) -> Normwise:
    """Return the bound where the transforms compute in a format.

    Args:
      in_parts: whether several devices have a part of each spatial axis.
    """
    g = case.geometry
    on_padded = g if g.padding_mode == "zeros" else padded_geometry(g)
    blocks = blocks_of(on_padded)
    lengths = [each.length for each in blocks]
    if in_parts:  # a power of 3 has the greatest error of all lengths up to it
        lengths = [3 ** math.ceil(math.log(length, 3)) for length in lengths]
    whole = not in_parts and all(each.count == 1 for each in blocks)
    x = _without_zeros(case.x, g, lengths if whole else None)
    errors = fourier_error(x, _dilated(case.kernel, g), lengths, fmt, whole=whole)
    errors = errors.reshape(*g.batch, *(1,) * g.rank, g.features)
    return Normwise(np.broadcast_to(errors, g.output_shape))


def _without_zeros(x: np.ndarray, g: Geometry, lengths: Sequence[int] | None) -> np.ndarray:
    """Return x `(batch, *spatial, C)`, dilated and padded as the geometry says, but for zeros at its ends.

    Args:
      lengths: of transforms that leave out the last inputs, which no output reads; None: all inputs.
    """
    first = len(g.batch)
    for axis in range(g.rank):
        sources = g.padded_sources(axis)
        inputs = np.flatnonzero(sources >= 0)
        sources = sources[inputs[0] : inputs[-1] + 1] if inputs.size else sources[:1]
        if lengths is not None:
            before = max(0, g.padding[axis][0]) if g.padding_mode == "zeros" else 0
            sources = sources[: lengths[axis] - before]
        taken = np.take(x, np.maximum(sources, 0), axis=first + axis)
        x = np.where((sources >= 0).reshape(-1, *(1,) * (x.ndim - first - axis - 1)), taken, np.zeros((), x.dtype))
    return x.reshape(-1, *x.shape[first:])


def _dilated(kernel: np.ndarray, g: Geometry) -> np.ndarray:
    """Return the kernel `(*spans, C, M)`."""
    wide = np.zeros((*g.spans, g.channels, g.multiplier), kernel.dtype)
    wide[tuple(slice(None, None, step) for step in g.kernel_dilation)] = kernel.reshape(
        *g.kernel_size, g.channels, g.multiplier
    )
    return wide
