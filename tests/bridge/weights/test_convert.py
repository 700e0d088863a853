"""Single layers and small models: the values in their places, and everything else refused at once."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bridge import Rule, load_weights, to_flax, to_torch
from bridge.weights import WeightsManifest, WeightsMismatch
from jaxdw.nnx import CausalConv1d, DepthwiseConv, DepthwiseConvTranspose


def integers(module, rng):
    """Small integers in every parameter: all sums are exact, so that equal means equal."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.from_numpy(rng.integers(-4, 5, tensor.shape)))
    return module.eval()


def images(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def channels_last(y):
    return np.moveaxis(y.detach().numpy(), 1, -1)


CONVOLUTIONS = {
    "full": (nn.Conv2d(3, 8, (3, 2)), lambda: nnx.Conv(3, 8, (3, 2), padding="VALID", rngs=nnx.Rngs(0)), (2, 7, 6, 3)),
    "1-D": (nn.Conv1d(3, 8, 3), lambda: nnx.Conv(3, 8, (3,), padding="VALID", rngs=nnx.Rngs(0)), (2, 7, 3)),
    "3-D": (nn.Conv3d(3, 4, 2), lambda: nnx.Conv(3, 4, (2, 2, 2), padding="VALID", rngs=nnx.Rngs(0)), (2, 4, 3, 5, 3)),
    "grouped": (
        nn.Conv2d(6, 9, 3, groups=3, bias=False),
        lambda: nnx.Conv(6, 9, (3, 3), padding="VALID", feature_group_count=3, use_bias=False, rngs=nnx.Rngs(0)),
        (2, 5, 5, 6),
    ),
    "depthwise": (
        nn.Conv2d(5, 5, 3, groups=5),
        lambda: DepthwiseConv(5, (3, 3), padding=0, rngs=nnx.Rngs(0)),
        (2, 6, 5, 5),
    ),
    "multiplier 3": (
        nn.Conv2d(4, 12, (1, 3), stride=2, padding=(0, 1), groups=4),
        lambda: DepthwiseConv(4, (1, 3), 2, padding=(0, 1), channel_multiplier=3, rngs=nnx.Rngs(0)),
        (2, 6, 5, 4),
    ),
    "transposed": (
        nn.ConvTranspose2d(5, 5, 3, 2, 1, 1, groups=5),
        lambda: DepthwiseConvTranspose(5, (3, 3), 2, padding=1, output_padding=1, rngs=nnx.Rngs(0)),
        (2, 6, 5, 5),
    ),
    "transposed, multiplier 2, kernel flipped": (
        nn.ConvTranspose3d(3, 6, (3, 1, 2), padding=(1, 0, 0), groups=3, bias=False),
        lambda: DepthwiseConvTranspose(
            3,
            (3, 1, 2),
            padding=(1, 0, 0),
            channel_multiplier=2,
            transpose_kernel=False,
            use_bias=False,
            rngs=nnx.Rngs(0),
        ),
        (2, 4, 3, 5, 3),
    ),
    "transposed, 1-D": (
        nn.ConvTranspose1d(4, 12, 4, 3, groups=4),
        lambda: DepthwiseConvTranspose(4, (4,), 3, channel_multiplier=3, rngs=nnx.Rngs(0)),
        (2, 6, 4),
    ),
    "causal": (
        nn.Sequential(nn.ConstantPad1d((3, 0), 0.0), nn.Conv1d(4, 8, 4, groups=4)),
        lambda: nnx.Sequential(lambda x: x, CausalConv1d(4, 4, channel_multiplier=2, rngs=nnx.Rngs(0))),
        (2, 9, 4),
    ),
    "matrix": (nn.Linear(6, 4), lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)), (5, 6)),
    "square matrix": (nn.Linear(6, 6, bias=False), lambda: nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0)), (5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_computes_the_same_integers(name, seed):
    rng = np.random.default_rng(seed)
    module, make, shape = CONVOLUTIONS[name]
    layer = nnx.eval_shape(make)
    nnx.update(layer, to_flax(integers(module, rng), layer).weights)
    x = images(rng, *shape)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), channels_last(module(channels_first(x))))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_comes_back_by_its_manifest(name, seed):
    module, make, _ = CONVOLUTIONS[name]
    source = load_weights(integers(module, np.random.default_rng(seed)))
    weights, manifest = to_flax(source, nnx.eval_shape(make))
    again = WeightsManifest.model_validate_json(manifest.model_dump_json())
    back, _ = to_torch(weights, again)
    assert back.keys() == source.keys() and all(np.array_equal(back[name], source[name]) for name in source)


