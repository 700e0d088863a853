"""The behaviour of a network besides its numbers: modes, gradients, options, messages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdw import epilogue, native
from jaxdw.models import (
    Architecture,
    Block,
    Conventions,
    MobileNet,
    mobilenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
    with_arithmetic,
)
from jaxdw.models.blocks import relu6
from jaxdw.nnx import DepthwiseConv

#: Every kind of layer, and little to compile.
SMALL = Architecture(
    (
        Block(8, 8, 8, relu6, last_activation=relu6),
        Block(8, 16, 8, epilogue.relu, kernel=5, stride=2, squeeze=8),
        Block(8, 16, 8, epilogue.hard_swish, dilation=2),
    ),
    epilogue.hard_swish,
    head=16,
    hidden=12,
)
CONVENTIONS = Conventions("SAME", bn_epsilon=1e-3, bn_momentum=0.9, dropout=0.5)
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)


def abstract(num_classes=5, **changes):
    """The small network, with shapes and no values."""
    conventions = dataclasses.replace(CONVENTIONS, **changes)
    return nnx.eval_shape(lambda: MobileNet(SMALL, conventions, num_classes=num_classes, rngs=nnx.Rngs(0)))


@pytest.fixture
def model(seed):
    """The small network, with positive values; drawn by NumPy, since drawing by JAX compiles for every shape."""
    model, rng = abstract(), np.random.default_rng(seed)

    def draw(leaf):  # averages, so that the gates stay below the 3 where they saturate
        return jnp.asarray(rng.uniform(0.5, 1, leaf.shape) / math.prod(leaf.shape[:-1]), leaf.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def statistics(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_training_updates_the_statistics_and_every_parameter_has_a_gradient(model):
    gradient = nnx.jit(nnx.grad(lambda model, x, rngs: (model(x, rngs=rngs) ** 2).sum()))
    model.train()
    before = statistics(model)
    gradients = gradient(model, IMAGES, nnx.Rngs(1))
    after = statistics(model)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all() and np.any(gradient[...]), path


def test_evaluation_repeats_itself_and_leaves_the_statistics(model):
    model.eval()
    run, before = nnx.jit(lambda model, x: model(x)), statistics(model)
    assert np.array_equal(run(model, IMAGES), run(model, IMAGES))
    assert equal(before, statistics(model))


def test_there_are_parameters_and_statistics_and_no_other_state(model):
    kinds = {type(variable) for _, variable in nnx.to_flat_state(nnx.state(model))}
    assert kinds == {nnx.Param, nnx.BatchStat}


def test_without_classes_the_model_returns_what_the_classifier_would_read():
    model = abstract(num_classes=0)
    model.eval()
    assert nnx.eval_shape(lambda model, x: model(x), model, IMAGES).shape == (4, 12)


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
def test_any_number_of_batch_axes(batch):
    model = abstract()
    model.eval()
    x = jax.ShapeDtypeStruct((*batch, 20, 24, 3), jnp.float32)
    assert nnx.eval_shape(lambda model, x: model(x), model, x).shape == (*batch, 5)
    assert nnx.eval_shape(lambda model, x: model.features(x), model, x).shape == (*batch, 5, 6, 16)


def test_bfloat16_computes_narrow_and_keeps_parameters_and_statistics():
    def run(model, x):
        with jax.numpy_dtype_promotion("standard"):  # Flax averages statistics and parameters of different dtypes
            return model(x), nnx.state(model)

    model = abstract(dtype=jnp.bfloat16, dropout=0.0)
    logits, state = nnx.eval_shape(run, model, IMAGES)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make", [mobilenet_v1, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large])
def test_every_depthwise_layer_takes_the_method(make):
    model = nnx.eval_shape(lambda: make(method="patches", rngs=nnx.Rngs(0)))
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, DepthwiseConv)]
    assert len(layers) == len(model.blocks) and {layer.method for layer in layers} == {"patches"}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mobilenet_v1, {"like": "torchvision"}, r"`like` is 'torchvision', expected one of timm, transformers"),
        (mobilenet_v3_large, {"like": "keras"}, r"`like` is 'keras', expected one of torchvision, timm"),
        (mobilenet_v2, {"width": 0}, r"`width` is 0, expected a positive factor"),
        (mobilenet_v2, {"width": float("nan")}, r"`width` is nan, expected a positive factor"),
        (mobilenet_v3_small, {"output_stride": 12}, r"`output_stride` is 12, expected one of 2, 4, 8, 16, 32"),
        (mobilenet_v2, {"num_classes": -1}, r"`num_classes` is -1, expected 0 or more"),
        (mobilenet_v2, {"padding": "VALID"}, r"`padding` is 'VALID', expected one of SYMMETRIC, SAME"),
        (mobilenet_v2, {"dilation_starts": 3}, r"`dilation_starts` is 3, expected one of here, next"),
        (mobilenet_v2, {"method": "winograd"}, r"`method` is 'winograd', expected one of auto, "),
    ],
)
def test_an_argument_that_does_not_fit_is_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (16, 3), (2, 16, 16, 1)])
def test_images_that_do_not_fit_are_named(model, shape):
    with pytest.raises(ValueError, match=r"`x` has shape .*, expected \(\*batch, H, W, 3\)"):
        model(jnp.ones(shape))


def test_training_on_one_value_a_channel_is_refused():
    model = abstract()
    with pytest.raises(ValueError, match=r"`x` has shape \(1, 1, 1, 8\), expected more than one value per channel"):
        nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((1, 2, 2, 3)))


def test_no_image_has_no_logits_and_an_image_without_pixels_is_an_error(model):
    model.eval()
    assert model(IMAGES[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"`x` has shape \(4, 0, 16, 3\), expected images of one pixel or more"):
        model(IMAGES[:, :0])


def test_a_model_of_which_a_part_trains_takes_the_batch_as_one(model, monkeypatch):
    monkeypatch.setattr(mobilenet, "PIXELS_AT_ONCE", 2 * 16 * 16)
    model.train()
    model.stem.eval()
    assert model(IMAGES, rngs=nnx.Rngs(1)).shape == (4, 5)


def test_inference_computes_a_few_images_at_a_time(model, monkeypatch):
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        pytest.skip("only a CPU with one device does so")
    model.eval()
    if native.is_available():  # each rounding is defined: XLA rounds otherwise what it fuses in a loop
        model = with_arithmetic(model, "jaxdw")
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    graph, state = nnx.split(model)
    expected = jnp.concatenate([run(state, IMAGES[:2]), run(state, IMAGES[2:])])
    monkeypatch.setattr(mobilenet, "PIXELS_AT_ONCE", 2 * 16 * 16)
    assert "while" in run.lower(state, IMAGES).as_text()
    assert (run(state, IMAGES) == expected).all() or not native.is_available()
    assert run(state, IMAGES[:3]).shape == (3, 5) and run(state, IMAGES.reshape(2, 2, 16, 16, 3)).shape == (2, 2, 5)
    gradient = jax.grad(lambda x: run(state, x).sum())(IMAGES)
    assert gradient.shape == IMAGES.shape and (gradient != 0).any()
