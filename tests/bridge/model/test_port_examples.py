"""The ports in examples/ports/ against the originals: clean ones pass, and the place of a planted mistake is named."""

import jax
import jax.numpy as jnp
import pytest
import typer.testing
from flax import nnx

import bridge
from bridge import Verdict, cli
from bridge.libraries import import_library
from bridge.report.model import summary, why
from examples.ports import convnext, vit

try:
    import_library("timm")
except ImportError:
    pytest.skip("timm is not installed: pip install 'jaxdw[models]'", allow_module_level=True)

RUNNER = typer.testing.CliRunner()


def attend(transform):
    """A `__call__` of the attention with another core."""

    def call(self, x):
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        return self.proj(transform(q, k, v).reshape(x.shape))

    return call


def dropped(self, x):
    y = self.mlp(self.norm(self.conv_dw(x)))
    y = y * jax.random.bernoulli(jax.random.key(0), 0.5, y.shape) * 2
    return x + y * self.gamma.reshape(1, 1, 1, -1)


def scaled(self, x):
    x = (x - 0.5) / 0.25
    for layer in (*self.stem, *self.stages):
        x = layer(x)
    return self.head(x)


def changed(path, change):
    """Plant a change of a parameter or a setting at a path."""

    def plant(model, monkeypatch):
        *parts, last = path.split(".")
        for part in parts:
            model = model[int(part)] if part.isdecimal() else getattr(model, part)
        value = getattr(model, last)
        if isinstance(value, nnx.Variable):
            value[...] = change(value[...])
        else:
            setattr(model, last, change(value))

    return plant


def calls(kind, function):
    """Plant another `__call__` of a class."""
    return lambda model, monkeypatch: monkeypatch.setattr(kind, "__call__", function)


attention = jax.nn.dot_product_attention

