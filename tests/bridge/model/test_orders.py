"""Orders of PyTorch's dense operations: they are proved on the operation's own data, cached, and said in words."""

import json

import numpy as np
import pytest
import torch

from bridge.accumulation import Tree
from bridge.model.alignment import Alignment
from bridge.model.known_orders import KnownOrders
from bridge.model.model_inputs import INFERENCE
from bridge.model.orders import Order, described, is_a_sum, revealed
from bridge.model.port_parity import programs
from bridge.model.recorded_operations import operation_of
from bridge.numerics import same_bits


class Pooled(torch.nn.Module):
    """A 3x3 and a 1x1 convolution with biases, a mean and a fully connected layer."""

    def __init__(self, channels, features, bias=True):
        super().__init__()
        self.full = torch.nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=bias)
        self.pointwise = torch.nn.Conv2d(channels, features, 1, bias=bias)
        self.linear = torch.nn.Linear(features, 7, bias=bias)

    def forward(self, x):
        y = torch.nn.functional.adaptive_avg_pool2d(self.pointwise(self.full(x)), 1)
        return self.linear(y.flatten(1))


def sums(seed, layout, batch=2, size=9, channels=24, features=40, bias=True):
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Pooled(channels, features, bias)
    images = rng.standard_normal((batch, size, size, 3), np.float32)
    identity = (lambda p, x: x * p["one"], {"one": np.float32(1)})
    program, theirs, names, _ = programs(module, identity, images, None, INFERENCE, layout)
    alignment = Alignment(program, theirs, names, {})
    done = [operation_of(alignment, call) for call in theirs.calls]
    return [each for each in done if each is not None and is_a_sum(each)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_element_is_replayed(layout, batch, seed):
    bias = bool(seed % 2)
    found = sums(seed, layout, batch, bias=bias)
    assert [each.kind for each in found] == ["convolution", "convolution", "mean", "linear"]
    for each in found:
        weights = [each.parameters["weight"], each.parameters.get("bias")] if each.parameters else []
        again = each.run(each.operands[0], *weights).reshape(each.output.shape)
        assert same_bits(again, each.output).all()
        orders = revealed(each, each.run, each.output)
        assert orders.replayed.all() and not orders.reason, f"{each.kind}: {orders}"


def test_a_wrong_order_proves_nothing_and_is_replaced(seed):
    pointwise = sums(seed, "channels_last", channels=16, bias=False)[1]
    wrong = Order(Tree.chain([*range(1, 16), 0], fused=True), True)
    found = revealed(pointwise, pointwise.run, pointwise.output, [wrong])
    right = revealed(pointwise, pointwise.run, pointwise.output)
    assert found.replayed.all() and [order for _, order in found.channels] == [order for _, order in right.channels]


def test_what_is_no_sum_of_these_products_has_no_order(seed):
    pointwise = sums(seed, "channels_last")[1]

    def squared(x, weight, bias=None):
        return pointwise.run(x, weight, bias) ** 2

    found = revealed(pointwise, squared, pointwise.output**2)
    assert not found.replayed.any() and found.reason and not found.channels
    assert f"{found.labels.size} elements: {found.reason}" == str(found)


#: A file whose orders have another number of terms.
OTHER = "other terms"


def test_orders_are_read_from_the_cache_and_a_damaged_one_is_replaced(tmp_path, seed):
    (pointwise,) = [each for each in sums(seed, "contiguous") if each.layer == "pointwise"]

    def never(*arrays):
        raise AssertionError("it was asked again")

    path = tmp_path / "orders.json"
    known = KnownOrders(path)
    first = known.revealed(pointwise, "PyTorch", pointwise.run, pointwise.output)
    known.save()
    kept = json.loads(path.read_text())
    assert len(kept) == 1
    again = KnownOrders(path).revealed(pointwise, "PyTorch", never, pointwise.output)
    assert again.orders == first.orders and (again.labels == first.labels).all()
    for damage in ("{", "[]", path.read_text().replace("F[", "G["), path.read_text().replace("[[", "[[1,"), OTHER):
        path.write_text(json.dumps({key: [["F[1, 0]", "True", ""]] for key in kept}) if damage is OTHER else damage)
        known = KnownOrders(path)
        assert known.revealed(pointwise, "PyTorch", pointwise.run, pointwise.output).replayed.all()
        known.save()
        assert KnownOrders(path).revealed(pointwise, "PyTorch", never, pointwise.output).replayed.all()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("F[2, F[1, F[0, b]]]", "one chain of 3 fused multiply-adds, the bias first"),
        ("F[1, 0]+F[4, F[3, 2]]", "2 chains of 2+3 fused multiply-adds, added"),
        ("((0+1)+2)+b", "one chain of 3 terms without FMA, the bias last"),
        ("(F[1, 0]+F[3, 2])+(4+5)", "a tree of height 3 with FMA for 2 of its terms"),
    ],
)
def test_an_order_is_said_in_words(tree, words):
    assert described(Tree.parse(tree)) == words
