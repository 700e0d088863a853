"""The depthwise convolution: check the call, look the method up, run it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax import lax

from jaxdw import _arrays, sharding
from jaxdw import epilogue as epilogues
from jaxdw.call import Call
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Padding
from jaxdw.methods import METHODS, check_method


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
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Depthwise convolution: output channel `c*M + m` is input channel c correlated with `kernel[..., 0, c*M + m]`.

    Args:
      x: `(*batch, *spatial, C)`, float16, bfloat16, float32 or float64; any number of batch axes, 1 to 3 spatial axes.
      kernel: `(*kernel_size, 1, C*M)`, the shape and order of `flax.nnx.Conv(feature_group_count=C)`.
      bias: `(C*M,)` or None.
      strides: positive int or one per spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (1-D), an int, or one int or
        (low, high) pair per spatial axis; negative numbers crop. PyTorch's `padding=1` is the int 1, not "SAME".
      kernel_dilation: positive int or one per spatial axis.
      input_dilation: positive int or one per spatial axis; above 1 it needs explicit padding or "VALID".
      method: "taps" (PyTorch's order of the sum on CPU, without a channel multiplier), "rows" (faster for large
        kernels), "pallas" (as "taps", by hand-written kernels for NVIDIA GPUs and TPUs, interpreted on a CPU), "fft"
        (fast Fourier transforms: their time does not grow with the kernel, and each output has the error, the NaN and
        the infinities of its whole image and channel), "patches", "grouped", or "auto". `jaxdw.methods` has the table.
        "auto" is the fastest known with an order of the sum where the program runs: on a CPU without compiled kernels
        "rows" from 49 taps on, else "taps".
      precision: as for `lax.conv_general_dilated`. It matters on GPU and TPU, for "patches" and "grouped";
        the others always compute at full precision.
      preferred_element_type: dtype to accumulate and return in, no narrower than the arrays'; None: the arrays' own.
      epilogue: scale and shift (batch normalization), residual and activation of the result, or None. The compiled
        kernels compute them in the same pass, with the same bits.

    If the type of x or of the kernel says that it is sharded over explicit mesh axes, the computation is sharded in the
    same way: see `jaxdw.sharding`. Over automatic axes the compiler decides.

    Under `jax.export` batch and spatial sizes may be symbolic. With a symbolic spatial size "pallas", "fft", "patches"
    and "grouped" are "taps".

    float16 and bfloat16 are added in float32, bias included, and rounded once at the end.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it, its value and what was expected.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> depthwise_conv(x, jnp.ones((3, 3, 1, 1)), padding="VALID")[0, :, :, 0]
    Array([[45., 54.],
           [81., 90.]], dtype=float32)
    """
    check_method(method)
    call = Call.of(
        x,
        kernel,
        bias,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return compute(call, method, epilogue)


def compute(call: Call, method: str, epilogue: Epilogue | None) -> jax.Array:
    """Return the convolution of a call by a checked method, on one device or as its arrays are sharded."""
    epilogue = epilogues.checked(epilogue, call)
    y = call.without_products()
    if y is not None:
        return y if epilogue is None else epilogue.apply(y.astype(call.wide), call.geometry.rank, call.result)
    if _arrays.is_sharded(call.x) or _arrays.is_sharded(call.kernel):
        return sharding.run(call, method, epilogue=epilogue)
    return _run(call.promoted(), epilogue, method=method)


# Compiled even when called eagerly: the multiply and add of a method must reach the compiler together.
@functools.partial(jax.jit, static_argnames="method")
def _run(call: Call, epilogue: Epilogue | None, *, method: str) -> jax.Array:
    function = None if method == "auto" else METHODS[method].function
    if function is not None and not call.geometry.has_symbolic_axes:  # lax has no gradients of unknown sizes
        if epilogue is None:
            return function(call)
        y = function(dataclasses.replace(call, result=call.wide))
        return epilogue.apply(y, call.geometry.rank, call.result)
    method = method if function is None else "taps"
    return epilogues.conv(*call.arrays, call.geometry, method, call.result, epilogue)
