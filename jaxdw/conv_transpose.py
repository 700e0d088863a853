"""The transposed depthwise convolution: one with input dilation and a flipped kernel, that adds from the last tap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import export, lax

from jaxdw import _arrays
from jaxdw.call import Call
from jaxdw.conv import compute
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Geometry, Padding, explicit_padding, per_axis
from jaxdw.methods import check_method
from jaxdw.padding import pad

#: The paddings that Flax's ConvTranspose has names for.
WORDS = ("SAME", "VALID", "CIRCULAR")


def depthwise_conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    kernel_dilation: int | Sequence[int] | None = 1,
    transpose_kernel: bool = True,
    method: str = "auto",
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Transposed depthwise convolution: the gradient by x of `depthwise_conv` with the same strides and padding.

    With integer padding it is PyTorch's `F.conv_transpose1d`, `2d` or `3d` with `groups=C`. Along each axis the result
    has `(n - 1) * stride - 2 * padding + kernel_dilation * (k - 1) + output_padding + 1` positions.

    Args:
      x: `(*batch, *spatial, C)`, float16, bfloat16, float32 or float64; any number of batch axes, 1 to 3 spatial axes.
      kernel: `(*kernel_size, 1, C*M)`. Output channel `c*M + m` reads input channel c. PyTorch's weight is
        `(C, M, *kernel_size)`; `bridge.to_flax` converts it.
      bias: `(C*M,)` or None.
      strides: positive int or one per spatial axis: the distance of outputs that neighbouring inputs reach.
      padding: one of these.
        An int, or one int or (low, high) pair per spatial axis: what is cut off the full result, as in PyTorch.
        Negative numbers add zeros.
        "SAME", "VALID" or "CIRCULAR": as in Flax's ConvTranspose. "SAME" and "CIRCULAR" return `n * stride` positions.
        Flax's own integers are something else: its `p` is `kernel_dilation * (k - 1) - p` here.
      output_padding: int or one per spatial axis: positions added at the end, smaller than the stride or the dilation.
      kernel_dilation: positive int or one per spatial axis.
      transpose_kernel: True: as in PyTorch, and in Flax with `transpose_kernel=True`. False: the kernel is flipped
        along its spatial axes, as in Flax with its default.
      method, precision, preferred_element_type, epilogue: as for `jaxdw.depthwise_conv`. "taps" adds the taps of the
        kernel in raster order and the bias last, as PyTorch does on CPU: docs/layers.md says where it has its bits.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it, its value and what was expected.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 10.0]).reshape(1, 2, 1)
    >>> depthwise_conv_transpose(x, jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1), strides=2)[0, :, 0]
    Array([ 1.,  2., 13., 20., 30.], dtype=float32)
    >>> depthwise_conv_transpose(x, jnp.ones((3, 1, 1)), strides=2, padding=1, output_padding=1).shape
    (1, 4, 1)
    """
    check_method(method)
    x, kernel = _arrays.as_array("x", x), _arrays.as_array("kernel", kernel)
    if not isinstance(transpose_kernel, bool):
        raise TypeError(f"`transpose_kernel` is {transpose_kernel!r}, expected True or False")
    rank = kernel.ndim - 2
    if not 1 <= rank <= 3 or x.ndim < rank + 1:  # an error that `Call` words
        strides = padding = 1
    elif isinstance(padding, str) and padding == "CIRCULAR":
        _, strides = transposed_padding(kernel.shape[:rank], strides, "VALID", output_padding, kernel_dilation)
        x, padding = _periodic(x, _spans(kernel.shape[:rank], kernel_dilation), strides, transpose_kernel)
    else:
        padding, strides = transposed_padding(kernel.shape[:rank], strides, padding, output_padding, kernel_dilation)
    call = Call.of(
        x,
        lax.rev(kernel, tuple(range(rank))) if transpose_kernel else kernel,
        bias,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=strides,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    call = dataclasses.replace(call, geometry=dataclasses.replace(call.geometry, from_last_tap=True))
    return compute(call, method, epilogue)


def transposed_padding(
    kernel_size: Sequence[int], strides: Any, padding: Any, output_padding: Any, kernel_dilation: Any
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Return what to pad the dilated x with, (low, high) per axis, and the strides, one per axis.

    The arguments are those of `depthwise_conv_transpose`; padding is not "CIRCULAR".

    >>> transposed_padding((3, 3), 2, 1, 1, 1)
    (((1, 2), (1, 2)), (2, 2))
    """
    rank = len(kernel_size)
    spans, steps = _spans(kernel_size, kernel_dilation), per_axis("strides", strides, rank)
    added = _output_padding(output_padding, padding, steps, per_axis("kernel_dilation", kernel_dilation, rank))
    if isinstance(padding, str):
        if padding not in WORDS:
            raise ValueError(
                f"`padding` is {padding!r}, expected one of {', '.join(WORDS)}, an int, or one int or (low, high) per "
                "axis"
            )
        return tuple(_padding_of_word(padding, span, stride) for span, stride in zip(spans, steps)), steps
    cut = explicit_padding(padding, rank, WORDS)
    return tuple((s - 1 - low, s - 1 - high + more) for s, (low, high), more in zip(spans, cut, added)), steps


def _spans(kernel_size: Sequence[int], kernel_dilation: Any) -> tuple[int, ...]:
    dilation = per_axis("kernel_dilation", kernel_dilation, len(kernel_size))
    return tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))


def padding_to_size(
    output_size: Any,
    x_shape: Sequence[int],
    kernel_size: Sequence[int],
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
) -> tuple[int, ...]:
    """Return the `output_padding` with which the result has this size, as PyTorch's layers take it.

    Args:
      output_size: one int per spatial axis.

    >>> padding_to_size((8,), (1, 4, 1), (3,), 2, 1, 1)
    (1,)
    """
    rank = len(kernel_size)
    if isinstance(padding, str):
        raise ValueError(
            f"`output_size` is {output_size!r} with `padding` {padding!r}, expected None: the word says it"
        )
    strides, dilation = per_axis("strides", strides, rank), per_axis("kernel_dilation", kernel_dilation, rank)
    wanted = per_axis("output_size", output_size, rank)
    cut = explicit_padding(padding, rank, WORDS)
    sizes = zip(x_shape[-rank - 1 : -1], kernel_size, strides, dilation, cut)
    least = tuple((n - 1) * s + (k - 1) * d + 1 - sum(pair) for n, k, s, d, pair in sizes)
    most = tuple(max(pair) - 1 for pair in zip(strides, dilation))
    added = tuple(size - a for size, a in zip(wanted, least))
    if any(map(export.is_symbolic_dim, added)) or not all(0 <= a <= m for a, m in zip(added, most)):
        greatest = tuple(a + m for a, m in zip(least, most))
        raise ValueError(f"`output_size` is {output_size!r}, expected from {least} to {greatest} for `x` of {x_shape}")
    return added


def _padding_of_word(word: str, span: int, stride: int) -> tuple[int, int]:
    """Return what `lax.conv_transpose` pads."""
    if word == "VALID":
        return span - 1, max(span, stride) - 1
    total = span + stride - 2
    low = span - 1 if stride > span - 1 else -(-total // 2)
    return low, total - low


def _output_padding(
    output_padding: Any, padding: Any, strides: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    added = per_axis("output_padding", output_padding, len(strides), smallest=0)
    if isinstance(padding, str) and any(added):
        raise ValueError(
            f"`output_padding` is {output_padding!r} with `padding` {padding!r}, expected 0: the word says how long "
            "the result is"
        )
    most = tuple(max(pair) - 1 for pair in zip(strides, dilation))
    if any(a > m for a, m in zip(added, most)):
        raise ValueError(
            f"`output_padding` is {output_padding!r}, expected at most {most}: less than the stride {tuple(strides)} "
            f"or the kernel dilation {tuple(dilation)} of its axis"
        )
    return added


def _periodic(
    x: jax.Array, spans: Sequence[int], strides: Sequence[int], transpose_kernel: bool
) -> tuple[jax.Array, tuple[tuple[int, int], ...]]:
    """Return x, repeated as far as the outputs of one period read it, and the padding after its dilation.

    Flax computes the full result of "VALID", puts it in the middle of an odd number of periods, and adds the periods.
    So output o of the period is position `o + cut` of the full result, modulo the period.
    """
    first, widths, padding = x.ndim - 1 - len(spans), [], []
    for size, span, stride in zip(x.shape[first:], spans, strides):
        if size == 0:
            raise ValueError(f"`x` has shape {x.shape} with 'CIRCULAR' padding, expected at least 1 on each axis")
        cut = (max(span - stride, 0) + transpose_kernel) // 2  # a whole number of periods away from Flax's
        before, after = max(0, (span - 1 - cut) // stride), (cut - 1) // stride + 1
        widths.append((before, after))
        low = span - 1 - cut - before * stride
        padding.append((low, span - 2 - low - (before + after - 1) * stride))
    repeated = Geometry.of_windows(x.shape, (1,) * len(spans))
    repeated = dataclasses.replace(repeated, padding=tuple(widths), padding_mode="circular")
    return pad(x, repeated), tuple(padding)
