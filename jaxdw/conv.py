"""depthwise_conv: check, choose a method, run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxdw import _arrays
from jaxdw.geometry import Geometry, Padding
from jaxdw.methods import METHODS, automatic


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    method: str = "auto",
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Depthwise convolution: output channel c*M + m is input channel c correlated with kernel[..., 0, c*M + m].

    Args:
      x: `(*batch, *spatial, C)`, float16, bfloat16, float32 or float64; any number of batch axes, 1 to 3 spatial axes.
      kernel: `(*kernel_size, 1, C*M)`, the shape and order of `flax.nnx.Conv(feature_group_count=C)`.
      bias: `(C*M,)` or None.
      strides: positive int or one a spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (1-D), an int, or one int or
        (low, high) pair a spatial axis; negative numbers crop. PyTorch's `padding=1` is the int 1, not "SAME".
      kernel_dilation: positive int or one a spatial axis.
      input_dilation: the same; above 1 it needs explicit padding or "VALID".
      method: "taps" (PyTorch's order of the sum on CPU, without a channel multiplier), "rows" (faster for large
        kernels), "pallas" (as "taps", by hand-written kernels for NVIDIA GPUs and TPUs, interpreted on a CPU),
        "patches", "grouped", or "auto": the fastest known where the program runs, which on a CPU is "taps" under 49
        taps and "rows" from there, on a TPU "pallas" or "taps" by the compiler's estimates, and elsewhere "taps".
      precision: as for `lax.conv_general_dilated`. It matters on GPU and TPU, for "patches" and "grouped";
        the others always compute at full precision.
      preferred_element_type: dtype to accumulate and return in, no narrower than the arrays'; None: the arrays' own.

    Where the type of x or of the kernel says that it is sharded, over explicit mesh axes, the work is shared out alike:
    see `jaxdw.sharding`. Over automatic axes the compiler decides.

    Under `jax.export` batch and spatial sizes may be symbolic. With a symbolic spatial size "pallas", "patches" and
    "grouped" are "taps".

    float16 and bfloat16 are summed, bias included, in float32 and rounded once at the end.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it, its value and what was expected.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> depthwise_conv(x, jnp.ones((3, 3, 1, 1)), padding="VALID")[0, :, :, 0]
    Array([[45., 54.],
           [81., 90.]], dtype=float32)
    """
    x, kernel = _arrays.as_array("x", x), _arrays.as_array("kernel", kernel)
    bias = None if bias is None else _arrays.as_array("bias", bias)
    _arrays.check_choice("method", method, ("auto", *METHODS))
    precision = _arrays.precision_pair(precision)
    geometry = Geometry.of(
        x.shape,
        kernel.shape,
        None if bias is None else bias.shape,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
    )
    (x, kernel, bias), result = _arrays.promote({"x": x, "kernel": kernel, "bias": bias}, preferred_element_type)
    if 0 in geometry.output_shape:
        return jnp.zeros(geometry.output_shape, result)
    if 0 in geometry.x_shape:  # every tap reads padding
        start = jnp.zeros((), result) if bias is None else bias.astype(result)
        return jnp.broadcast_to(start, geometry.output_shape)
    if _arrays.is_sharded(x) or _arrays.is_sharded(kernel):
        from jaxdw import sharding  # which builds on this module

        return sharding.depthwise_conv(
            x,
            kernel,
            bias,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            input_dilation=input_dilation,
            method=method,
            precision=precision,
            preferred_element_type=result,
        )
    if geometry.has_symbolic_axes and method in ("patches", "grouped"):  # lax has no gradients of unknown sizes
        method = "taps"
    # Compiled here even when called eagerly: the multiply and add of a method must reach the compiler together.
    return _run(x, kernel, bias, geometry=geometry, method=method, precision=precision, result=result)


@functools.partial(jax.jit, static_argnames=("geometry", "method", "precision", "result"))
def _run(x, kernel, bias, *, geometry, method, precision, result):
    return METHODS.get(method, automatic)(x, kernel, bias, geometry, precision, result)