def test_a_1x1_convolution_may_be_a_matrix(seed):
    rng = np.random.default_rng(seed)
    module, layer = integers(nn.Conv2d(6, 4, 1), rng), nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    nnx.update(layer, to_flax(module, layer, [Rule("", "", "pointwise")]).weights)
    x = images(rng, 2, 3, 5, 6)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), channels_last(module(channels_first(x))))


def test_batch_normalization_computes_the_same_integers(seed):
    rng = np.random.default_rng(seed)
    module = integers(nn.BatchNorm2d(6, eps=0.0, momentum=0.25), rng)
    module.running_var.copy_(torch.tensor([1 / 16, 1 / 4, 1, 4, 1 / 64, 1]))  # square roots are exact
    layer = nnx.BatchNorm(6, epsilon=0.0, momentum=0.75, use_running_average=True, rngs=nnx.Rngs(0))
    converted = to_flax(module, layer)
    nnx.update(layer, converted.weights)
    x = images(rng, 2, 3, 5, 6)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), channels_last(module(channels_first(x))))
    assert [kept.torch.name for kept in converted.manifest.kept] == ["num_batches_tracked"]


@pytest.mark.parametrize(
    "module, layer",
    [
        (nn.LayerNorm(4, eps=1e-6), nnx.LayerNorm(4, rngs=nnx.Rngs(0))),
        (nn.GroupNorm(2, 4, eps=1e-6), nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))),
        (nn.Embedding(3, 4), nnx.Embed(3, 4, rngs=nnx.Rngs(0))),
        (nn.BatchNorm1d(4), nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))),
    ],
)
def test_other_layers_keep_their_arrays(module, layer, seed):
    integers(module, np.random.default_rng(seed))
    state = to_flax(module, layer).weights
    names = {"weight": ("scale", "embedding"), "bias": ("bias",), "running_mean": ("mean",), "running_var": ("var",)}
    for torch_name, flax_names in names.items():
        if torch_name in module.state_dict():
            (flax_name,) = (name for name in flax_names if name in state)
            np.testing.assert_array_equal(state[flax_name].get_value(), module.state_dict()[torch_name])


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3, 3), padding="VALID", name="conv")(x)
        return linen.BatchNorm(use_running_average=True, name="norm")(x)


def test_linen_variables_get_their_collections(seed):
    rng = np.random.default_rng(seed)
    module = integers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), rng)
    variables = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((1, 5, 5, 3)))
    rules = [Rule("0", "conv", "conv"), Rule("1", "norm", "batch_norm")]
    tree, manifest = to_flax(module, variables, rules)
    assert jax.tree.structure(tree) == jax.tree.structure(variables)
    np.testing.assert_array_equal(tree["batch_stats"]["norm"]["mean"], module[1].running_mean)
    np.testing.assert_array_equal(tree["params"]["conv"]["kernel"], module[0].weight.permute(2, 3, 1, 0).detach())
    back = to_torch(tree, manifest).weights
    assert_same(back, load_weights(module))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes()


@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]),
    shape=st.tuples(*[st.integers(0, 3)] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_there_and_back_is_byte_exact(dtype, shape, seed):
    raw = np.random.default_rng(seed).integers(0, 256, 81 * 8, np.uint8).view(dtype)  # NaNs and subnormals too
    weights = {
        "a.weight": raw[: np.prod(shape)].reshape(shape),
        "a.bias": raw[: shape[0]],
        "b.weight": raw[: shape[0] * shape[1]].reshape(shape[1], shape[0]).T,
        "gamma": raw[:1].reshape(()),
    }
    rules = [Rule("a", "x.conv", "conv"), Rule("b", "y", "linear"), Rule("gamma", "z", "array")]
    o, i, h, w = shape
    shapes = {"x": {"conv": {"kernel": (h, w, i, o), "bias": (o,)}}, "y": {"kernel": (i, o)}, "z": ()}
    target = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    tree, manifest = to_flax(weights, target, rules)
    assert manifest.changed({"x.conv.kernel": tree["x"]["conv"]["kernel"]}) == ["x.conv.bias", "y.kernel", "z"]
    assert_same(to_torch(tree, WeightsManifest.model_validate_json(manifest.to_json())).weights, weights)
    assert_same(to_torch(tree, rules).weights, weights)


def test_float64_is_not_narrowed_without_a_word():
    module, layer = nn.Linear(2, 2).double(), nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"bias is float64, which JAX narrows to float32 here: enable"):
        to_flax(module, layer)
    with jax.enable_x64(True):
        assert to_flax(module, layer).weights["kernel"].dtype == np.float64
    assert to_flax(module, nnx.to_pure_dict(nnx.state(layer)), [Rule("", "", "linear")]).weights["bias"].dtype == float


