"""What "auto" stands for."""

from __future__ import annotations

import jax

from jaxdw.geometry import Geometry

#: Taps from which "auto" is "rows" on a CPU. `jaxdw bench --tune` measures the methods where it runs; this is from two
#: cores of an x86-64 with AVX-512, jax 0.10.2: under 49 taps the order of PyTorch's sum (taps) costs less than a tenth;
#: from 7x7 on its one long chain costs up to a third. Dtype, rank and size made no difference.
ROWS_FROM = 49


def choose(
    geometry: Geometry, platform: str | None = None, *, gradient: bool = False, starts_from_bias: bool = False
) -> str:
    """The method that "auto" stands for in a program for a JAX platform; None: the default one.

    Args:
      gradient: of the gradient by the kernel, and not of the convolution or of the gradient by x, which is another.
      starts_from_bias: whether the convolution's sum starts from a bias.

    >>> choose(Geometry.of((8, 56, 56, 96), (7, 7, 1, 96)), "cpu")
    'rows'
    """
    platform = platform or jax.default_backend()
    if platform == "tpu":
        return _choose_on_tpu(geometry, gradient, starts_from_bias)
    return "rows" if platform == "cpu" and geometry.taps >= ROWS_FROM else "taps"


def _choose_on_tpu(geometry: Geometry, gradient: bool, starts_from_bias: bool) -> str:
    """By the compiler's estimates, in seconds and in cycles (`benchmarks/tpu.py`): nothing has been measured.

    The kernels have the fewest cycles nearly everywhere, and read and write about what the fused loop of "taps" does.
    But where "taps" is XLA's own convolution, and reads x as it lies, that has the better estimates.
    """
    from jaxdw.sums import mosaic, tiles  # only here: Pallas takes a second to import

    if geometry.is_symbolic or 0 in geometry.x_shape or 0 in geometry.output_shape:
        return "taps"
    as_it_lies = not gradient and not starts_from_bias and tiles.is_convolution_as_it_lies(geometry)
    return "taps" if as_it_lies or not mosaic.fits(geometry, gradient) else "pallas"
