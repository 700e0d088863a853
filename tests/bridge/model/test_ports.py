"""Any pair of models: a port that is right passes, and a mistake is named at the first operation that has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import bridge
from bridge import Verdict, to_flax
from bridge.model import model_parity
from bridge.report.model import summary, why
from tests.bridge.model.test_parity import noise, pair


class Theirs(torch.nn.Module):
    """Convolution, normalizations, a ConvNeXt block and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.dw = torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.ln = torch.nn.LayerNorm(8)
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 8)
        self.gamma = torch.nn.Parameter(torch.ones(8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(torch.nn.functional.gelu(self.up(self.ln(y))))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Ours(nnx.Module):
    """The port of `Theirs`; each keyword plants one mistake."""

    def __init__(self, rngs, *, epsilon=1e-5, exact=True, residual=True, scale=True, bias=True, gamma=True, padding=1):
        self.conv = nnx.Conv(3, 8, (3, 3), 2, padding=padding, rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dw = nnx.Conv(8, 8, (3, 3), padding=1, feature_group_count=8, rngs=rngs)
        self.ln = nnx.LayerNorm(8, epsilon=epsilon, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones(8))
        self.head = nnx.Linear(8, 5, rngs=rngs)
        self.exact, self.residual, self.has_gamma = exact, residual, gamma
        self.has_scale, self.has_bias = scale, bias

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        y = nnx.gelu(self.up(self.ln(self.dw(x))), approximate=not self.exact)
        y = self.down(y)
        y = self.gamma[...][None, None, None] * y if self.has_gamma else y
        x = x + y if self.residual else y
        return self.head(x.mean((1, 2)))


def drawn(module, seed):
    """The module with random weights and statistics, in eval mode."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                values = (
                    rng.uniform(0.5, 2, tensor.shape) if name.endswith("var") else rng.standard_normal(tensor.shape)
                )
                tensor.copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return module.eval()


def twins(seed, **mistakes):
    """Both models with the same weights, and the manifest."""
    theirs, ours = drawn(Theirs(), seed), Ours(nnx.Rngs(0), **mistakes)
    converted = to_flax(theirs, ours, settings=False)
    nnx.update(ours, converted.weights)
    return theirs, ours, converted.manifest


def wrong(found):
    return [layer.name for layer in found.layers if layer.isolated and not layer.verdict.passes]


@pytest.mark.parametrize("named", [True, False])
def test_a_port_passes_with_a_manifest_and_without_one(seed, named):
    theirs, ours, manifest = twins(seed)
    found = bridge.model_parity(theirs, ours, noise(seed, 16), weights=manifest if named else None)
    assert found.verdict.passes and not found.left and not found.not_compared, summary(found)
    assert [layer.kind for layer in found.layers] == [
        "convolution",
        "batch norm",
        "relu",
        "depthwise",
        "layer norm",
        "linear",
        "gelu",
        "linear",
        "multiply",
        "add",
        "mean",
        "linear",
    ]
    assert [layer.name for layer in found.layers][:3] == ["conv", "bn", "bn.relu"]


@pytest.mark.parametrize(
    ("mistake", "layer", "said"),
    [
        ({"epsilon": 1e-6}, "ln", "epsilon is 1e-06 in JAX, and 1e-05 in PyTorch"),
        ({"exact": False}, "gelu_(tanh)", "JAX computes gelu (tanh) where PyTorch computes gelu"),
        ({"residual": False}, "add", "JAX computes nothing where PyTorch computes add"),
        ({"gamma": False}, "gamma", "JAX computes nothing where PyTorch computes multiply"),
        ({"padding": "SAME"}, "conv", "SAME"),
    ],
)
def test_a_mistake_is_named_where_it_is_and_nothing_else_is_wrong(seed, mistake, layer, said):
    theirs, ours, manifest = twins(seed, **mistake)
    found = model_parity(theirs, ours, noise(seed, 16), manifest)
    assert wrong(found) == [found.first_wrong.name], summary(found)
    assert found.first_wrong.name.endswith(layer)
    assert said in why(found.first_wrong) and found.first_wrong.verdict is Verdict.CONVENTION


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="out")(linen.relu(linen.Dense(6, name="up")(x)))


def test_linen_modules_functions_and_trees_are_read(seed):
    theirs = drawn(torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), seed)
    w1, b1, _, w2, b2 = (
        *(p.detach().numpy() for p in theirs[0].parameters()),
        None,
        *(p.detach().numpy() for p in theirs[2].parameters()),
    )
    parameters = {"up": {"kernel": w1.T, "bias": b1}, "out": {"kernel": w2.T, "bias": b2}}
    x = np.random.default_rng(seed).standard_normal((3, 5), np.float32)

    def function(p, x):
        x = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"][None])
        return x @ p["out"]["kernel"] + p["out"]["bias"][None]

    for model in (
        (Dense(), {"params": parameters}),
        (function, parameters),
        jax.tree_util.Partial(function, parameters),
    ):
        found = bridge.model_parity(theirs, model, x)
        assert found.verdict.passes and [layer.kind for layer in found.layers] == ["linear", "relu", "linear"]


def test_a_mobilenet_is_no_special_case_and_orders_explain_all_that_is_right(seed):
    theirs, ours, _ = pair("torchvision.mobilenet_v2", seed, 0.25)
    ours.blocks[3].depthwise.norm.epsilon = 1e-3
    found = model_parity(theirs, ours, noise(seed))
    others = [layer for layer in found.layers if layer is not found.first_wrong]
    assert all(layer.verdict.rank() <= Verdict.EXPLAINED.rank() for layer in others)
    assert found.explained == sum(layer.isolated.different for layer in others) > 0
    assert wrong(found) == ["blocks.3.depthwise.norm"] and "epsilon is 0.001 in JAX" in found.first_wrong.cause
    kinds = [layer.kind for layer in found.layers]
    assert kinds.count("batch norm") == 52 and kinds.count("depthwise") == 17 and kinds.count("pointwise") == 34
    assert not found.left and not found.not_compared


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (np.zeros((1, 16, 16, 3)), r"`inputs` has a float64 \(1, 16, 16, 3\), expected NumPy arrays of float32"),
        ({"jax": np.zeros((1, 2), np.float32)}, "expected 'jax' and 'torch'"),
    ],
)
def test_unusable_inputs_are_refused(inputs, said):
    theirs, ours, _ = twins(0)
    with pytest.raises(ValueError, match=said):
        bridge.model_parity(theirs, ours, inputs)


def test_what_is_no_model_is_refused():
    theirs, _, _ = twins(0)
    with pytest.raises(TypeError, match=r"`model` is a int, expected an nnx\.Module"):
        bridge.model_parity(theirs, 3, noise(0, 16))


def written_norm(p, x, epsilon=1e-5):
    """Return a layer norm whose scale follows the statistics, then a product."""
    m = x.mean(-1, keepdims=True)
    y = (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + epsilon)
    y = y * p["scale"][None, None] + p["bias"][None, None]
    return jax.nn.relu(y @ p["kernel"])


def test_a_norm_whose_scale_follows_its_statistics_is_right():
    generator = np.random.default_rng(0)
    theirs = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 6, bias=False), torch.nn.ReLU())
    torch.nn.init.normal_(theirs[0].weight)
    torch.nn.init.normal_(theirs[0].bias)
    names = {"scale": theirs[0].weight, "bias": theirs[0].bias, "kernel": theirs[1].weight.T}
    p = {name: jnp.asarray(value.detach().numpy()) for name, value in names.items()}
    x = generator.standard_normal((2, 5, 8)).astype(np.float32)
    assert bridge.model_parity(theirs, (written_norm, p), x).verdict.passes
    wrong = bridge.model_parity(theirs, (lambda p, x: written_norm(p, x, 1e-3), p), x)
    assert not wrong.verdict.passes


def test_models_that_print_or_compute_nothing_are_compared_and_while_is_named():
    x = np.ones((2, 3), np.float32)
    p = {"unused": jnp.ones(2)}

    def prints(p, x):
        jax.debug.print("{}", x[0, 0])
        return jax.nn.relu(x)

    assert bridge.model_parity(torch.nn.ReLU(), (prints, p), x).verdict.passes
    assert bridge.model_parity(torch.nn.Identity(), (lambda p, x: x, p), x).verdict is Verdict.IDENTICAL
    with pytest.raises(ValueError, match="while"):
        bridge.model_parity(
            torch.nn.ReLU(), (lambda p, x: jax.lax.while_loop(lambda c: c.sum() < 0, jax.nn.relu, x), p), x
        )


class Attention(torch.nn.Module):
    """PyTorch computes the norm three times, and adds a branch whose last layer starts from zeros."""

    def __init__(self, is_drawn):
        super().__init__()
        self.n, self.out = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)
        if is_drawn:
            torch.nn.init.normal_(self.n.weight)
            torch.nn.init.normal_(self.n.bias)

    def forward(self, x):
        weights = torch.softmax(self.q(self.n(x)) @ self.k(self.n(x)).transpose(-1, -2), -1)
        y = weights @ self.v(self.n(x))
        return y + self.out(torch.relu(y))


def attention(p, x, has_branch=True):
    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"][None, None]

    m = x.mean(-1, keepdims=True)
    x = (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-5)
    x = x * p["n.weight"][None, None] + p["n.bias"][None, None]
    y = jax.nn.softmax(linear("q", x) @ jnp.swapaxes(linear("k", x), -1, -2), -1) @ linear("v", x)
    return y + linear("out", jax.nn.relu(y)) if has_branch else y


@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_norm_that_runs_three_times_is_right_and_a_missing_branch_of_zeros_is_wrong(is_drawn, seed):
    torch.manual_seed(seed)
    theirs = Attention(is_drawn)
    p = {name: jnp.asarray(value.detach().numpy()) for name, value in theirs.state_dict().items()}
    x = np.random.default_rng(seed).standard_normal((2, 5, 8)).astype(np.float32)
    assert bridge.model_parity(theirs, (attention, p), x).verdict.passes
    wrong = bridge.model_parity(theirs, (functools.partial(attention, has_branch=False), p), x)
    assert wrong.verdict is Verdict.CONVENTION
    assert wrong.first_wrong.cause.startswith("JAX computes nothing where PyTorch computes relu and then linear")


def of(theirs):
    """The parameters of a module as JAX's arrays, by PyTorch's names."""
    return {name: jnp.asarray(value.float().numpy()) for name, value in theirs.state_dict().items()}


def dense(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"][None]


class Two(torch.nn.Module):
    """Two results of one input, the names of which a mapping has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)

    def forward(self, x, scale=None):
        y = self.a(x) if scale is None else self.a(x) * scale
        return {"logits": y, "best": y.argmax(-1), "other": self.b(x).sum()}


def two(p, x, scale=None):
    y = dense(p, "a", x) if scale is None else dense(p, "a", x) * scale
    return {"best": y.argmax(-1), "logits": y, "other": dense(p, "b", x).sum()}


def test_results_of_any_structure_integers_and_numbers_are_compared(seed):
    theirs = drawn(Two(), seed)
    x = np.random.default_rng(seed).standard_normal((3, 5), np.float32)
    for given in (x, {"x": x, "scale": x[:, :1]}, {"jax": {"x": x, "scale": x[:, :1]}, "torch": [x, x[:, :1]]}):
        assert bridge.model_parity(theirs, (two, of(theirs)), given).verdict.passes
    only = bridge.model_parity(theirs, (lambda p, x: two(p, x)["logits"], of(theirs)), x)
    assert only.verdict.passes and not only.left
    smallest = lambda p, x: {**two(p, x), "best": two(p, x)["logits"].argmin(-1)}  # noqa: E731
    wrong = bridge.model_parity(theirs, (smallest, of(theirs)), x)
    assert wrong.verdict is Verdict.BUG and "argmin where PyTorch computes argmax" in wrong.first_wrong.cause


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda p, x: x @ p["none"], r"`model` fails on `inputs` of shape \(3, 5\): KeyError: 'none'"),
        (lambda p, x: "text", "it returns a str, expected arrays"),
        (lambda p, x: {"logits": x, "more": x}, "`model` gives 'more', and PyTorch gives only 'logits'"),
        (lambda p, x: (x, x, x, x), "`model` gives 4 arrays, and PyTorch 3"),
    ],
)
def test_a_function_that_fails_or_returns_something_else_is_named(function, said):
    theirs = drawn(Two(), 0)
    with pytest.raises(ValueError, match=said):
        bridge.model_parity(theirs, (function, of(theirs)), np.ones((3, 5), np.float32))


