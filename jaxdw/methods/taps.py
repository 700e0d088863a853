"""taps: shifted multiply-add in raster order, in the order of PyTorch's convolution on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry
from jaxdw.windows import pad, tap_slices


def taps(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, precision: PrecisionPair
) -> jax.Array:
    """y = fma(x_n, w_n, ... fma(x_1, w_1, start)), start being the bias, or 0 and the bias added last.

    XLA:CPU contracts each multiply and add to one FMA. For float32 in PyTorch's contiguous layout and at least two
    channels the order is that of `F.conv2d` (oneDNN), and so are the bits, but for two things: XLA:CPU flushes
    subnormal numbers, and a weight that is infinite or NaN counts under padding, which oneDNN skips.
    `precision` has nothing to relax here: products and sums are elementwise and never rounded below their dtype.
    """
    del precision
    # Without the barrier XLA:CPU fuses the padding into every tap, and computes it again for each.
    padded = lax.optimization_barrier(pad(x, geometry))
    weights = kernel.reshape(geometry.taps, geometry.channels, geometry.multiplier)
    biases = None if bias is None else bias.reshape(geometry.channels, geometry.multiplier)
    outputs = [
        _chain(padded, weights[..., m], None if biases is None else biases[:, m], geometry)
        for m in range(geometry.multiplier)
    ]
    return outputs[0] if len(outputs) == 1 else jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def bias_comes_first(geometry: Geometry) -> bool:
    """Whether PyTorch's convolution on CPU starts its sum from the bias; elsewhere it adds the bias at the end.

    oneDNN's depthwise kernel starts from the bias. It does not serve a channel multiplier, three spatial axes, or
    padding as wide as the dilated kernel; the kernels that PyTorch takes then add the bias last. Seen with torch 2.13
    on x86-64; `jaxdw doctor` checks it where it runs. With a multiplier and few output positions PyTorch's matrix
    product adds in yet another order, which this method does not follow.
    """
    padding = geometry.symmetric_padding or (0,) * geometry.rank  # what `padding=` cannot say is padded beforehand
    return (
        geometry.multiplier == 1
        and geometry.rank < 3
        and all(amount < span for amount, span in zip(padding, geometry.spans))
    )


def _chain(padded: jax.Array, weights: jax.Array, bias: jax.Array | None, geometry: Geometry) -> jax.Array:
    """One output channel an input channel: weights `(taps, C)`, bias `(C,)`."""
    first = bias is not None and bias_comes_first(geometry)
    # A constant zero start would be folded away, and then the first product, not the second, could be the one that
    # enters the FMA unrounded. The compiler cannot know that this is zero; a NaN weight makes the sum NaN anyway.
    start = bias if first else jnp.where(weights[0] != weights[0], weights[0], jnp.zeros_like(weights[0]))
    y = jnp.broadcast_to(start, (*geometry.batch, *geometry.output_spatial, geometry.channels))
    for window, weight in zip(tap_slices(padded, geometry, geometry.output_spatial), weights):
        y = y + window * jnp.broadcast_to(weight, y.shape)
    return y if first or bias is None else y + jnp.broadcast_to(bias, y.shape)