def test_tensors_of_pytorch_come_back_on_request(seed):
    module = integers(nn.Conv2d(3, 8, 3).to(torch.bfloat16), np.random.default_rng(seed))
    layer = nnx.eval_shape(lambda: nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0)))
    converted = to_flax(module, layer)
    back = to_torch(converted.weights, converted.manifest, tensors=True).weights
    assert all(back[name].dtype == torch.bfloat16 for name in back)
    nn.Conv2d(3, 8, 3).to(torch.bfloat16).load_state_dict(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


def test_the_way_back_needs_no_manifest_and_counts_batches_from_0():
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    back = to_torch(layer, [Rule("bn", "", "batch_norm")], tensors=True).weights
    nn.Sequential().register_module("bn", module := nn.BatchNorm2d(3))
    module.load_state_dict({name.removeprefix("bn."): tensor for name, tensor in back.items()})
    assert back["bn.num_batches_tracked"] == 0


class Net(nnx.Module):
    def __init__(self, channels=4, classes=10, bias=True):
        self.conv = DepthwiseConv(channels, (3, 3), padding=0, use_bias=bias, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))  # its random key is no weight
        self.head = nnx.Linear(channels, classes, rngs=nnx.Rngs(0))


def net(channels=4, classes=10, bias=True):
    names = {
        "conv": nn.Conv2d(channels, channels, 3, groups=channels, bias=bias),
        "norm": nn.BatchNorm2d(channels),
        "head": nn.Linear(channels, classes),
    }
    return nn.ModuleDict(names)


def changed(**changes):
    weights = load_weights(net())
    for name, array in changes.items():
        weights.pop(name.replace("_", ".", 1))
        if array is not None:
            weights[name.replace("_", ".", 1)] = array
    return weights


def renamed(prefix):
    return {f"{prefix}{name}": array for name, array in load_weights(net()).items()}


SAME_NAMES = [Rule("conv", "conv", "conv"), Rule("norm", "norm", "batch_norm"), Rule("head", "head", "linear")]