def test_a_module_that_fails_is_named_with_its_path():
    theirs, ours, _ = twins(0)
    ours.ln.__class__ = type("Broken", (nnx.LayerNorm,), {"__call__": lambda self, x: x["a"]})
    with pytest.raises(ValueError, match="`model` fails in ln on `inputs` of shape"):
        bridge.model_parity(theirs, ours, noise(0, 16))


def test_what_is_wrong_before_a_model_fails_is_named():
    theirs, ours, manifest = twins(0)
    ours.dw.strides = 2  # its result does not fit the residual
    with pytest.raises(ValueError, match=r"`model` fails .*; wrong before it: dw: stride is 2 in JAX"):
        bridge.model_parity(theirs, ours, noise(0, 16), manifest)


def test_a_wrong_stride_is_named_where_it_is(seed):
    theirs, ours, manifest = twins(seed)
    ours.conv.strides = 1
    found = bridge.model_parity(theirs, ours, noise(seed, 16), weights=manifest)
    assert found.first_wrong.name == "conv" and "stride is 1 in JAX, and (2, 2)" in found.first_wrong.cause
    theirs = drawn(torch.nn.Conv2d(3, 4, 3, 2, 1), seed)
    function = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding=[(1, 1)] * 2)
    p = {"weight": jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0)), "bias": of(theirs)["bias"]}

    def last(p, x):
        return function(x, p["weight"], dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["bias"][None, None, None]

    found = bridge.model_parity(theirs, (last, p), noise(seed, 9))
    assert "stride is 1 in JAX" in found.first_wrong.cause
    assert found.logits is None and found.verdict.exit_code == 1


def test_weights_of_other_bits_and_a_momentum_are_named_in_any_port(seed):
    theirs, ours, manifest = twins(seed)
    kernel = ours.up.kernel
    kernel[...] = kernel[...].at[3, 2].set(jnp.nextafter(kernel[3, 2], jnp.inf))
    ours.bn.momentum = 0.1
    found = bridge.model_parity(theirs, ours, noise(seed, 16), weights=manifest)
    assert wrong(found) == ["bn", "up"]
    by_name = {layer.name: layer.cause for layer in found.layers}
    assert "up.weight has other bits in 1 of 128 elements, by at most 1 ULP; the first is (2, 3)" in by_name["up"]
    assert "Flax's momentum is the weight of the old ones" in by_name["bn"]


def test_statistics_of_the_batch_are_named(seed):
    theirs, ours, manifest = twins(seed)
    call = nnx.BatchNorm.__call__
    ours.bn.__class__ = type("Own", (nnx.BatchNorm,), {"__call__": lambda self, x: call(self, x, False)})
    found = bridge.model_parity(theirs, ours, noise(seed, 16), weights=manifest)
    assert found.first_wrong.name == "bn"
    assert "JAX normalizes by the statistics of this batch, and PyTorch by the running ones" in found.first_wrong.cause


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_modules_in_half_precision_are_compared(dtype, seed):
    theirs = drawn(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 4)), seed)
    theirs = theirs.to(getattr(torch, dtype))
    p = jax.tree.map(lambda x: x.astype(dtype), of(theirs))
    x = np.random.default_rng(seed).standard_normal((3, 8)).astype(jnp.dtype(dtype))

    def port(p, x, function=None):
        y = dense(p, "0", x)
        return dense(p, "2", jax.nn.gelu(y, approximate=False) if function is None else function(y))

    assert bridge.model_parity(theirs, (port, p), x).verdict.passes
    wrong = bridge.model_parity(theirs, (functools.partial(port, function=jax.nn.relu), p), x)
    assert "relu where PyTorch computes gelu" in wrong.first_wrong.cause
    wide = jax.tree.map(lambda x: x.astype("float32"), p)
    single = bridge.model_parity(theirs, (lambda p, x: port(p, x.astype("float32")), wide), x)
    assert single.verdict is Verdict.PRECISION and f"PyTorch computes in {dtype} here" in single.first_wrong.cause
    with pytest.raises(ValueError, match=f"`gradients` needs a module in float32, .* {dtype}"):
        bridge.model_parity(theirs, (port, p), x, gradients=True)


