"""Train a small Flax model with the layer for a few steps: are stripes horizontal or vertical?

python examples/train.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdw.nnx


class Block(nnx.Module):
    """A depthwise and a pointwise convolution, as in MobileNet."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs):
        self.depthwise = jaxdw.nnx.DepthwiseConv(features, (3, 3), strides=2, rngs=rngs)
        self.pointwise = nnx.Linear(features, out, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.pointwise(nnx.relu(self.depthwise(x))))


class Classifier(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(4, 16, rngs=rngs), Block(16, 32, rngs=rngs)])
        self.head = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def batch(key):
    """Return images (32, 16, 16, 4) of noisy stripes, and labels: 1 for vertical, 0 for horizontal."""
    noise, phase, kind = jax.random.split(key, 3)
    vertical = jax.random.bernoulli(kind, shape=(32,))
    wave = jnp.sin(jnp.arange(16.0) * 2 + jax.random.uniform(phase, (32, 1), maxval=6.0))
    stripes = jnp.where(vertical[:, None, None], wave[:, None, :], wave[:, :, None])
    return stripes[..., None] + 0.5 * jax.random.normal(noise, (32, 16, 16, 4)), vertical.astype(jnp.int32)


model = Classifier(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


keys = jax.random.split(jax.random.key(1), 60)
for number, key in enumerate(keys):
    loss = step(model, optimizer, *batch(key))
    if number % 10 == 0:
        print(f"step {number:2}  loss {loss:.3f}")
images, labels = batch(jax.random.key(2))
print(f"accuracy on new images: {(model(images).argmax(-1) == labels).mean():.2f}")
