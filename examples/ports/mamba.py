"""Mamba (Gu and Dao, 2023) in Flax NNX, with the names of transformers' parameters.

jaxdw model examples.ports.mamba:mini
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bridge.libraries import import_library
from examples.ports.common import pair
from jaxdw.nnx import CausalConv1d


class Mixer(nnx.Module):
    """The selective state space of tokens `(N, L, C)`."""

    def __init__(self, width: int, inner: int, states: int, rank: int, rngs: nnx.Rngs):
        self.rank, self.states = rank, states
        self.in_proj = nnx.Linear(width, 2 * inner, use_bias=False, rngs=rngs)
        self.conv1d = CausalConv1d(inner, 4, activation="silu", rngs=rngs)
        self.x_proj = nnx.Linear(inner, rank + 2 * states, use_bias=False, rngs=rngs)
        self.dt_proj = nnx.Linear(rank, inner, rngs=rngs)
        self.A_log = nnx.Param(jnp.zeros((inner, states)))
        self.D = nnx.Param(jnp.ones(inner))
        self.out_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, gate = jnp.split(self.in_proj(x), 2, -1)
        x = self.conv1d(x)
        dt, b, c = jnp.split(self.x_proj(x), [self.rank, self.rank + self.states], -1)
        dt = nnx.softplus(self.dt_proj(dt))
        a = -jnp.exp(self.A_log[...])
        y = self.scan(jnp.exp(dt[..., None] * a[None, None]), (dt * x)[..., None] * b[..., None, :], c)
        return self.out_proj((y + x * self.D[...][None, None]) * nnx.silu(gate))

    def scan(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """Return c h of the states h = a h + b; a and b are `(N, L, C, states)`."""

        def step(h: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            a, b, c = at
            h = a * h + b
            return h, jnp.einsum("ncs,ns->nc", h, c)

        by_time = [jnp.moveaxis(each, 1, 0) for each in (a, b, c)]
        _, y = jax.lax.scan(step, jnp.zeros_like(b[:, 0]), tuple(by_time))
        return jnp.moveaxis(y, 0, 1)


class Block(nnx.Module):
    """The mixer after a norm, with a residual sum."""

    def __init__(self, width: int, states: int, rank: int, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.mixer = Mixer(width, 2 * width, states, rank, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mixer(self.norm(x))


class Mamba(nnx.Module):
    """Map tokens `(N, L)` to features `(N, L, width)`."""

    def __init__(self, words: int, width: int, states: int, rank: int, depth: int, *, rngs: nnx.Rngs):
        self.embeddings = nnx.Embed(words, width, rngs=rngs)
        self.layers = nnx.List([Block(width, states, rank, rngs) for _ in range(depth)])
        self.norm_f = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


def mini(seed: int = 0) -> Any:
    """Return transformers' Mamba with two blocks, its port with the same weights, tokens, and the manifest."""
    transformers = import_library("transformers")
    sizes = {"hidden_size": 16, "state_size": 4, "time_step_rank": 2, "num_hidden_layers": 2, "vocab_size": 50}
    theirs = transformers.MambaModel(transformers.MambaConfig(use_cache=False, **sizes))
    tokens = np.random.default_rng((seed, 1)).integers(0, 50, (1, 6))
    return pair(theirs, lambda: Mamba(50, 16, 4, 2, 2, rngs=nnx.Rngs(0)), tokens, seed)
