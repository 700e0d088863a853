"""Mistakes in the structure of each port of examples/ports/, which no general rule makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bridge import Verdict
from tests.bridge.model.plants import Plant, at, calls

WIRED = ("it reads", "lacks PyTorch's", "missing", "nothing where PyTorch computes", "where PyTorch computes nothing")
LACKS = (
    "lacks PyTorch's",
    "nothing where PyTorch computes add",
    "nothing where PyTorch computes multiply",
    "and then add",
)


def _call(kind: str, path: str, of: Callable[..., Any], where: Sequence[str], said: Sequence[str]) -> Plant:
    """Give the module at a path another `__call__`."""
    verdicts = (Verdict.CONVENTION, Verdict.BUG)
    return Plant(kind, path, lambda model, _: calls(of)(at(model, path)), (*where,), (*said,), verdicts)


def _set(kind: str, path: str, values: Mapping[str, Any], where: Sequence[str], said: Sequence[str]) -> Plant:
    """Set attributes of the module at a path; the names may have dots."""

    def change(model: Any, _: Any) -> None:
        for name, value in values.items():
            *outer, last = name.split(".")
            setattr(at(model, ".".join(filter(None, (path, *outer)))), last, value)

    return Plant(kind, path, change, (*where,), (*said,), (Verdict.CONVENTION, Verdict.BUG))


def _moved_stride(path: str, source: str, target: str) -> Plant:
    values = {f"{source}.strides": 1, f"{target}.strides": 2}
    return _set("stride in the wrong place", path, values, (f"{path}.{source}", f"{path}.{target}"), ("stride",))


def _gamma(self: Any) -> jax.Array:
    return self.gamma.reshape(1, 1, 1, -1)


def _convnext() -> list[Plant]:
    def block(kind: str, path: str, of: Callable[..., Any], where: str, said: Sequence[str]) -> Plant:
        return _call(kind, path, lambda self, _, x: of(self, x), (where,), said)

    one, other = "stages.0.blocks.0", "stages.2.blocks.1"
    return [
        block("residual missing", one, lambda s, x: s.mlp(s.norm(s.conv_dw(x))) * _gamma(s), one, LACKS),
        block("residual missing", other, lambda s, x: s.mlp(s.norm(s.conv_dw(x))) * _gamma(s), other, LACKS),
        block("layer scale missing", one, lambda s, x: x + s.mlp(s.norm(s.conv_dw(x))), one, LACKS),
        block("layer scale missing", other, lambda s, x: x + s.mlp(s.norm(s.conv_dw(x))), other, LACKS),
        block("norm first", other, lambda s, x: x + s.mlp(s.conv_dw(s.norm(x))) * _gamma(s), other, WIRED),
        _call(
            "norm before the mean",
            "head",
            lambda s, _, x: s.fc(s.norm(x).mean((1, 2))),
            ("head",),
            (*WIRED, "layer norm where PyTorch computes mean"),
        ),
    ]


def _vit() -> list[Plant]:
    def heads_first(self: Any, _: Any, x: jax.Array) -> jax.Array:
        n, length, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, length, self.heads, 3, -1), 3, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(n, length, width))

    def mean_of_tokens(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

    def no_positions(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def no_residual(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def parallel(self: Any, _: Any, x: jax.Array) -> jax.Array:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    attn = "blocks.1.attn"
    return [
        _call(
            "residual missing",
            "blocks.0",
            no_residual,
            ("blocks.0",),
            LACKS,
        ),
        _call("post-norm", "blocks.1", lambda s, _, x: s.norm1(x + s.attn(x)), ("blocks.1",), WIRED),
        _call(
            "parallel branches",
            "blocks.1",
            parallel,
            ("blocks.1",),
            WIRED,
        ),
        _call("heads before q, k and v", attn, heads_first, (attn,), ("order", "exchanges")),
        _call("mean of tokens", "", mean_of_tokens, ("",), ("mean",)),
        _call("positions missing", "", no_positions, ("",), LACKS),
    ]


def _mixer() -> list[Plant]:
    def tokens_last(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = x + self.mlp_channels(self.norm2(x))
        return x + self.mlp_tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)

    def no_residual(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = self.mlp_tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.mlp_channels(self.norm2(x))

    def norm_after(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = x + self.mlp_tokens(x.swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.mlp_channels(self.norm2(self.norm1(x)))

    def first_token(self: Any, _: Any, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    return [
        _call("channels before tokens", "blocks.1", tokens_last, ("blocks.1",), WIRED),
        _call("residual missing", "blocks.0", no_residual, ("blocks.0",), LACKS),
        _call("residual missing", "blocks.1", no_residual, ("blocks.1",), LACKS),
        _call("norm left out", "blocks.0", norm_after, ("blocks.0",), WIRED),
        _call("first token for the mean", "", first_token, ("",), ("mean",)),
    ]


def _resnet() -> list[Plant]:
    def block(order: str) -> Callable[..., Any]:
        def of(self: Any, _: Any, x: jax.Array) -> jax.Array:
            first = (self.bn1, nnx.relu) if order != "norm after ReLU" else (nnx.relu, self.bn1)
            y = self.bn2(self.conv2(first[1](first[0](self.conv1(x)))))
            for layer in self.downsample:
                x = layer(x)
            return {"no sum": nnx.relu(y), "ReLU before the sum": nnx.relu(y) + x}.get(order, nnx.relu(y + x))

        return of

    one, other = "layer1.0", "layer3.0"
    return [
        _call("residual missing", one, block("no sum"), (one,), LACKS),
        _call("residual missing", other, block("no sum"), (other,), LACKS),
        _call("ReLU before the sum", one, block("ReLU before the sum"), (one,), ("relu", "it reads")),
        _call("norm after ReLU", other, block("norm after ReLU"), (other,), ("relu", "it reads")),
        _moved_stride("layer2.0", "conv1", "conv2"),
        _moved_stride("layer4.0", "conv1", "conv2"),
    ]


def _regnet() -> list[Plant]:
    def no_residual(self: Any, _: Any, x: jax.Array) -> jax.Array:
        return nnx.relu(self.conv3(self.se(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))))

    def gate_last(self: Any, _: Any, x: jax.Array) -> jax.Array:
        y = self.conv3(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))
        return nnx.relu(self.se(y) + (x if self.downsample is None else self.downsample(x)))

    def no_gate(self: Any, _: Any, x: jax.Array) -> jax.Array:
        y = self.conv3(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))

    return [
        _call("residual missing", "s4.b2", no_residual, ("s4.b2",), LACKS),
        _call("residual missing", "s2.b1", no_residual, ("s2.b1",), LACKS),
        _call("gate after the last convolution", "s4.b1", gate_last, ("s4.b1",), WIRED),
        _call("gate missing", "s3.b1", no_gate, ("s3.b1",), WIRED),
        _moved_stride("s2.b1", "conv2.conv", "conv1.conv"),
        _moved_stride("s4.b1", "conv2.conv", "conv1.conv"),
    ]


def _efficientnet() -> list[Plant]:
    def gate_first(self: Any, _: Any, x: jax.Array) -> jax.Array:
        y = nnx.silu(self.bn1(self.conv_pw(x)))
        y = nnx.silu(self.se(self.bn2(self.conv_dw(y))))
        return self.bn3(self.conv_pwl(y))

    def no_gate(self: Any, _: Any, x: jax.Array) -> jax.Array:
        y = nnx.silu(self.bn2(self.conv_dw(nnx.silu(self.bn1(self.conv_pw(x))))))
        return self.bn3(self.conv_pwl(y))

    return [
        _set("residual missing", "blocks.1.1", {"has_residual": False}, ("blocks.1.1",), LACKS),
        _set("residual missing", "blocks.0.0", {"has_residual": False}, ("blocks.0.0",), LACKS),
        _call("gate before the activation", "blocks.1.0", gate_first, ("blocks.1.0",), ("silu", *WIRED)),
        _call("gate missing", "blocks.2.0", no_gate, ("blocks.2.0",), WIRED),
        _moved_stride("blocks.1.0", "conv_dw", "conv_pw"),
        _moved_stride("blocks.2.0", "conv_dw", "conv_pwl"),
    ]


def _mobilenetv4() -> list[Plant]:
    def start_active(self: Any, _: Any, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.pw_exp(nnx.relu(self.dw_start(x))))
        return self.pw_proj(nnx.relu(self.dw_mid(y)))

    def no_start(self: Any, _: Any, x: jax.Array) -> jax.Array:
        return x + self.pw_proj(nnx.relu(self.pw_exp(x)))

    return [
        _set("residual missing", "blocks.1.1", {"has_residual": False}, ("blocks.1.1",), LACKS),
        _set("residual missing", "blocks.1.3", {"has_residual": False}, ("blocks.1.3",), LACKS),
        _call("extra ReLU", "blocks.1.0", start_active, ("blocks.1.0",), ("relu where PyTorch computes nothing",)),
        _call("layers missing", "blocks.1.3", no_start, ("blocks.1.3",), WIRED),
        _moved_stride("blocks.1.0", "dw_mid.conv", "dw_start.conv"),
        _moved_stride("blocks.2.0", "dw_mid.conv", "pw_exp.conv"),
    ]


def _poolformer() -> list[Plant]:
    def pooled(y: jax.Array) -> jax.Array:
        return nnx.avg_pool(y, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)

    def block(*, residual: bool = True, less: bool = True, scale: bool = True, norm: bool = True) -> Callable[..., Any]:
        def of(self: Any, _: Any, x: jax.Array) -> jax.Array:
            y = self.norm1(x) if norm else x
            y = pooled(y) - y if less else pooled(y)
            y = self.layer_scale1(y) if scale else y
            x = x + y if residual else y
            return x + self.layer_scale2(self.mlp(self.norm2(x)))

        return of

    one, other = "stages.0.blocks.0", "stages.1.blocks.1"
    return [
        _call("residual missing", one, block(residual=False), (one,), LACKS),
        _call("residual missing", other, block(residual=False), (other,), LACKS),
        _call("identity not subtracted", one, block(less=False), (one,), ("sub", "lacks")),
        _call("layer scale missing", other, block(scale=False), (other,), LACKS),
        _call("norm left out", other, block(norm=False), (other,), WIRED),
    ]


def _mamba() -> list[Plant]:
    def split(first: Callable[..., Any], second: Callable[..., Any], skip: bool = True) -> Callable[..., Any]:
        def of(self: Any, _: Any, x: jax.Array) -> jax.Array:
            x, gate = first(*jnp.split(self.in_proj(x), 2, -1))
            x = self.conv1d(x)
            dt, b, c = second(*jnp.split(self.x_proj(x), [self.rank, self.rank + self.states], -1))
            dt = nnx.softplus(self.dt_proj(dt))
            a = -jnp.exp(self.A_log[...])
            y = self.scan(jnp.exp(dt[..., None] * a[None, None]), (dt * x)[..., None] * b[..., None, :], c)
            return self.out_proj((y + x * self.D[...][None, None] if skip else y) * nnx.silu(gate))

        return of

    def same(*each: jax.Array) -> tuple[jax.Array, ...]:
        return each

    def backwards(self: Any, call: Any, x: jax.Array) -> jax.Array:
        return call(self, x[:, ::-1])[:, ::-1]

    one, other = "layers.0.mixer", "layers.1.mixer"
    exchanged, turned = ("exchange", "order", "part"), ("other side", "padding", "reversed", "flipped")
    gate, b_and_c = split(lambda x, gate: (gate, x), same), split(same, lambda dt, b, c: (dt, c, b))
    return [
        _call("gate and input exchanged", one, gate, (one,), exchanged),
        _call("B and C exchanged", other, b_and_c, (other,), exchanged),
        _call("D missing", one, split(same, same, False), (one,), (*LACKS, "lacks")),
        _call("causal padding on the other side", f"{one}.conv1d", backwards, (one,), turned),
        _call("residual missing", "layers.0", lambda s, _, x: s.mixer(s.norm(x)), ("layers.0",), LACKS),
        _call("residual missing", "layers.1", lambda s, _, x: s.mixer(s.norm(x)), ("layers.1",), LACKS),
        _call("post-norm", "layers.1", lambda s, _, x: s.norm(x + s.mixer(x)), ("layers.1",), WIRED),
    ]


#: The plants of each port.
OWN: Mapping[str, Callable[[], list[Plant]]] = {
    "convnext": _convnext,
    "vit": _vit,
    "mixer": _mixer,
    "resnet": _resnet,
    "regnet": _regnet,
    "efficientnet": _efficientnet,
    "mobilenetv4": _mobilenetv4,
    "poolformer": _poolformer,
    "mamba": _mamba,
}