def test_tokens_are_looked_up_and_other_rows_are_named(seed):
    theirs = drawn(torch.nn.Sequential(torch.nn.Embedding(11, 5), torch.nn.Linear(5, 3)), seed)
    ids = np.random.default_rng(seed).integers(0, 11, (2, 7))

    def port(p, ids, shift=0):
        return p["0.weight"][ids - shift] @ p["1.weight"].T + p["1.bias"][None, None]

    assert bridge.model_parity(theirs, (port, of(theirs)), ids).verdict.passes
    wrong = bridge.model_parity(theirs, (functools.partial(port, shift=1), of(theirs)), ids)
    assert "JAX takes other elements of 0 than PyTorch" in wrong.first_wrong.cause


def test_a_function_that_goes_on_from_another_is_named_as_one(seed):
    theirs = drawn(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), seed)
    x = 9 * np.random.default_rng(seed).standard_normal((3, 8), np.float32)
    found = bridge.model_parity(theirs, (lambda p, x: dense(p, "2", jax.nn.relu6(dense(p, "0", x))), of(theirs)), x)
    assert "JAX computes relu6 where PyTorch computes relu" in found.first_wrong.cause


class Causal(torch.nn.Module):
    """A causal convolution, padded beforehand or cut off afterwards, and masked attention over its results."""

    def __init__(self, is_cut):
        super().__init__()
        self.is_cut = is_cut
        self.conv = torch.nn.Conv1d(6, 6, 4, padding=3 if is_cut else 0)
        self.out = torch.nn.Linear(6, 6)
        self.register_buffer("mask", torch.full((9, 9), -torch.inf).triu(1))

    def forward(self, x):
        x = self.conv(x)[..., : x.shape[-1]] if self.is_cut else self.conv(torch.nn.functional.pad(x, (3, 0)))
        x = self.out(x.transpose(1, 2))
        return torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ x


