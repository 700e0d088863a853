"""Functions of one number by name, in float64: what an activation computes, whoever wrote it in which form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy import special

from bridge.model.running_error import Bounded

#: A function at `PROBES`, and the bounds of these values.
Probed = tuple[np.ndarray, np.ndarray]

#: Numbers that tell the functions apart: dense where they bend, and some far out.
PROBES = np.array([-1e4, -100, -20, *np.linspace(-8, 8, 257), 20, 100, 1e4])


def _gate(x: np.ndarray) -> np.ndarray:
    return np.clip(x + 3, 0, 6) / 6


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard swish": lambda x: x * _gate(x),
    "hard sigmoid": _gate,
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "silu": lambda x: x * special.expit(x),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "gelu": lambda x: 0.5 * x * special.erfc(-x * np.sqrt(0.5)),
    "gelu (tanh)": _gelu_tanh,
    "gelu (sigmoid)": lambda x: x * special.expit(1.702 * x),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "softplus": lambda x: np.logaddexp(x, 0),
    "exp": np.exp,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "leaky relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "relu squared": lambda x: np.maximum(x, 0) ** 2,
    "square": lambda x: x * x,
    "negation": lambda x: -x,
    "-exp": lambda x: -np.exp(x),
}


def named(y: np.ndarray, allowed: np.ndarray) -> str | None:
    """Return the name of a function with these values at `PROBES`, within these bounds; None for an unknown one."""
    for name, of in FUNCTIONS.items():
        with np.errstate(all="ignore"):
            wanted = of(PROBES)
            both = np.isfinite(wanted) & np.isfinite(y)
            if (
                np.abs(wanted - y)[both] <= (allowed + 2.0**-44 * np.abs(wanted) + 2.0**-900)[both]
            ).all() and both.any():
                return name
    low, high = float(y.min()), float(y.max())
    is_clip = PROBES[0] < low < high < PROBES[-1] and (np.abs(np.clip(PROBES, low, high) - y) <= allowed).all()
    return f"clip to [{low:g}, {high:g}]" if is_clip else None


def are_one(one: Probed, other: Probed) -> bool:
    """Return True for functions that are the same at `PROBES`, to within their bounds."""
    with np.errstate(all="ignore"):
        both = np.isfinite(one[0]) & np.isfinite(other[0])
        return bool((np.abs(one[0] - other[0])[both] <= (one[1] + other[1])[both]).all())


def probed(of: Callable[[np.ndarray], Bounded], size: int) -> Probed | None:
    """Return a function of arrays of one size at `PROBES`; None where it does not take such an array."""
    if size * math.ceil(len(PROBES) / size) > 2**22:
        return None
    ys, errors = [], []
    for start in range(0, len(PROBES), size):
        some = PROBES[start : start + size]
        try:
            y = of(np.resize(some, size))
        except (ValueError, KeyError):
            return None
        if y.value.size != size or y.value.dtype != np.float64:
            return None
        ys.append(y.value.ravel()[: len(some)])
        errors.append(np.broadcast_to(np.asarray(y.function, np.float64), y.shape).ravel()[: len(some)])
    return np.concatenate(ys), np.concatenate(errors)
