"""A vision transformer (Dosovitskiy et al., 2021) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.vit:mini
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.ports.common import Mlp, PatchEmbed, image, pair, timm


class Attention(nnx.Module):
    """Self-attention over tokens `(N, L, C)`."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        n, length, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, length, 3, self.heads, -1), 2, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(n, length, width))


class Block(nnx.Module):
    """Attention and two layers, each after a norm and with a residual sum."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(width, heads, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Map images `(N, size, size, 3)` to logits `(N, classes)`."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, classes: int, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(patch, width, rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, (size // patch) ** 2 + 1, width)))
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def mini(seed: int = 0) -> Any:
    """Return timm's vision transformer with two blocks, its port with the same weights, an image, and the manifest."""
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    theirs = timm().create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, **sizes)
    return pair(theirs, lambda: VisionTransformer(64, 16, 48, 2, 3, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