#: Name, the pair, what is planted, the end of the first wrong operation's name, its verdict, and what is said of it.
PLANTED = {
    "scale of attention": (
        vit.mini,
        calls(vit.Attention, attend(lambda q, k, v: attention(q, k, v, scale=1.0))),
        ("blocks.0.attn.", Verdict.CONVENTION, "JAX scales by 1, and PyTorch by 0.25"),
    ),
    "causal mask": (
        vit.mini,
        calls(vit.Attention, attend(lambda q, k, v: attention(q, k, v, is_causal=True))),
        ("blocks.0.attn.", Verdict.CONVENTION, "JAX masks the future"),
    ),
    "order of q and k": (
        vit.mini,
        calls(vit.Attention, attend(lambda q, k, v: attention(k, q, v))),
        ("blocks.0.attn.", Verdict.CONVENTION, "JAX exchanges query and key"),
    ),
    "order of k and v": (
        vit.mini,
        calls(vit.Attention, attend(lambda q, k, v: attention(q, v, k))),
        ("blocks.0.attn.", Verdict.CONVENTION, "JAX exchanges key and value"),
    ),
    "tanh of GELU": (
        vit.mini,
        calls(vit.Mlp, lambda self, x: self.fc2(nnx.gelu(self.fc1(x)))),
        ("blocks.0.mlp.gelu_(tanh)", Verdict.CONVENTION, "gelu (tanh) where PyTorch computes gelu"),
    ),
    "epsilon": (
        vit.mini,
        changed("blocks.1.norm2.epsilon", lambda _: 1e-5),
        ("blocks.1.norm2", Verdict.CONVENTION, "epsilon is 1e-05 in JAX, and 1e-06 in PyTorch"),
    ),
    "bias": (
        vit.mini,
        changed("blocks.1.attn.proj.bias", jnp.zeros_like),
        ("blocks.1.attn.proj", Verdict.CONVENTION, "JAX leaves the bias out"),
    ),
    "transposed matrix": (
        vit.mini,
        changed("blocks.1.attn.proj.kernel", jnp.transpose),
        ("blocks.1.attn.proj", Verdict.CONVENTION, "JAX's kernel is transposed"),
    ),
    "order of blocks": (
        vit.mini,
        changed("blocks", lambda blocks: nnx.List([blocks[1], blocks[0]])),
        ("blocks.0.norm1", Verdict.BUG, "has the numbers of blocks.1.norm1.weight"),
    ),
    "post-norm": (
        vit.mini,
        calls(vit.Block, lambda self, x: self.norm1(x + self.attn(x))),
        ("blocks.0.attn.qkv", Verdict.BUG, "it reads pos_embed in JAX, and blocks.0.norm1 in PyTorch"),
    ),
    "half precision": (
        vit.mini,
        changed("blocks.0.mlp.fc2.dtype", lambda _: jnp.bfloat16),
        ("blocks.0.mlp.fc2", Verdict.PRECISION, "JAX computes in bfloat16"),
    ),
    "layer scale": (
        convnext.mini,
        calls(convnext.Block, lambda self, x: x + self.mlp(self.norm(self.conv_dw(x)))),
        ("multiply", Verdict.CONVENTION, "JAX computes nothing where PyTorch computes multiply"),
    ),
    "flipped kernel": (
        convnext.mini,
        changed("stages.1.blocks.0.conv_dw.kernel", lambda kernel: kernel[::-1, ::-1]),
        ("stages.1.blocks.0.conv_dw", Verdict.CONVENTION, "flipped"),
    ),
    "height and width": (
        convnext.mini,
        changed("stages.1.blocks.0.conv_dw.kernel", lambda kernel: kernel.transpose(1, 0, 2, 3)),
        ("stages.1.blocks.0.conv_dw", Verdict.CONVENTION, "transposed"),
    ),
    "axis of the norm": (
        convnext.mini,
        changed("stages.2.blocks.1.norm.reduction_axes", lambda _: (1, 2)),
        ("stages.2.blocks.1.norm", Verdict.CONVENTION, "JAX normalizes over the axes (1, 2)"),
    ),
    "activation": (
        convnext.mini,
        calls(convnext.Mlp, lambda self, x: self.fc2(nnx.relu(self.fc1(x)))),
        ("stages.0.blocks.0.mlp.relu", Verdict.CONVENTION, "JAX computes relu where PyTorch computes gelu"),
    ),
    "scale of the input": (
        convnext.mini,
        calls(convnext.ConvNeXt, scaled),
        ("sub_and_then_div", Verdict.CONVENTION, "JAX computes sub and then div where PyTorch computes nothing"),
    ),
    "dropout": (
        convnext.mini,
        calls(convnext.Block, dropped),
        ("stages.0.blocks.0", Verdict.CONVENTION, "dropout is on"),
    ),
}


@pytest.mark.parametrize("make", [convnext.mini, vit.mini])
def test_a_port_passes(make, seed, full):
    if not full and make is not (convnext.mini, vit.mini)[seed % 2]:
        pytest.skip("the other port was drawn")
    theirs, ours, image, manifest = make(seed)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = bridge.model_parity(theirs, ours, image, manifest)
    assert found.verdict.passes and not found.left and not found.not_compared, summary(found)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_the_first_that_is_wrong_and_its_cause_is_named(name, seed, full, monkeypatch):
    if not full and list(PLANTED).index(name) % 9 != seed % 9:
        pytest.skip("other mistakes were drawn")
    make, plant, (where, verdict, said) = PLANTED[name]
    theirs, ours, image, manifest = make(seed)
    plant(ours, monkeypatch)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = bridge.model_parity(theirs, ours, image, manifest)
    first = found.first_wrong
    assert first is not None, summary(found)
    assert where in first.name and first.verdict is verdict and said in why(first), (first.name, why(first))


def test_the_command_takes_a_function_that_makes_both(tmp_path):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        result = RUNNER.invoke(cli.app, ["model", "examples.ports.vit:mini", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert '"verdict": "ROUNDING"' in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["examples.ports.vit:none"], "has no function 'none'"),
        (["no_such_package:mini"], "cannot be imported"),
        (["examples.ports.common:timm"], "expected (torch_module, jax_model, inputs)"),
        (["examples.ports.vit:mini", "--size", "96"], "expected no --size"),
    ],
)
def test_an_unusable_function_is_refused(words, said):
    result = RUNNER.invoke(cli.app, ["model", *words])
    assert result.exit_code != 0 and said in " ".join((result.output + str(result.exception)).split())
