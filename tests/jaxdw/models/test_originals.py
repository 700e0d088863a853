"""MobileNets against the PyTorch networks they are named after: shapes, logits, statistics of a step of training.

Each run draws some of the networks; the full run takes all, except for variants in training.
"""

import collections
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdw.models
from bridge.weights import to_flax
from tests.jaxdw.models.originals import ORIGINALS, VARIANTS, torch, with_random_values
from tests.jaxdw.models.propagated import mixture, propagated

#: For each test, how many originals and how many variants are drawn; where none are, the full run takes none either.
DRAWN = {
    "test_parameters_and_outputs_have_the_shapes_of_the_original": (1, 1),
    "test_logits_are_those_of_the_original": (1, 1),
    "test_a_step_of_training_leaves_the_statistics_of_the_original": (1, 0),
}

CLASSES = 3


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        draw, counts = random.Random(metafunc.config.option.seed), DRAWN[metafunc.function.__name__]
        names = [
            name
            for table, count in zip((ORIGINALS, VARIANTS), counts)
            for name in (table if metafunc.config.option.full and count else draw.sample(sorted(table), count))
        ]
        metafunc.parametrize("name", names)


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small leave threads of PyTorch waiting for each other: 20 times as slow where others work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def original(name):
    return (ORIGINALS | VARIANTS)[name]


def abstract(name, classes, **options):
    """The network here, with shapes and no values."""
    make, options = getattr(jaxdw.models, original(name).name), {**original(name).options, **options}
    return nnx.eval_shape(lambda: make(classes, rngs=nnx.Rngs(0), **options))


def sizes(arrays):
    """How often each shape occurs, whatever the order of its axes, without axes of size one."""
    return collections.Counter(tuple(sorted(n for n in a.shape if n > 1)) for a in arrays)


def test_parameters_and_outputs_have_the_shapes_of_the_original(name):
    with torch.device("meta"):
        theirs = original(name).make(1000).eval()
    ours = abstract(name, 1000)
    ours.eval()
    parameters = jax.tree.leaves(nnx.state(ours, nnx.Param))
    statistics = jax.tree.leaves(nnx.state(ours, nnx.BatchStat))
    assert sum(math.prod(p.shape) for p in parameters) == sum(p.numel() for p in theirs.parameters())
    assert sizes(parameters) == sizes(theirs.parameters())
    assert sizes(statistics) == sizes(buffer for buffer in theirs.buffers() if buffer.ndim)
    for resolution in (96, 224):
        images = torch.empty(2, 3, resolution, resolution, device="meta")
        x = jax.ShapeDtypeStruct((2, resolution, resolution, 3), jnp.float32)
        features = nnx.eval_shape(lambda model, x: model.features(x), ours, x)
        n, c, h, w = original(name).features(theirs, images).shape
        assert features.shape == (n, h, w, c)
    assert nnx.eval_shape(lambda model, x: model.classify(x), ours, features).shape == (2, 1000)


def test_logits_are_those_of_the_original(name, seed, x64):
    theirs = with_random_values(original(name).make(CLASSES), seed).eval()
    images = np.random.default_rng(seed).normal(size=(1, 33, 24, 3))
    expected, _ = propagated(theirs, channels_first(images))

    ours = abstract(name, CLASSES, param_dtype=jnp.float64)
    ours.eval()
    nnx.update(ours, to_flax(theirs, ours).weights)
    logits = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(images))

    difference = np.abs(np.asarray(logits) - expected.value.numpy())
    assert (difference <= expected.bound.numpy()).all()


def test_a_step_of_training_leaves_the_statistics_of_the_original(name, seed, full, x64):
    theirs = with_random_values(original(name).make(CLASSES), seed).train()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    images = np.random.default_rng(seed).normal(size=(3, 17, 24, 3))
    ours = abstract(name, CLASSES, param_dtype=jnp.float64, dropout=0.0)
    weights, manifest = to_flax(theirs, ours)
    nnx.update(ours, weights)
    with jax.numpy_dtype_promotion("standard"):  # Flax takes statistics in "at least float32" by promotion
        logits = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(images))

    paths = {moved.torch.name: moved.flax.name for moved in manifest.moved}
    buffers = {name: buffer for name, buffer in theirs.named_buffers() if name in paths}
    some = buffers if full else random.Random(seed).sample(sorted(buffers), 4)
    expected, bounds = propagated(theirs, channels_first(images), some)
    assert (np.abs(np.asarray(logits) - expected.value.numpy()) <= expected.bound.numpy()).all()
    statistics = {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(ours, nnx.BatchStat))
    }
    assert set(statistics) == {paths[name] for name in buffers}
    for name, bound in bounds.items():
        mixed = mixture(len(buffers[name])).numpy()
        assert abs(statistics[paths[name]] @ mixed - buffers[name].numpy() @ mixed) <= bound.item(), name


def channels_first(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
