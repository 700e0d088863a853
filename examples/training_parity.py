"""Train the same small MobileNetV2 in PyTorch and in Flax for ten steps, with the same weights, batches and SGD.

At the first step each convolution differs by rounding only. The program prints how the difference grows step by step.

python examples/training_parity.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import bridge
import jaxdw.models
from bridge.libraries import import_library
from bridge.model.gradients import gradient_parity

torchvision = import_library("torchvision")  # also beside a PyTorch for which it was not built

WIDTH, CLASSES, RATE = 0.25, 5, 0.001


def pair(seed, dtype="float32"):
    """Return both models in training mode, without dropout, and the manifest of their weights."""
    torch.manual_seed(seed)
    theirs = torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=WIDTH, dropout=0.0)
    theirs = theirs.to(getattr(torch, dtype)).train()
    options = {"width": WIDTH, "dropout": 0.0, "param_dtype": jnp.dtype(dtype)}
    ours = nnx.eval_shape(lambda: jaxdw.models.mobilenet_v2(CLASSES, rngs=nnx.Rngs(0), **options))
    weights, manifest = bridge.to_flax(theirs, ours)
    nnx.update(ours, weights)
    return theirs, ours, manifest


def batches(seed, steps, dtype="float32", count=8, size=64):
    """Yield images (count, size, size, 3) and classes, the same for both models."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield rng.standard_normal((count, size, size, 3)).astype(dtype), rng.integers(0, CLASSES, count)


@nnx.jit
def step(model, optimizer, images, labels):
    """Take one step of SGD in Flax, and return the loss before it."""

    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(theirs, ours, data):
    """Yield for each step both losses, and the `divergence` after it."""
    sgd = torch.optim.SGD(theirs.parameters(), RATE)
    optimizer = nnx.Optimizer(ours, optax.sgd(RATE), wrt=nnx.Param)
    for images, labels in data:
        sgd.zero_grad()
        logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        sgd.step()
        our_loss = step(ours, optimizer, jnp.asarray(images), jnp.asarray(labels))
        yield loss.item(), float(our_loss), divergence(theirs, ours)


def divergence(theirs, ours):
    """Return ||JAX - PyTorch|| / ||PyTorch|| of all parameters and statistics."""
    expected = nnx.to_flat_state(bridge.to_flax(theirs, ours).weights)
    state = dict(nnx.to_flat_state(nnx.state(ours)))
    pairs = [(np.asarray(state[path][...], float), np.asarray(variable[...], float)) for path, variable in expected]
    distance = sum(((a - b) ** 2).sum() for a, b in pairs)
    return float(np.sqrt(distance / sum((b**2).sum() for _, b in pairs)))


def main():
    theirs, ours, manifest = pair(seed=0)
    images, labels = next(batches(1, 1))
    print("gradients of the first step, on PyTorch's own activations\n")
    print(f"{'convolution':26} {'kind':11}  {'dx':9}  {'dkernel':9}")
    found = gradient_parity(theirs, ours, images, labels, manifest)
    for layer in found:
        dx = layer.dx.verdict if layer.dx else ""
        print(f"{layer.name:26} {layer.kind:11}  {dx:9}  {layer.dkernel.verdict:9}")
    theirs, ours, _ = pair(seed=0)
    print(f"\n{'step':4}  {'PyTorch loss':>12}  {'JAX loss':>12}  {'divergence':>12}")
    for number, (loss, our_loss, distance) in enumerate(train(theirs, ours, batches(1, 10))):
        print(f"{number:4}  {loss:12.7f}  {our_loss:12.7f}  {distance:12.1e}")
    return 0 if all(layer.verdict.passes for layer in found) else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    raise SystemExit(main())
