"""MLP-Mixer (Tolstikhin et al., 2021) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.mixer:mini
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from examples.ports.common import Mlp, PatchEmbed, image, pair, timm


class Block(nnx.Module):
    """Mix tokens, then channels, each after a norm and with a residual sum."""

    def __init__(self, width: int, tokens: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp_tokens = Mlp(tokens, width // 2, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp_channels = Mlp(width, 4 * width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.mlp_tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class MlpMixer(nnx.Module):
    """Map images `(N, size, size, 3)` to logits `(N, classes)`."""

    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = PatchEmbed(patch, width, rngs)
        self.blocks = nnx.List([Block(width, (size // patch) ** 2, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def mini(seed: int = 0) -> Any:
    """Return timm's MLP-Mixer with two blocks, its port with the same weights, an image, and the manifest."""
    theirs = timm().models.mlp_mixer.MlpMixer(7, 64, patch_size=16, num_blocks=2, embed_dim=32)
    return pair(theirs, lambda: MlpMixer(64, 16, 32, 2, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
