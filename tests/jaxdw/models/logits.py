"""Logits of the four networks in the arithmetic "jaxdw", from parameters that any NumPy draws alike."""

import hashlib
import math
import os
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdw import models

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")


def numbers(rng, shape):
    """Numbers in [-1, 1) from random bits, not by functions whose last bits NumPy may change."""
    return rng.integers(-(2**20), 2**20, shape).astype(np.float64) * 2.0**-20


def network(name, **options):
    """A small network in inference, and images for it."""
    rng = np.random.default_rng(20261128)
    model = nnx.eval_shape(lambda: getattr(models, name)(10, width=0.35, rngs=nnx.Rngs(0), **options))
    state = nnx.state(model)
    for path, variable in sorted(nnx.to_flat_state(state), key=lambda item: tuple(map(str, item[0]))):
        kind, shape = path[-1], variable.shape
        drawn = numbers(rng, shape)
        if kind == "kernel":  # variance 2 / terms, about: networks that neither vanish nor grow
            drawn *= 2.0 ** round(math.log2(math.sqrt(6 / math.prod(shape[:-1]))))
        elif kind in ("var", "scale"):
            drawn = 1 + drawn / 2
        elif kind in ("mean", "bias"):
            drawn /= 4
        variable.set_value(jnp.asarray(drawn.astype(variable.dtype)))
    nnx.update(model, state)
    model.eval()
    return model, jnp.asarray(numbers(rng, (3, 64, 64, 3)), jnp.float32)


@nnx.jit
def run(model, images):
    return model(images)


def digest(name):
    """The SHA-256 of the logits."""
    model, images = network(name, arithmetic="jaxdw")
    return hashlib.sha256(np.asarray(run(model, images)).tobytes()).hexdigest()


if __name__ == "__main__":
    if "alone" in sys.argv and hasattr(os, "sched_setaffinity"):  # before JAX starts threads: there is one then
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for each in [name for name in NETWORKS if name in sys.argv] or NETWORKS:
        print(each, digest(each))
