"""Measure the errors of elementwise functions of XLA and PyTorch against float64, in units of the last place.

    python benchmarks/elementwise_errors.py

The checker of whole models allows what `bridge.model.running_error.ULPS` has for each: these figures, rounded up. A
measurement over a sample of all numbers is no proof.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch
from scipy import special

from bridge.model.running_error import ULPS

COUNT = 1 << 21

#: Name: the function in float64, in JAX and in PyTorch, and the range of its operands.
FUNCTIONS: dict[str, tuple[Callable, Callable, Callable, float, float]] = {
    "exp": (np.exp, jax.lax.exp, torch.exp, -80, 80),
    "exp2": (np.exp2, jax.lax.exp2, torch.exp2, -100, 100),
    "log": (np.log, jax.lax.log, torch.log, 1e-30, 1e30),
    "log1p": (np.log1p, jax.lax.log1p, torch.log1p, -0.99, 1e6),
    "expm1": (np.expm1, jax.lax.expm1, torch.expm1, -20, 80),
    "tanh": (np.tanh, jax.lax.tanh, torch.tanh, -20, 20),
    "logistic": (special.expit, jax.lax.logistic, torch.sigmoid, -80, 80),
    "erf": (special.erf, jax.lax.erf, torch.erf, -6, 6),
    "sqrt": (np.sqrt, jax.lax.sqrt, torch.sqrt, 1e-30, 1e30),
    "rsqrt": (lambda x: 1 / np.sqrt(x), jax.lax.rsqrt, torch.rsqrt, 1e-30, 1e30),
}


def operands(low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Draw numbers, half of them uniform and half uniform in their exponent."""
    uniform = rng.uniform(low, high, COUNT // 2)
    sizes = 2.0 ** rng.uniform(-30, np.log2(high), COUNT // 2)
    signs = rng.choice([-1.0, 1.0], COUNT // 2)
    x = np.concatenate([uniform, np.clip(sizes * signs, low, high)]).astype(np.float32)
    return x[(x >= low) & (x <= high)]


def main() -> None:
    rng = np.random.default_rng(0)
    print("| function | XLA | PyTorch | allowed |\n| --- | ---: | ---: | ---: |")
    for name, (exact, ours, theirs, low, high) in FUNCTIONS.items():
        x = operands(low, high, rng)
        wanted = exact(x.astype(np.float64))
        ulp = 2.0**-23 * np.abs(wanted)
        normal = np.abs(wanted) > 2.0**-125
        errors = [
            (np.abs(y.astype(np.float64) - wanted)[normal] / ulp[normal]).max()
            for y in (np.asarray(jax.jit(ours)(x)), theirs(torch.from_numpy(x)).numpy())
        ]
        print(f"| {name} | {errors[0]:.2f} | {errors[1]:.2f} | {ULPS[name]:g} |")


if __name__ == "__main__":
    main()