def causal(p, x, padding=(3, 0), is_masked=True):
    settings = {"window_strides": (1,), "padding": [padding], "dimension_numbers": ("NWC", "WIO", "NWC")}
    x = jax.lax.conv_general_dilated(x, p["conv.weight"].transpose(2, 1, 0), **settings) + p["conv.bias"][None, None]
    x = x @ p["out.weight"].T + p["out.bias"][None, None]
    y = x @ x.swapaxes(1, 2)
    return jax.nn.softmax(y + p["mask"][None] if is_masked else y, -1) @ x


def causal_parity(seed, is_cut, **mistake):
    theirs = drawn(Causal(is_cut), seed)
    theirs.mask.copy_(torch.full((9, 9), -torch.inf).triu(1))
    x = np.random.default_rng(seed).standard_normal((2, 9, 6), np.float32)
    inputs = {"jax": x, "torch": x.transpose(0, 2, 1).copy()}
    return bridge.model_parity(theirs, (functools.partial(causal, **mistake), of(theirs)), inputs)


@pytest.mark.parametrize("is_cut", [True, False])
@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({}, ""),
        ({"padding": (1, 2)}, "JAX pads by SAME, ((1, 2),), and PyTorch by "),
        ({"padding": (0, 3)}, "((0, 3),), and PyTorch by "),
        ({"is_masked": False}, "JAX computes nothing where PyTorch computes add with mask"),
    ],
)
def test_causal_padding_and_a_missing_mask_are_named(is_cut, mistake, said, seed):
    found = causal_parity(seed, is_cut, **mistake)
    assert found.verdict is Verdict.CONVENTION if mistake else found.verdict.passes, summary(found)
    if mistake:
        assert said in found.first_wrong.cause and wrong(found) == [found.first_wrong.name]
        assert ("as a causal convolution" in found.first_wrong.cause) == ("padding" in mistake)


