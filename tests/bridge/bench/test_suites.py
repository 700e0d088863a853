"""The tables of layers, and what filters take of them."""

import pytest

from bridge.bench.special_layers import SpecialLayer
from bridge.bench.suites import NETWORKS, SCALES, SPECIAL, DepthwiseLayer, layers_of, model_rows, select


def test_every_layer_of_every_network_is_measured_once():
    layers = layers_of("layers")
    listed = {(network, spec) for network, specs in NETWORKS.items() for spec in specs.split()}
    assert {(network, str(layer)) for layer, networks in layers.items() for network in networks} == listed
    assert len(listed) == sum(len(specs.split()) for specs in NETWORKS.values()) == 85
    assert len(layers) == len({spec for _, spec in listed})


@pytest.mark.parametrize("suite", ["windows", "blocks", "convnext"])
def test_the_smaller_suites_take_layers_of_the_networks(suite):
    assert layers_of(suite).items() <= layers_of("layers").items()


@pytest.mark.parametrize("field", SCALES)
def test_every_quantity_is_varied_over_two_decades(field):
    values = [value**2 if field in ("side", "kernel") else value for value in SCALES[field]]
    assert values[-1] / values[0] >= 100 and list(values) == sorted(set(values))


@pytest.mark.parametrize(
    "filters, suite, expected",
    [
        (["7x7x960"], "layers", ["7x7x960:3:1", "7x7x960:5:1"]),
        (["convnext"], "layers", ["56x56x96:7:1", "28x28x192:7:1", "14x14x384:7:1", "7x7x768:7:1"]),
        (["7x7x960:3:1"], "layers", ["7x7x960:3:1"]),
        (["5x6x7:3:2", "7x7x1152:3"], "layers", ["5x6x7:3:2", "7x7x1152:3:1"]),
        (["5x6x7:3:2"], "models", []),
        (["decoding"], "causal", [f"step:{each}:4" for each in ("1x1536", "8x1536", "64x1536", "1x5120", "16x5120")]),
        (["5x6x7:3:2", "slak"], "large", ["1x56x56x128:51"]),
        (["5x6x7:3:2", "5x6x7:3:1", "56x56"], "convnext", ["5x6x7:3:1", "56x56x96:7:1"]),
        (["inference"], "models", ["inference, batch 1", "inference, batch 8"]),
        (["5x6x7:3:2"], "scaling", ["5x6x7:3:2"]),
        ([], "scaling", ["28x28x96:3:1"]),
        (["nothing"], "layers", []),
    ],
)
def test_filters_take_what_they_name(filters, suite, expected):
    assert sorted(select(suite, filters, 8)) == sorted(expected)


def test_a_batch_of_one_has_no_row_twice():
    assert model_rows(1) == ("inference, batch 1", "training, batch 1")


@pytest.mark.parametrize("text", ["", "7x7:3:1", "7x7x0:3:1", "7x7x4:2:1", "7x7x4:3:0", "7x7x4:3:1:1", "ax7x4:3:1"])
def test_what_is_no_layer_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="expected height x width x channels:kernel:stride such as 56x56x144:3:2"):
        DepthwiseLayer.parse(text)


def test_every_other_layer_has_a_shape():
    for networks in SPECIAL.values():
        for name in " ".join(networks.values()).split():
            layer = SpecialLayer.parse(name, 8)
            assert layer.nbytes > 0 and all(min(shape) > 0 for shape in layer.shapes.values())
    with pytest.raises(ValueError, match="`--layers` has 'image:1', expected a name as in docs"):
        SpecialLayer.parse("image:1", 8)


def test_scaling_starts_from_one_layer():
    with pytest.raises(ValueError, match="expected one layer to start `scaling` from"):
        select("scaling", ["5x6x7:3:2", "5x6x8:3:2"], 8)
