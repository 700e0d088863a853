"""The MobileNets of three libraries: every key placed, every byte back, every layer in its place."""

import collections
import contextlib
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bridge import load_weights, to_flax, to_torch
from bridge.weights import WeightsMismatch
from bridge.weights.trees import empty_model
from jaxdw.models.blocks import BatchNorm
from jaxdw.nnx import DepthwiseConv
from tests.references import MODELS, reference


@pytest.fixture(scope="module", params=MODELS)
def converted(request):
    """A model, its weights, its name, the Flax model without values, and the conversion."""
    name = request.param
    module = reference(name, seed=request.config.option.seed)
    library, network = name.split(".")
    model = empty_model(network, library, num_classes=10)
    return Converted(name, module, load_weights(module), model, to_flax(module, model))


Converted = collections.namedtuple("Converted", "name module weights model result")


@pytest.mark.sampled(5)
def test_every_key_is_placed_by_the_rules_of_its_own_library(converted):
    manifest = converted.result.manifest
    assert manifest.rules == converted.name
    assert {record.torch.name for record in (*manifest.moved, *manifest.kept)} == converted.weights.keys()
    assert all(record.torch.name.endswith(".num_batches_tracked") for record in manifest.kept)


@pytest.mark.sampled(3)
def test_every_byte_comes_back(converted):
    back = to_torch(converted.result.weights, converted.result.manifest).weights
    assert back.keys() == converted.weights.keys()
    for name, array in converted.weights.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_the_way_back_by_rules_alone_loads_strictly(converted):
    back = to_torch(converted.result.weights, converted.name, tensors=True).weights
    converted.module.load_state_dict({**back}, strict=True)
    assert {name for name, tensor in back.items() if not np.array_equal(tensor, converted.weights[name])} == {
        name for name in back if name.endswith("num_batches_tracked")
    }


@pytest.mark.sampled(4)
def test_layers_run_in_the_order_of_the_original(converted):
    place = {r.torch.name.rpartition(".")[0]: r.flax.name.rpartition(".")[0] for r in converted.result.manifest.moved}
    ran = [place[path] for path in torch_order(converted.module)]
    assert ran == flax_order(converted.model) and len(ran) == len(set(ran)) == len(set(place.values()))


def torch_order(module):
    """The layers with parameters as one forward pass reaches them."""
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, __, path=path: ran.append(path))
        for path, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    with torch.no_grad():
        module(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return ran


def flax_order(model):
    """The same of the Flax model in training, traced without computing: in inference a norm may be no layer's call."""
    ran = []

    def forward(model, x):
        paths = {id(layer): ".".join(map(str, path)) for path, layer in nnx.iter_modules(model)}

        def recorded(call):
            return lambda layer, *inputs, **options: (ran.append(paths[id(layer)]), call(layer, *inputs, **options))[1]

        with contextlib.ExitStack() as patches:
            for kind in (nnx.Conv, nnx.Linear, BatchNorm, DepthwiseConv):
                patches.enter_context(mock.patch.object(kind, "__call__", recorded(kind.__call__)))
            return model(x)

    nnx.eval_shape(forward, nnx.view(model, deterministic=True, use_running_average=False), jnp.zeros((2, 32, 32, 3)))
    return ran


SMALL = "torchvision.mobilenet_v3_small"


@pytest.fixture(scope="module")
def small():
    return load_weights(reference(SMALL))


def test_another_network_is_named(small):
    with pytest.raises(WeightsMismatch, match=r"wrong architecture: the names look like torchvision\.mobilenet_v3_s"):
        to_flax(small, empty_model("mobilenet_v2", "torchvision"))


def test_another_number_of_classes_is_named(small):
    with pytest.raises(WeightsMismatch, match=r"classes differs: classifier\.3 has 10 outputs, the target 1000"):
        to_flax(small, empty_model("mobilenet_v3_small", "torchvision"))


def test_another_width_is_named(small):
    with pytest.raises(WeightsMismatch, match="another width"):
        to_flax(small, empty_model("mobilenet_v3_small", "torchvision", num_classes=10, width=0.5))


def test_features_alone_say_that_the_classifier_is_left_out(small):
    with pytest.raises(WeightsMismatch, match="built without what the weights have in classifier"):
        to_flax(small, empty_model("mobilenet_v3_small", "torchvision", num_classes=0))
