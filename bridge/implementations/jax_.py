"""JAX: lax's convolution and jaxdw's methods."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxdw
from bridge.case import DTYPES, Case
from bridge.implementations import Algorithm, Knob, declared, user
from bridge.numerics import Arithmetic
from jaxdw.windows import dimension_numbers, flat_batch

KNOBS = {
    "dtype": Knob("same", ("same", *DTYPES)),
    "jit": Knob("on", ("on", "off")),
    "precision": Knob("default", ("default", "high", "highest")),
}


def run(compute, case: Case, *, dtype: str, jit: str, precision: str) -> np.ndarray:
    """compute(x, kernel, bias, geometry, precision) on JAX arrays in the computation's dtype."""
    working = case.dtype if dtype == "same" else DTYPES[dtype]
    wide = "float64" in (case.dtype.name, working.name)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        arrays = [None if a is None else jnp.asarray(a).astype(working) for a in (case.x, case.kernel, case.bias)]
        with jax.disable_jit(jit == "off"):
            y = _call(*arrays, compute=compute, geometry=case.geometry, precision=lax.Precision(precision))
        return np.asarray(y.astype(case.dtype))


@functools.partial(jax.jit, static_argnames=("compute", "geometry", "precision"))
def _call(x, kernel, bias, *, compute, geometry, precision):
    return compute(x, kernel, bias, geometry, precision)


def grouped(x, kernel, bias, geometry, precision):
    """`lax.conv_general_dilated` as `flax.nnx.Conv` calls it, and its bias added after."""
    flat, padding = flat_batch(x, geometry)
    y = lax.conv_general_dilated(
        flat,
        kernel,
        geometry.strides,
        padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=dimension_numbers(geometry.rank),
        feature_group_count=geometry.channels,
        precision=precision,
    ).reshape(geometry.output_shape)
    return y if bias is None else y + bias


def method(name):
    """jaxdw's method of that name."""

    def compute(x, kernel, bias, geometry, precision):
        return jaxdw.depthwise_conv(
            x,
            kernel,
            bias,
            strides=geometry.strides,
            padding=_words(geometry),
            kernel_dilation=geometry.kernel_dilation,
            input_dilation=geometry.input_dilation,
            method=name,
            precision=precision,
        )

    return compute


def _words(geometry):
    return geometry.padding if geometry.padding_mode == "zeros" else geometry.padding_mode.upper()


def _algorithm(compute, roundings: int, about: str) -> Algorithm:
    def arithmetic(case: Case, *, dtype: str, jit: str, precision: str) -> Arithmetic:
        return declared(
            case,
            dtype,
            flushes_subnormals=True,
            output_roundings=roundings if case.bias is not None else 1,
        )

    return Algorithm(functools.partial(run, compute), arithmetic, about)


ALGORITHMS = {
    "grouped": _algorithm(grouped, 2, "lax.conv_general_dilated with one group a channel"),
    "patches": _algorithm(method("patches"), 1, "lax.conv_general_dilated_patches, then einsum"),
    "taps": _algorithm(method("taps"), 1, "shifted multiply-add in raster order"),
}


def user_algorithm(name: str, function: Callable[..., jax.Array]) -> Algorithm:
    """A user's function of arrays, channels last: x `(*batch, *spatial, C)`, kernel `(*kernel_size, 1, C*M)`, bias."""

    def compute(x, kernel, bias, geometry, precision):
        del precision  # the function's own business
        return user.call(name, function, geometry.output_shape, x, kernel, bias)

    return _algorithm(compute, 2, name)


def environment() -> dict[str, str]:
    """What may change JAX's bits here."""
    return {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "jaxdw": jaxdw.__version__,
        "jax backend": jax.default_backend(),
        "jax devices": ", ".join(str(d) for d in jax.devices()),
        "jax default matmul precision": str(jax.config.jax_default_matmul_precision),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
