"""The table of methods: the order of the sum, the guarantee, and the lowering for each platform.

A new method is one file in `jaxdw/lowerings/` and its row here. So is a new program for a platform.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxdw import _arrays
from jaxdw.auto import choose
from jaxdw.call import Call
from jaxdw.geometry import Geometry
from jaxdw.lowerings import cpu_fused, cpu_kernel_gradient, cpu_native, fft, generic, lax_convolutions, tpu_tiles
from jaxdw.lowerings.ordered_sum import Order


class Lowering(NamedTuple):
    """The two functions that compute the primitives of `jaxdw.primitive` on a platform.

    Attributes:
      conv: `(x, kernel, bias or None, geometry, order, compute, dtype)` to y `(*batch, *output_spatial, C*M)`.
      kernel_gradient: `(x, dy, geometry, compute, dtype)` to `(*kernel_size, 1, C*M)`.
      reads_flipped: whether `conv` has the argument `flipped`, with which it reads the kernel backwards, and adds from
        the last tap where the geometry says so.

    Both add in the dtype `compute`, float32 or float64, and round the sum once to `dtype`. No size is 0.
    """

    conv: Callable[..., jax.Array]
    kernel_gradient: Callable[..., jax.Array]
    reads_flipped: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to compute a depthwise convolution.

    Attributes:
      order: of the sum over the taps. "raster" is one chain of fused multiply-adds over all taps. "rows" is such a
        chain for each kernel row, and then the sum of these. None is no such order.
      guarantee: what holds for the result, in words.
      lowerings: by JAX platform; None is any other platform. A method without any is not one of our primitives.
      compiled: the lowering on a CPU by the kernels of `jaxdw.native`, where a program can call them.
      function: computes a call with lax's own operations, where there are no lowerings.
    """

    order: Order | None
    guarantee: str
    lowerings: Mapping[str | None, Lowering] = dataclasses.field(default_factory=dict)
    compiled: Lowering | None = None
    function: Callable[[Call], jax.Array] | None = None


def _by_xla(conv: Callable[..., jax.Array], kernel_gradient: Callable[..., jax.Array]) -> Lowering:
    """Return the lowering by two programs for XLA, which return sums in the dtype in which they add."""

    def rounded(program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *arguments: program(*arguments[:-1]).astype(arguments[-1])

    return Lowering(rounded(conv), rounded(kernel_gradient))


def _by_fft(spectrum_bytes: int) -> Lowering:
    return Lowering(
        functools.partial(fft.conv, spectrum_bytes=spectrum_bytes),
        functools.partial(fft.kernel_gradient, spectrum_bytes=spectrum_bytes),
        reads_flipped=True,
    )


def _by_pallas(module: str, interpret: bool = False) -> Lowering:
    """Return the lowering by the kernels of a module, imported when it is used: Pallas takes a second to import."""

    def imported(name: str) -> Callable[..., jax.Array]:
        def run(*arguments: Any) -> jax.Array:
            return getattr(importlib.import_module(f"jaxdw.lowerings.{module}"), name)(*arguments, interpret=interpret)

        return run

    return Lowering(imported("conv"), imported("kernel_gradient"))


#: The programs for XLA. A program that replaces one of them on a platform is named here and nowhere else.
_SUMS: Mapping[str | None, Lowering] = {
    "cpu": _by_xla(cpu_fused.conv, cpu_kernel_gradient.kernel_gradient),
    "tpu": _by_xla(tpu_tiles.conv, generic.kernel_gradient),
    None: _by_xla(generic.conv, generic.kernel_gradient),
}

METHODS: dict[str, Method] = {
    "taps": Method(
        "raster",
        "float32 or wider throughout; on a CPU the bits of PyTorch's convolution, without a channel multiplier",
        _SUMS,
        Lowering(cpu_native.conv, cpu_native.kernel_gradient, reads_flipped=True),
    ),
    "rows": Method("rows", "float32 or wider throughout", _SUMS),
    "pallas": Method(
        "raster",
        "float32 or wider throughout",
        {
            "cpu": _by_pallas("pallas_gpu", interpret=True),
            "cuda": _by_pallas("pallas_gpu"),
            "tpu": _by_pallas("pallas_tpu"),
        },
    ),
    "fft": Method(
        None,
        "float32 or wider throughout, but each output has the error of its whole block",
        {"cpu": _by_fft(fft.SPECTRUM_BYTES_ON_CPU), None: _by_fft(fft.SPECTRUM_BYTES)},
    ),
    "patches": Method(None, "the precision that is asked for", function=lax_convolutions.patches),
    "grouped": Method(None, "the precision that is asked for", function=lax_convolutions.grouped),
}

#: What the argument `method` accepts.
NAMES = ("auto", *METHODS)


def check_method(method: Any) -> None:
    _arrays.check_choice("method", method, NAMES)


def resolve(
    method: str, geometry: Geometry, platform: str | None, compiled: bool = False
) -> tuple[Order | None, Lowering]:
    """Return the order of the sum of a method and its lowering on a platform.

    Args:
      compiled: whether the program can call the kernels of `jaxdw.native`.

    Raises:
      ValueError: the method has no lowering there.
    """
    if method == "auto":
        method = choose(geometry, platform or "other")
    elif method in ("pallas", "fft") and geometry.is_symbolic:  # they need sizes
        method = "taps"
    row = METHODS[method]
    lowering = row.compiled if compiled else None
    lowering = lowering or row.lowerings.get(platform) or row.lowerings.get(None)
    if lowering is None:
        raise ValueError(f"`method={method!r}` supports only NVIDIA GPUs and TPUs; use 'taps' or 'auto'")
    return row.order, lowering
