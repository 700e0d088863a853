"""Train the same small MobileNetV2 in PyTorch and in Flax for ten steps: same weights, batches, and SGD with momentum.

With each framework's own arithmetic every convolution differs by rounding only, and the difference grows step by step.
With the arithmetic of jaxdw in both, every parameter, momentum and running statistic has the same bits after each step.

python examples/training_parity.py
"""

import collections
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import bridge
import jaxdw.models
from bridge import torch_ops
from bridge.libraries import import_library
from jaxdw.training import cross_entropy, sgd

torchvision = import_library("torchvision")  # also beside a PyTorch for which it was not built

WIDTH, CLASSES, RATE, MOMENTUM, DECAY = 0.25, 5, 0.001, 0.9, 1e-4


def pair(seed, dtype="float32", arithmetic=None):
    """Return both models in training mode, without dropout, and the manifest of their weights."""
    torch.manual_seed(seed)
    theirs = torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=WIDTH, dropout=0.0)
    theirs = theirs.to(getattr(torch, dtype)).train()
    options = {"width": WIDTH, "dropout": 0.0, "param_dtype": jnp.dtype(dtype), "arithmetic": arithmetic}
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
def step(model, momenta, images, labels):
    """Take one step of SGD in Flax; return the loss before it, and the momenta after it."""
    loss, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(images), labels))(model)
    parameters = nnx.state(model, nnx.Param)
    options = {"learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    parameters, momenta = sgd(parameters, momenta, gradients, **options)
    nnx.update(model, parameters)
    return loss, momenta


def train(theirs, ours, data, arithmetic=None):
    """Yield for each step both losses, the `divergence`, and how many numbers differ in how many, after it."""
    options = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    own = arithmetic is None
    optimizer = (torch.optim.SGD if own else torch_ops.SGD)(theirs.parameters(), **options)
    momenta = jax.tree.map(jnp.zeros_like, nnx.state(ours, nnx.Param))
    for images, labels in data:
        optimizer.zero_grad()
        with contextlib.nullcontext() if own else torch_ops.jaxdw_arithmetic():
            logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        our_loss, momenta = step(ours, momenta, jnp.asarray(images), jnp.asarray(labels))
        pairs = states(theirs, ours, optimizer, momenta)
        different = sum(int((a.view(np.uint8) != b.view(np.uint8)).any()) for a, b in pairs)
        yield loss.item(), float(our_loss), divergence(pairs), different, len(pairs)


def states(theirs, ours, optimizer, momenta):
    """Return pairs of arrays (JAX, PyTorch): all parameters, running statistics and momenta."""
    moving = {name: optimizer.state[p]["momentum_buffer"] for name, p in theirs.named_parameters()}
    of_momenta = {**theirs.state_dict(), **moving}
    pairs = []
    for tensors, arrays in ((theirs.state_dict(), nnx.state(ours)), (of_momenta, momenta)):
        numbers = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        expected = dict(nnx.to_flat_state(bridge.to_flax(numbers, ours).weights))
        found = dict(nnx.to_flat_state(arrays))
        paths = [path for path in expected if path in found]
        pairs += [tuple(np.ascontiguousarray(state[path][...]) for state in (found, expected)) for path in paths]
    return pairs


def divergence(pairs):
    """Return ||JAX - PyTorch|| / ||PyTorch|| of all arrays."""
    distance = sum(((a.astype(float) - b) ** 2).sum() for a, b in pairs)
    return float(np.sqrt(distance / sum((b.astype(float) ** 2).sum() for _, b in pairs)))


def main():
    theirs, ours, manifest = pair(seed=0)
    images, _ = next(batches(1, 1, count=2, size=32))
    found = bridge.model_parity(theirs, ours, images, manifest, gradients=True, training=True)
    print("operations of the forward and the backward pass, on PyTorch's own activations and incoming gradients\n")
    for verdict, count in collections.Counter(layer.verdict for layer in found.layers).items():
        print(f"{verdict:9} {count:4}")
    for layer in found.layers:
        if layer.is_wrong:
            print(f"{layer.name}: {layer.cause}")
    same = True
    for arithmetic, title in ((None, "each framework's own arithmetic"), ("jaxdw", "arithmetic of jaxdw in both")):
        theirs, ours, _ = pair(seed=0, arithmetic=arithmetic)
        print(
            f"\n{title}\n\n{'step':4}  {'PyTorch loss':>12}  {'JAX loss':>12}  {'divergence':>12}  arrays that differ"
        )
        for number, (loss, our_loss, distance, different, arrays) in enumerate(
            train(theirs, ours, batches(1, 10), arithmetic)
        ):
            print(f"{number:4}  {loss:12.7f}  {our_loss:12.7f}  {distance:12.1e}  {different} of {arrays}")
            same &= arithmetic is None or (different == 0 and loss == our_loss)
    return 0 if same and found.verdict.passes else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    raise SystemExit(main())