MISFITS = {
    "classes": (
        net(classes=5),
        None,
        ["number of classes differs: head has 5 outputs, the target 10", "head.bias (5,)"],
    ),
    "transposed": (
        changed(head_weight=np.ones((4, 10), np.float32)),
        None,
        [r"transposed, or in Flax's layout already: head.weight", "head.weight (4, 10) for head.kernel (4, 10)"],
    ),
    "Flax's kernel": (changed(conv_weight=np.ones((3, 3, 1, 4), np.float32)), None, ["layout already: conv.weight"]),
    "width": (net(channels=8), None, ["another width: conv.weight is (8, 1, 3, 3), and conv.kernel is (3, 3, 1, 4)"]),
    "missing": (
        changed(norm_running_mean=None, norm_running_var=None),
        None,
        ["checkpoint is incomplete", "missing (2)", "norm.mean (4,), from norm.running_mean", "norm.var (4,)"],
    ),
    "no bias": (net(bias=False), None, ["built with biases", "conv.bias (4,), from conv.bias"]),
    "a bias too many": (
        net(),
        lambda: Net(bias=False),
        ["built without what the weights have in conv", "which becomes conv.bias"],
    ),
    "extra": (load_weights(net()) | {"aux.weight": np.ones(1)}, None, ["no rule for (1):\n  aux.weight"]),
    "prefix": (renamed("model."), None, ['prefix="model."', "model.head.bias", "head.bias (10,), from head.bias"]),
    "several rules": (
        net(),
        [*SAME_NAMES, Rule("{x}", "{x}.part", "linear")],
        ["the rules overlap", "several rules for", "head.weight: "],
    ),
    "two for one": (
        load_weights(net()) | {"old.bias": np.ones(10, np.float32)},
        [*SAME_NAMES, Rule("old", "head", "linear")],
        ["several tensors for (1):\n  head.bias: head.bias, old.bias"],
    ),
    "eps": (
        nn.ModuleDict({**net(), "norm": nn.BatchNorm2d(4, eps=1e-3)}),
        None,
        ["BatchNorm has other settings", "norm has eps 0.001, the target's epsilon is 1e-05"],
    ),
    "momentum": (
        nn.ModuleDict({**net(), "norm": nn.BatchNorm2d(4, momentum=0.9)}),
        None,
        ["norm has momentum 0.9, the target's is 0.9, not 1 minus it"],
    ),
    "cumulative": (nn.ModuleDict({**net(), "norm": nn.BatchNorm2d(4, momentum=None)}), None, ["a cumulative average"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_with_likely_causes(name):
    weights, other, expected = MISFITS[name]
    target = nnx.eval_shape(other if callable(other) else Net)
    with pytest.raises(WeightsMismatch) as raised:
        to_flax(weights, target, other if isinstance(other, list) else None)
    for words in expected:
        assert words in str(raised.value)


def test_all_that_does_not_fit_is_in_one_message():
    weights = changed(norm_bias=None, head_weight=np.ones((7, 4), np.float32)) | {"aux.weight": np.ones(1)}
    with pytest.raises(WeightsMismatch, match=r"(?s)no rule for \(1\).*missing \(1\).*another shape \(1\)"):
        to_flax(weights, nnx.eval_shape(Net))


def test_layers_of_equal_shapes_are_never_matched_by_order():
    weights = {"second.weight": np.ones((4, 4), np.float32), "first.weight": np.zeros((4, 4), np.float32)}
    target = {"a": {"kernel": np.zeros((4, 4))}, "b": {"kernel": np.zeros((4, 4))}}
    with pytest.raises(WeightsMismatch, match=r"(?s)no rule for \(2\).*missing \(2\)"):
        to_flax(weights, target, [Rule("one", "a", "linear"), Rule("two", "b", "linear")])


def test_a_bare_tree_needs_rules():
    with pytest.raises(ValueError, match="does not say whether a kernel is a convolution's, a transposed"):
        to_flax({"weight": np.ones((2, 2))}, {"params": {"kernel": np.ones((2, 2))}})


@pytest.mark.parametrize("rules", ["mobilenet_v9", "torchvision.resnet"])
def test_unknown_rules_are_refused_with_those_there_are(rules):
    with pytest.raises(ValueError, match=r"expected one of .*torchvision\.mobilenet_v2"):
        to_flax(net(), nnx.eval_shape(Net), rules)
    with pytest.raises(ValueError, match=r"expected one of .*torchvision\.mobilenet_v2"):
        to_torch({}, rules)


def test_a_transposed_convolution_is_never_taken_for_a_convolution():
    layer = nnx.eval_shape(lambda: nnx.Conv(4, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0)))
    with pytest.raises((WeightsMismatch, ValueError)):
        to_flax(nn.ConvTranspose2d(4, 4, 3), layer)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_a_transposed_convolution_computes_the_same_in_flax(transpose_kernel, seed):
    theirs = nn.ConvTranspose2d(4, 6, 3, 2)
    ours = nnx.ConvTranspose(4, 6, (3, 3), 2, padding="VALID", transpose_kernel=transpose_kernel, rngs=nnx.Rngs(0))
    x = np.random.default_rng(seed).integers(-4, 5, (1, 5, 5, 4)).astype(np.float32)
    with torch.no_grad():
        for k, tensor in enumerate(theirs.parameters()):
            tensor.copy_(torch.from_numpy(np.random.default_rng((seed, k)).integers(-4, 5, tensor.shape)))
    converted = to_flax(theirs, ours)
    nnx.update(ours, converted.weights)
    y = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(ours(jnp.asarray(x)), y.detach())  # small integers: no sum rounds
    _is_the_same_again(theirs, ours, converted.manifest)


def _is_the_same_again(theirs, ours, manifest):
    back, _ = to_torch(ours, manifest, tensors=True)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_projections_of_attention_are_converted(seed):
    theirs = nn.MultiheadAttention(6, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.copy_(torch.arange(18.0))
    ours = nnx.MultiHeadAttention(3, 6, 6, decode=False, rngs=nnx.Rngs(0))
    converted = to_flax(theirs, ours)
    nnx.update(ours, converted.weights)
    x = np.random.default_rng(seed).standard_normal((6,)).astype(np.float32)
    query, key, value = theirs.in_proj_weight.detach().numpy().reshape(3, 3, 2, 6)
    for weight, layer in ((query, ours.query), (key, ours.key), (value, ours.value)):
        np.testing.assert_array_equal(np.moveaxis(np.asarray(layer.kernel[...]), 0, -1), weight)
    np.testing.assert_array_equal(ours.value.bias[...].ravel(), np.arange(12.0, 18.0))
    np.testing.assert_array_equal(ours.out.kernel[...].reshape(6, 6).T, theirs.out_proj.weight.detach())
    assert ours(jnp.asarray(x[None, None])).shape == (1, 1, 6)
    _is_the_same_again(theirs, ours, converted.manifest)


@pytest.mark.parametrize("has_heads", [False, True])
def test_a_fused_layer_becomes_three(has_heads):
    class Apart(nnx.Module):
        def __init__(self, rngs):
            for name in "qkv":
                layer = nnx.LinearGeneral(4, (2, 2), rngs=rngs) if has_heads else nnx.Linear(4, 4, rngs=rngs)
                setattr(self, name, layer)

    theirs, ours = nn.ModuleDict({"qkv": nn.Linear(4, 12)}), Apart(nnx.Rngs(0))
    kind = "to_heads:2" if has_heads else "linear"
    rules = [Rule("qkv", name, f"{kind}[{k}/3]") for k, name in enumerate("qkv")]
    converted = to_flax(theirs, ours, rules)
    nnx.update(ours, converted.weights)
    weight = theirs["qkv"].weight.detach().numpy()
    np.testing.assert_array_equal(ours.k.kernel[...].reshape(4, 4), weight[4:8].T)
    _is_the_same_again(theirs, ours, converted.manifest)
    by_rules, _ = to_torch(ours, rules, tensors=True)
    assert torch.equal(by_rules["qkv.weight"], theirs["qkv"].weight)


def test_the_way_back_names_what_does_not_fit():
    converted = to_flax(net(), nnx.eval_shape(Net))
    tree = nnx.to_pure_dict(converted.weights)
    tree["aux"] = {"kernel": np.ones(1)}
    del tree["norm"]["mean"]
    tree["conv"]["kernel"] = np.ones(3)
    with pytest.raises(WeightsMismatch) as raised:
        to_torch(tree, converted.manifest)
    for words in (
        "no rule for (1):\n  aux.kernel",
        "norm.mean, for norm.running_mean",
        "conv.kernel (3,) (OI* -> *IO)",
    ):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    "target, error, message",
    [
        (3, TypeError, "`target` is a int"),
        ({"a": 3}, TypeError, "holds a int at 'a'"),
        ({"params": {"a": np.ones(1)}, "batch_stats": {"a": np.ones(1)}}, ValueError, "two leaves at 'a'"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "two leaves at 'a.b'"),
    ],
)
def test_a_target_that_is_no_tree_is_refused(target, error, message):
    with pytest.raises(error, match=message):
        to_flax({}, target, [])


def test_a_tree_without_values_has_no_way_back():
    with pytest.raises(TypeError, match=r"has a ShapeDtypeStruct at 'conv\.bias', expected an array with values"):
        to_torch(nnx.eval_shape(Net), SAME_NAMES)


def test_a_manifest_that_was_edited_is_refused():
    manifest = to_flax(net(), nnx.eval_shape(Net)).manifest
    manifest.kept[0].data = "AQAAAAAAAAA="
    with pytest.raises(ValueError, match=r"'norm\.num_batches_tracked' does not have the hash"):
        to_torch({}, manifest)
