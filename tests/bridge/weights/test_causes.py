"""Causes of a mismatch in real checkpoints: each is named with its fix, and the fix gives the right values."""

import functools
import io
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, prune

from bridge import Rule, load_weights, to_flax, to_torch
from bridge.weights import WeightsMismatch, convert_checkpoint, hints, write_safetensors
from bridge.weights.trees import empty_model
from jaxdw.nnx import CausalConv1d, DepthwiseConv, DepthwiseConvTranspose
from tests.bridge.weights.test_convert import channels_first, channels_last, images, integers
from tests.references import reference


def target(make):
    """A layer of Flax without values."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


class Module(nnx.Module):
    """Parts by name."""

    def __init__(self, **parts):
        for name, part in parts.items():
            setattr(self, name, part)


def linear(rngs, features=4):
    return nnx.Linear(4, features, rngs=rngs)


def conv(rngs, **options):
    return nnx.Conv(8, 8, (3, 3), rngs=rngs, **{"padding": "VALID", **options})


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {name.replace("__", "."): rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


class Bare(nn.Module):
    """Parameters that stand in no layer, at the top and below."""

    def __init__(self, depth=1):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.rand(4))
        self.cls_token = nn.Parameter(torch.rand(1, 1, 4))
        self.register_buffer("scale", torch.rand(2))
        self.tokens = nn.ParameterList([torch.rand(3), torch.rand(3)])
        self.block = Bare(depth - 1) if depth else nn.Identity()


class FlaxBare(nnx.Module):
    def __init__(self, rngs, depth=1, gamma="gamma"):
        self.fc = linear(rngs)
        setattr(self, gamma, nnx.Param(jnp.zeros(4)))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 4)))
        self.scale = nnx.BatchStat(jnp.zeros(2))
        self.tokens = nnx.List([nnx.Param(jnp.zeros(3)), nnx.Param(jnp.zeros(3))])
        if depth:
            self.block = FlaxBare(rngs, depth - 1, gamma)


def test_bare_parameters_of_equal_names_need_no_rules():
    theirs = Bare()
    weights, manifest = to_flax(theirs, target(FlaxBare))
    back = to_torch(weights, manifest).weights
    assert back.keys() == theirs.state_dict().keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    assert np.array_equal(weights["block"]["gamma"].get_value(), theirs.block.gamma.detach())


def test_a_rule_adds_to_the_automatic_ones_and_an_argument_switches_them_off():
    theirs, ours = Bare(), target(lambda rngs: FlaxBare(rngs, gamma="layer_scale"))
    rules = [Rule("gamma", "layer_scale", "array"), Rule("block.gamma", "block.layer_scale", "array")]
    weights = to_flax(theirs, ours, rules).weights
    assert np.array_equal(weights["layer_scale"].get_value(), theirs.gamma.detach())
    assert np.array_equal(weights["fc"]["kernel"].get_value(), theirs.fc.weight.detach().T)
    with pytest.raises(WeightsMismatch, match=r"(?s)\(rules: your own\).*no rule for.*fc\.weight"):
        to_flax(theirs, ours, rules, automatic=False)


def test_a_rule_of_ones_own_goes_before_an_automatic_one():
    """Two layers that the names would put the other way round."""
    given = arrays(a__weight=(4, 4), b__weight=(4, 4), a__bias=4, b__bias=4)
    ours = target(lambda rngs: Module(a=linear(rngs), b=linear(rngs)))
    weights = to_flax(given, ours, [Rule("a", "b", "linear"), Rule("b", "a", "linear")]).weights
    assert np.array_equal(weights["a"]["kernel"].get_value(), given["b.weight"].T)
    assert np.array_equal(weights["b"]["bias"].get_value(), given["a.bias"])


def test_a_bare_tree_has_no_automatic_rules():
    tree = {"a": {"kernel": np.zeros((4, 4))}, "b": {"kernel": np.zeros((4, 4))}}
    with pytest.raises(WeightsMismatch, match=r"(?s)no rule for \(1\):\n  b\.weight"):
        to_flax(arrays(a__weight=(4, 4), b__weight=(4, 4)), tree, [Rule("a", "a", "linear")])


PREFIXED = [
    "module.fc.weight",
    "_orig_mod.fc.weight",
    "base_model.model.fc.weight",
    "module.base_model.model._orig_mod.fc.weight",
    "fc._checkpoint_wrapped_module.weight",
    "_fsdp_wrapped_module.fc._fsdp_wrapped_module._checkpoint_wrapped_module.weight",
    "_forward_module.module.fc.weight",
]


@pytest.mark.parametrize("name", PREFIXED)
def test_what_wrappers_put_into_names_is_taken_off(name):
    given = {name: np.ones((4, 4), np.float32), name.replace("weight", "bias"): np.full(4, 2, np.float32)}
    assert set(load_weights(given)) == {"fc.weight", "fc.bias"}
    weights = to_flax(given, target(lambda rngs: Module(fc=linear(rngs)))).weights
    assert (weights["fc"]["bias"].get_value() == 2).all()


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_the_hint_of_a_prefix_can_be_followed_where_it_is_printed(prefix):
    given = {f"{prefix}{name}": array for name, array in arrays(fc__weight=(4, 4), fc__bias=4).items()}
    given["loss.weight"] = np.ones(1, np.float32)
    ours = target(lambda rngs: Module(fc=linear(rngs)))
    with pytest.raises(WeightsMismatch) as raised:
        to_flax(given, ours)
    assert f'pass `prefix="{prefix}"`' in str(raised.value)
    weights = to_flax(given, ours, prefix=prefix).weights
    assert np.array_equal(weights["fc"]["kernel"].get_value(), given[f"{prefix}fc.weight"].T)


def test_a_live_model_takes_a_prefix_too_and_its_settings_are_compared():
    theirs = nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.LayerNorm(4)}), "loss": nn.Linear(1, 1)})
    ours = target(lambda rngs: Module(norm=nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)))
    assert to_flax(theirs, ours, prefix="model.").manifest.moved[0].torch.name == "norm.weight"
    wrong = target(lambda rngs: Module(norm=nnx.LayerNorm(4, rngs=rngs)))
    with pytest.raises(WeightsMismatch, match="norm has eps 1e-05"):
        to_flax(theirs, wrong, prefix="model.")


def test_a_live_model_with_checkpointed_activations_is_compared_as_the_bare_one():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    module = nn.ModuleDict({"conv": wrapper.checkpoint_wrapper(nn.Conv2d(8, 8, 3, stride=2))})
    to_flax(module, target(lambda rngs: Module(conv=conv(rngs, strides=2))))
    with pytest.raises(WeightsMismatch, match=r"conv has stride \(2, 2\)"):
        to_flax(nn.DataParallel(module), target(lambda rngs: Module(conv=conv(rngs))))


def randomized(module, seed=0):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for tensor in module.parameters():
            tensor.uniform_(0.5, 2)
    return module


def pruned():
    module = nn.Linear(4, 4)
    return prune.random_unstructured(module, "weight", 0.5)


PARTS = {
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "weight norm, as a parametrization": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "weight norm of all": lambda: nn.utils.weight_norm(nn.Linear(4, 4), dim=None),
    "weight norm of inputs": lambda: parametrizations.weight_norm(nn.Linear(4, 4), dim=1),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "spectral norm, as a parametrization": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "pruning": pruned,
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's, that the hook is deprecated
def test_a_weight_in_parts_is_named_and_merged_on_request_to_the_bit(name, live):
    module = nn.ModuleDict({"fc": randomized(PARTS[name]()).eval()})
    with torch.no_grad():
        module["fc"](torch.ones(1, 4))  # a hook sets `weight`
    source = module if live else module.state_dict()
    ours = target(lambda rngs: Module(fc=linear(rngs)))
    with pytest.raises(
        WeightsMismatch, match=rf"fc\.weight is stored in parts, by {name.split(',')[0].split(' of')[0]}"
    ):
        to_flax(source, ours)
    kernel = to_flax(source, ours, merge=True).weights["fc"]["kernel"].get_value()
    assert np.array_equal(kernel, module["fc"].weight.detach().T)


def test_another_parametrization_is_merged_from_the_live_model():
    module = parametrizations.orthogonal(nn.Linear(4, 4)).train()
    with pytest.raises(WeightsMismatch, match="part of a parametrization: give the live model with `merge=True`"):
        to_flax(module.state_dict(), target(linear))
    kernel = to_flax(module, target(linear), merge=True).weights["kernel"].get_value()
    assert np.array_equal(kernel, module.weight.detach().T) and module.training


def test_a_file_is_merged_by_the_command_line_option(tmp_path):
    state = parametrizations.weight_norm(nn.Linear(4, 4)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.safetensors", to="torch", merge=True)
    assert set(load_weights(tmp_path / "b.safetensors")) == {"weight", "bias"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def embedding(rngs):
    return nnx.Embed(7, 4, rngs=rngs)


def head(rngs):
    return nnx.Linear(4, 7, use_bias=False, rngs=rngs)


LORA = arrays(fc__base_layer__weight=(4, 4), fc__lora_A__default__weight=(2, 4), fc__lora_B__default__weight=(4, 2))
DEPTHWISE = nn.Conv2d(8, 8, 3, groups=8)

#: Weights, the target, and what the message says.
CAUSES = {
    "no groups": (
        DEPTHWISE,
        conv,
        ["weight (8, 1, 3, 3) belongs to a depthwise convolution of 8 group(s)", "`feature_group_count=8`"],
    ),
    "no groups in a file": (load_weights(DEPTHWISE), conv, ["and the target's has 1", "jaxdw.nnx.DepthwiseConv"]),
    "other groups": (
        nn.Conv2d(8, 8, 3, groups=2),
        lambda rngs: conv(rngs, feature_group_count=4),
        ["a convolution of 2 group(s), and the target's has 4: build Conv with `feature_group_count=2`"],
    ),
    "depthwise, and the weights are not": (
        nn.Conv2d(8, 8, 3),
        lambda rngs: DepthwiseConv(8, (3, 3), padding=0, rngs=rngs),
        ["of 1 group(s), and the target's has 8: use nnx.Conv with `feature_group_count=1`"],
    ),
    "LoRA": (
        {f"base_model.model.{name}": array for name, array in LORA.items()},
        lambda rngs: Module(fc=linear(rngs)),
        ["3 tensors belong to LoRA or another adapter of PEFT", "`model.merge_and_unload()`"],
    ),
    "LoRA of loralib": (arrays(weight=(4, 4), lora_A=(2, 4), lora_B=(4, 2)), linear, ["2 tensors belong to LoRA"]),
    "tied, once in the target": (
        Tied(),
        lambda rngs: Module(embed=embedding(rngs)),
        ["tied weights: head.weight is embed.weight, and the target has one place", "del weights['head.weight']"],
    ),
    "tied, once in the checkpoint": (
        arrays(embed__weight=(7, 4)),
        lambda rngs: Module(embed=embedding(rngs), head=head(rngs)),
        ["tied weights", "weights['head.weight'] = weights['embed.weight']"],
    ),
    "a general matrix": (
        nn.ModuleDict({"up": nn.Linear(4, 4)}),
        lambda rngs: Module(up=nnx.LinearGeneral(4, (2, 2), rngs=rngs)),
        ["rules have no kind for up (LinearGeneral)", "Rule(NAME_IN_PYTORCH, 'up.", "'array')"],
    ),
    "another number of heads": (
        nn.ModuleDict({"at": nn.MultiheadAttention(4, 4)}),
        lambda rngs: Module(at=nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)),
        ["at has 4 heads, the target's is 2", "num_heads=4"],
    ),
    "a recurrent cell": (
        nn.GRUCell(4, 4),
        lambda rngs: nnx.GRUCell(4, 4, rngs=rngs),
        ["rules have no kind for the target (GRUCell)"],
    ),
    "a channel multiplier": (
        nn.Conv2d(4, 8, 3, groups=4),
        lambda rngs: DepthwiseConv(4, (3, 3), padding=0, rngs=rngs),
        ["weight has 8 outputs: build DepthwiseConv with `channel_multiplier=2`", "the number of outputs differs"],
    ),
    "a 1x1 convolution for a matrix": (
        nn.Conv2d(4, 4, 1),
        linear,
        ["weight belongs to a 1x1 convolution, and kernel is a matrix: add Rule('', '', 'pointwise') to `rules`"],
    ),
    "a matrix for a 1x1 convolution": (
        nn.Linear(4, 8),
        lambda rngs: nnx.Conv(4, 8, (1, 1), rngs=rngs),
        ["weights['weight'] = weights['weight'][:, :, None, None]"],
    ),
    "a LayerNorm's eps": (nn.LayerNorm(4), lambda rngs: nnx.LayerNorm(4, rngs=rngs), ["LayerNorm", "epsilon=1e-05."]),
    "a GroupNorm's groups": (
        nn.GroupNorm(2, 4),
        lambda rngs: nnx.GroupNorm(4, num_groups=4, epsilon=1e-5, rngs=rngs),
        ["num_groups 2, the target's is 4", "num_groups=2"],
    ),
    "an RMSNorm's eps": (
        nn.RMSNorm(4),
        lambda rngs: nnx.RMSNorm(4, rngs=rngs),
        [f"epsilon={np.finfo(np.float32).eps}"],
    ),
    "a BatchNorm's momentum": (
        nn.BatchNorm2d(4, momentum=0.003),
        lambda rngs: nnx.BatchNorm(4, rngs=rngs),
        ["build it with momentum=0.997 (Flax's is 1 minus PyTorch's)"],
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named(name):
    weights, make, said = CAUSES[name]
    with pytest.raises(WeightsMismatch) as raised:
        to_flax(weights, target(make))
    for words in said:
        assert words in str(raised.value)
    if "eps" in name:
        assert not {"momentum", "BatchNorm"} & set(str(raised.value).replace(".", " ").split())


def test_a_sequence_has_no_layers_in_its_names():
    theirs = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))})
    body = lambda rngs: nnx.Sequential(linear(rngs), nnx.relu, nnx.Sequential(linear(rngs)))  # noqa: E731
    weights, manifest = to_flax(theirs, target(lambda rngs: Module(body=body(rngs))))
    kernel = weights["body"]["layers"][2]["layers"][0]["kernel"].get_value()
    assert np.array_equal(kernel, theirs["body"][2][0].weight.detach().T)
    assert to_torch(weights, manifest).weights.keys() == theirs.state_dict().keys()


def test_hints_of_tied_weights_and_of_layers_without_a_kind_can_be_followed():
    weights = load_weights(Tied())
    del weights["head.weight"]
    to_flax(weights, target(lambda rngs: Module(embed=embedding(rngs))))
    weights["head.weight"] = weights["embed.weight"]
    to_flax(weights, target(lambda rngs: Module(embed=embedding(rngs), head=head(rngs))))
    module = integers(
        nn.ModuleDict({"up": nn.ConvTranspose2d(4, 5, 3), "fc": nn.Linear(4, 4)}), np.random.default_rng(0)
    )
    weights = load_weights(module)
    weights["up.weight"] = weights["up.weight"].transpose(2, 3, 0, 1)[::-1, ::-1]
    ours = target(lambda rngs: Module(up=nnx.ConvTranspose(4, 5, (3, 3), padding="VALID", rngs=rngs), fc=linear(rngs)))
    rules = [Rule("up.weight", "up.kernel", "array"), Rule("up.bias", "up.bias", "array")]
    nnx.update(ours, to_flax(weights, ours, rules).weights)
    x = images(np.random.default_rng(1), 1, 2, 2, 4)
    np.testing.assert_array_equal(ours.up(jnp.asarray(x)), channels_last(module["up"](channels_first(x))))


#: Settings of PyTorch's convolution and of Flax's that say the same.
ALIKE = [
    ({}, {"padding": "VALID"}),
    ({"padding": 1}, {"padding": 1}),
    ({"padding": 1}, {"padding": "SAME", "strides": None}),
    ({"padding": "same", "dilation": 2}, {"padding": "SAME", "kernel_dilation": (2, 2)}),
    ({"padding": (1, 2), "stride": 2}, {"padding": ((1, 1), (2, 2)), "strides": 2}),
    ({"padding": 1, "padding_mode": "circular"}, {"padding": "CIRCULAR"}),
    ({"padding": 1, "padding_mode": "reflect"}, {"padding": "REFLECT"}),
    ({"padding": "valid", "groups": 2}, {"padding": 0, "feature_group_count": 2}),
]

#: Settings that do not, and what is said.
UNLIKE = [
    ({}, {"padding": "SAME"}, "padding (0, 0), the target's padding is 'SAME', which is (1, 1) at 3 positions"),
    ({"padding": 1, "stride": 2}, {"padding": "SAME", "strides": 2}, "which is ((0, 1), (0, 1)) at 4 positions"),
    ({"padding": 1, "stride": 2}, {"padding": 1}, "stride (2, 2), the target has strides (1, 1)"),
    ({"stride": (1, 2)}, {"strides": (2, 1)}, "build it with strides=(1, 2)"),
    ({"dilation": 2}, {}, "dilation (2, 2), the target has kernel_dilation (1, 1)"),
    ({"padding": 1, "padding_mode": "reflect"}, {"padding": 1}, "padding (1, 1) (reflect), the target's padding is 1"),
    ({"padding": 1, "padding_mode": "replicate"}, {"padding": 1}, "padding_mode 'replicate', which Flax lacks"),
    ({"padding": 1}, {"padding": ((1, 0), (0, 1))}, "padding (1, 1), the target's padding is ((1, 0), (0, 1))"),
    ({}, {"input_dilation": 2}, "no input dilation, the target's input_dilation is (2, 2)"),
]


@pytest.mark.parametrize(("theirs", "ours"), ALIKE)
def test_settings_of_a_convolution_that_say_the_same_are_taken(theirs, ours):
    to_flax(nn.Conv2d(8, 8, 3, **theirs), target(lambda rngs: conv(rngs, **ours)))


@pytest.mark.parametrize(("theirs", "ours", "said"), UNLIKE)
def test_other_settings_of_a_convolution_are_named_unless_not_asked_for(theirs, ours, said):
    module, layer = nn.Conv2d(8, 8, 3, **theirs), target(lambda rngs: conv(rngs, **ours))
    with pytest.raises(WeightsMismatch) as raised:
        to_flax(module, layer)
    assert said in str(raised.value) and "momentum" not in str(raised.value)
    to_flax(module, layer, settings=False)
    to_flax(load_weights(module), layer)  # a checkpoint does not have them


def test_a_strided_convolution_is_no_matrix():
    with pytest.raises(WeightsMismatch, match=r"stride \(2, 2\), and the target is a matrix"):
        to_flax(nn.Conv2d(4, 4, 1, stride=2), target(linear), [Rule("", "", "pointwise")])


@pytest.mark.parametrize(
    "theirs, said",
    [
        ({"stride": 1}, r"the layer has stride \(1, 1\), the target has strides \(2, 2\)"),
        ({"padding": 0}, r"the layer has padding \(0, 0\), the target's padding is 1"),
        ({"padding": 0, "output_padding": 0}, r"the layer has output_padding \(0, 0\), the target has output_padding"),
    ],
)
def test_settings_of_transposed_layers_are_compared(theirs, said):
    layer = nn.ConvTranspose2d(4, 4, 3, groups=4, **{"stride": 2, "padding": 1, "output_padding": 1, **theirs})
    ours = target(lambda rngs: DepthwiseConvTranspose(4, (3, 3), 2, padding=1, output_padding=1, rngs=rngs))
    with pytest.raises(WeightsMismatch, match=said):
        to_flax(layer, ours)


def test_a_causal_layer_takes_a_convolution_that_is_padded_at_the_front():
    ours = target(lambda rngs: CausalConv1d(4, 4, rngs=rngs))
    for padding in (0, 3):
        to_flax(nn.Conv1d(4, 4, 4, groups=4, padding=padding), ours)
    with pytest.raises(WeightsMismatch, match=r"padding \(1,\), and a causal convolution has 3 zeros before the start"):
        to_flax(nn.Conv1d(4, 4, 4, groups=4, padding=1), ours)
    with pytest.raises(WeightsMismatch, match=r"dilation \(2,\), and a causal convolution has 1"):
        to_flax(nn.Conv1d(4, 4, 4, groups=4, dilation=2), ours)


def test_a_transposed_convolution_is_no_convolution():
    with pytest.raises(WeightsMismatch, match="the layer has a transposed convolution, the target a Conv"):
        to_flax(nn.ConvTranspose2d(8, 8, 3), target(conv))


def test_another_librarys_conventions_are_named_and_rules_add_to_an_architectures():
    theirs = reference("torchvision.mobilenet_v3_small", width=0.35)
    with pytest.raises(WeightsMismatch, match=r"build the target with `like='torchvision'`"):
        to_flax(theirs, empty_model("mobilenet_v3_small", "torchvision", num_classes=10, width=0.35, bn_epsilon=1e-5))
    state = load_weights(theirs)
    for leaf in ("weight", "bias"):
        state[f"fc.{leaf}"] = state.pop(f"classifier.3.{leaf}")
    ours = empty_model("mobilenet_v3_small", "torchvision", num_classes=10, width=0.35)
    converted = to_flax(state, ours, [Rule("fc", "classifier", "linear")])
    assert converted.manifest.rules == "your own, and of torchvision.mobilenet_v3_small"
    assert np.array_equal(converted.weights["classifier"]["kernel"].get_value(), state["fc.weight"].T)


def test_a_layer_that_pads_by_code_of_its_own_is_not_compared_in_that():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    to_flax(Same(8, 8, 3), target(lambda rngs: conv(rngs, padding="SAME")))


@functools.cache
def exported():
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
    return buffer.getvalue()


def scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def numpys():
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(2))
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/readme.txt", "")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (exported, "a.pt2", r"an exported program .*\.pt2 archive.*torch\.export\.load\('.*a\.pt2'\)\.state_dict"),
        (exported, "a.pt", r"an exported program"),
        (scripted, "a.pt", r"TorchScript, a program.*torch\.jit\.load"),
        (numpys, "a.npz", r"archive of NumPy.*load_weights\(dict\(np\.load"),
        (zipped, "a.zip", r"a zip archive, and no PyTorch checkpoint: .* it has 'model/readme\.txt"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # that TorchScript is deprecated
def test_a_sound_archive_that_is_no_checkpoint_is_named_and_not_called_damaged(make, name, said, tmp_path):
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ValueError, match=said) as raised:
        load_weights(tmp_path / name)
    assert "corrupt" not in str(raised.value) and "whole" not in str(raised.value)


def test_what_is_said_of_an_exported_program_can_be_followed(tmp_path):
    (tmp_path / "a.pt2").write_bytes(exported())
    torch.save(dict(torch.export.load(tmp_path / "a.pt2").state_dict), tmp_path / "weights.pt")
    assert set(load_weights(tmp_path / "weights.pt")) == {"weight", "bias"}


def test_lazy_parameters_are_named():
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias, 1\.weight.* are lazy: .* Run the model once"):
        to_flax(module, target(conv))


def test_big_endian_arrays_keep_their_values_both_ways(tmp_path):
    little = arrays(weight=(4, 4), bias=4)
    big = {name: array.astype(">f4") for name, array in little.items()}
    weights, manifest = to_flax(big, target(linear))
    assert np.array_equal(weights["kernel"].get_value(), little["weight"].T)
    assert manifest == to_flax(little, target(linear)).manifest
    tree = {"kernel": big["weight"].T, "bias": big["bias"]}
    back = to_torch(tree, [Rule("", "", "linear")], tensors=True).weights
    assert all(np.array_equal(back[name], array) for name, array in little.items())
    assert all(array.dtype.isnative for array in load_weights(big).values())
    write_safetensors(tmp_path / "a.safetensors", big)
    assert np.array_equal(load_weights(tmp_path / "a.safetensors")["bias"], little["bias"])


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(1, [("a", "f4")]), np.zeros(1, "M8[s]")])
def test_arrays_of_no_numbers_are_refused(array):
    with pytest.raises(TypeError, match=r"tensor 'weight' has dtype .*, expected numbers"):
        to_flax({"weight": array}, target(linear))


def test_the_bytes_of_many_names_are_read_a_few_times_each(monkeypatch):
    """A checkpoint of 300,000 names that nothing places took minutes: each was compared with each."""
    read = []
    octets = hints.octets
    monkeypatch.setattr(hints, "octets", lambda array: read.append(array) or octets(array))
    weights = {f"n{number}": np.full(2, number, np.float32) for number in range(500)}
    weights |= {"first.weight": (tied := np.arange(2, dtype=np.float32) + 0.5), "second.weight": tied}
    rules = [Rule("first", "first", "norm")]
    with pytest.raises(WeightsMismatch, match=r"tied weights: second\.weight is first\.weight"):
        to_flax(weights, {"first": {"scale": np.zeros(2, np.float32)}}, rules)
    assert len(read) <= 2 * len(weights)