def test_scores_that_are_symmetric_but_for_rounding_are_no_mistake():
    """On some processors x @ x.T differs from its transpose by rounding: so it fits both, and only one is right."""
    found = causal_parity(2611543507, is_cut=True)
    assert found.verdict.passes, summary(found)


class Square(torch.nn.Module):
    """Images with as many channels as rows and columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        return torch.sigmoid(torch.nn.functional.silu(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("is_swapped", [False, True])
def test_as_many_channels_as_rows_are_still_channels(is_swapped, seed):
    theirs = drawn(Square(), seed)

    def ours(p, x):
        def conv(x, name, groups):
            numbers = ("NHWC", "HWIO", "NHWC")
            kernel = p[f"{name}.weight"].transpose(2, 3, 1, 0)
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
            )
            return y + p[f"{name}.bias"][None, None, None]

        y = conv(x, "a", 1)
        y = conv(jnp.tanh(y.swapaxes(1, 2) if is_swapped else y), "b", 6)
        return jax.nn.sigmoid(jax.nn.silu(y))

    x = np.random.default_rng(seed).standard_normal((2, 6, 6, 6), np.float32)
    found = bridge.model_parity(theirs, (ours, of(theirs)), {"jax": x, "torch": np.moveaxis(x, -1, 1).copy()})
    if is_swapped:
        assert "axes 1 and 2 of its input swapped" in found.first_wrong.cause and "NCHW" not in found.first_wrong.cause
    else:
        assert found.verdict.passes, summary(found)


class Permuted(torch.nn.Module):
    """A function after the axes have been permuted, as PyTorch needs it before a layer of channels last."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Linear(4, 5), function

    def forward(self, x):
        return self.b(self.function(self.a(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize("name", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("is_permuted_in_jax", [False, True])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_function_of_permuted_elements_is_the_same_function(name, is_permuted_in_jax, is_wrong, seed):
    theirs = drawn(Permuted(getattr(torch.nn.functional, name)), seed)

    def ours(p, x):
        kernel = p["a.weight"].transpose(2, 3, 1, 0)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = y + p["a.bias"][None, None, None]
        function = jax.nn.gelu if is_wrong else getattr(jax.nn, name)
        y = function(y.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1) if is_permuted_in_jax else function(y)
        return y @ p["b.weight"].T + p["b.bias"][None, None, None]

    x = np.random.default_rng(seed).standard_normal((2, 5, 7, 4), np.float32)
    found = bridge.model_parity(theirs, (ours, of(theirs)), {"jax": x, "torch": np.moveaxis(x, -1, 1).copy()})
    if is_wrong:
        assert f"JAX computes gelu (tanh) where PyTorch computes {name}" in found.first_wrong.cause
    else:
        assert found.verdict.passes, summary(found)


class Steps(torch.nn.Module):
    """A function of the last axis, and a mean over the axis before it."""

    def __init__(self, function, scale, offset):
        super().__init__()
        self.first, self.last, self.function = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), function
        with torch.no_grad():
            self.first.weight.mul_(scale)
            self.first.bias.add_(offset)

    def forward(self, x):
        return self.last(self.function(self.first(x)).mean(1))


FUNCTIONS = {
    "softmax": (lambda x: x.softmax(-1), jax.nn.softmax),
    "log softmax": (lambda x: x.log_softmax(-1), jax.nn.log_softmax),
    "relu": (torch.relu, jax.nn.relu),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "length, scale, offset", [(1, 1, 0), (3, 1, 0), (3, 60, 0), (3, 200, 0), (1, 60, 0), (3, 1, -99)]
)
def test_steps_that_change_no_number_here_are_not_called_wrong(name, length, scale, offset, seed):
    """The sum of a softmax that is one at one place, and the mean of one thing or of zeros."""
    theirs, ours = FUNCTIONS[name]
    torch.manual_seed(seed % 2**32)
    module = Steps(theirs, scale, offset).eval()
    parameters = {name: each.detach().numpy() for name, each in module.named_parameters()}

    def port(parameters, x):
        y = x @ parameters["first.weight"].T + parameters["first.bias"][None, None]
        return ours(y).mean(1) @ parameters["last.weight"].T + parameters["last.bias"][None]

    x = np.random.default_rng(seed).standard_normal((2, length, 6), np.float32)
    found = model_parity(module, (port, parameters), x)
    assert found.verdict.passes and not found.left, summary(found)
