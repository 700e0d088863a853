"""Work on the windows: keep the largest taps of each window, quantise each window, and filter by the median.

python examples/windows.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxdw
import jaxdw.nnx

images = jax.random.normal(jax.random.key(0), (2, 32, 32, 8))


def largest(windows, keep=4):
    """Keep the `keep` greatest magnitudes of each window and set the rest to zero; windows are (..., 3, 3, C)."""
    taps = windows.reshape(*windows.shape[:-3], 9, windows.shape[-1])
    threshold = jnp.sort(jnp.abs(taps), axis=-2)[..., -keep, :][..., None, :]
    return jnp.where(jnp.abs(taps) >= threshold, taps, 0.0).reshape(windows.shape)


def to_int8(windows):
    """Round each window to 255 levels of its own range; the gradient passes through unchanged."""
    scale = jnp.max(jnp.abs(windows), axis=(-3, -2), keepdims=True) / 127
    levels = jnp.round(windows / jnp.where(scale > 0, scale, 1.0)) * scale
    return windows + jax.lax.stop_gradient(levels - windows)


plain = jaxdw.nnx.DepthwiseConv(8, (3, 3), rngs=nnx.Rngs(0))
for name, window_fn in {"top 4 of 9": largest, "int8": to_int8}.items():
    layer = jaxdw.nnx.DepthwiseConv(8, (3, 3), window_fn=window_fn, rngs=nnx.Rngs(0))
    change = jnp.abs(layer(images) - plain(images)).max()
    print(f"{name:10}  output {layer(images).shape}, at most {change:.3f} from the plain layer")

# Without a kernel: any function of the windows, in bounded memory for any size of the image.
median = jaxdw.map_windows(lambda w: jnp.median(w, axis=(-3, -2)), images, (5, 5), rows_per_step=4)
print(f"{'median 5x5':10}  output {median.shape}, standard deviation {images.std():.2f} -> {median.std():.2f}")
