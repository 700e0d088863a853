"""MobileNets here against their originals: shapes, values, statistics."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdw.models
from bridge.weights import to_flax
from tests.jaxdw.models.originals import ORIGINALS, VARIANTS, Original, torch, with_random_values
from tests.jaxdw.models.propagated import mixture, propagated


def abstract(original: Original, num_classes: int, **options):
    """The network here, with shapes and no values."""
    make = getattr(jaxdw.models, original.name)
    options = {**original.options, **options}
    return nnx.eval_shape(lambda: make(num_classes, rngs=nnx.Rngs(0), **options))


def sizes(arrays):
    """How often each shape occurs, whatever its order of axes and axes of size one."""
    return collections.Counter(tuple(sorted(n for n in a.shape if n > 1)) for a in arrays)


@pytest.mark.parametrize("name", ORIGINALS | VARIANTS)
def test_parameters_and_output_shapes_are_those_of_the_original(name):
    original = (ORIGINALS | VARIANTS)[name]
    with torch.device("meta"):
        theirs = original.make(1000).eval()
    ours = abstract(original, 1000)
    ours.eval()
    parameters = jax.tree.leaves(nnx.state(ours, nnx.Param))
    statistics = jax.tree.leaves(nnx.state(ours, nnx.BatchStat))
    assert sizes(parameters) == sizes(theirs.parameters())
    assert sizes(statistics) == sizes(b for b in theirs.buffers() if b.ndim)
    assert sum(math.prod(p.shape) for p in parameters) == sum(p.numel() for p in theirs.parameters())
    for resolution in (96, 224):
        images = torch.empty(2, 3, resolution, resolution, device="meta")
        x = jax.ShapeDtypeStruct((2, resolution, resolution, 3), jnp.float32)
        n, c, h, w = original.features(theirs, images).shape
        assert nnx.eval_shape(lambda model, x: model.features(x), ours, x).shape == (n, h, w, c)
    assert nnx.eval_shape(lambda model, x: model(x), ours, x).shape == (2, 1000)


@pytest.mark.parametrize("name", ORIGINALS | VARIANTS)
def test_logits_are_those_of_the_original(name, seed, x64):
    original = (ORIGINALS | VARIANTS)[name]
    theirs = with_random_values(original.make(5), seed).eval()
    images = np.random.default_rng(seed).normal(size=(1, 33, 40, 3))
    expected, _ = propagated(theirs, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    ours = abstract(original, 5, param_dtype=jnp.float64)
    ours.eval()
    nnx.update(ours, to_flax(theirs, ours).weights)
    logits = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(images))
    difference = np.abs(np.asarray(logits) - expected.value.numpy())
    print((difference / expected.bound.numpy()).max(), expected.bound.max(), np.abs(logits).max())
    assert (difference <= expected.bound.numpy()).all()
