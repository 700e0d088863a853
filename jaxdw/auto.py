"""The method that "auto" stands for."""

from __future__ import annotations

import jax

from jaxdw.geometry import Geometry

#: Taps from which "auto" is "rows" on a CPU. `jaxdw bench --tune` measures the methods on the machine where it runs.
#: This number is from two cores of an x86-64 with AVX-512, jax 0.10.2: with fewer than 49 taps the order of PyTorch's
#: sum ("taps") costs less than a tenth; from 7x7 on its one long chain costs up to a third. Dtype, rank and size made
#: no difference.
ROWS_FROM = 49


def choose(geometry: Geometry, platform: str | None = None) -> str:
    """Return the method that "auto" stands for in a program for a JAX platform; None is the default platform.

    On GPU and TPU it is "taps": nobody has timed the kernels of "pallas" there.

    >>> choose(Geometry.of((8, 56, 56, 96), (7, 7, 1, 96)), "cpu")
    'rows'
    """
    platform = platform or jax.default_backend()
    return "rows" if platform == "cpu" and geometry.taps >= ROWS_FROM else "taps"
