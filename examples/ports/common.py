"""What the ports share: random weights for a PyTorch network, and the same weights in its port."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from flax import nnx

import bridge
from bridge.libraries import import_library


def timm() -> Any:
    """Return timm, whose import may need torchvision."""
    return import_library("timm")


def shared(theirs: torch.nn.Module, ours: nnx.Module, seed: int, rules: Any = None) -> Any:
    """Draw weights for `theirs`, give them to `ours`, and return the manifest of the conversion."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(np.asarray(_drawn(name, tuple(tensor.shape), rng), np.float32)))
    theirs.eval()
    converted = bridge.to_flax(theirs, ours, rules, settings=False)
    nnx.update(ours, converted.weights)
    return converted.manifest


def _drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2, shape)
    if len(shape) < 2:
        return rng.uniform(-1, 1, shape)
    return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))


def image(size: int, seed: int) -> np.ndarray:
    """Draw one image of noise, `(1, size, size, 3)`."""
    return np.random.default_rng((seed, 1)).standard_normal((1, size, size, 3), np.float32)
