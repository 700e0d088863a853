"""The problems of "models": MobileNetV2, and the checks of its results.

No practical bound on the rounding of fifty layers is sharp enough to check anything. So the network itself defines the
allowed distance. PyTorch computes the network in float64 twice: with the weights as they are, and with the weights
rounded to TF32 (11 bits). A way must be nearer to the first result, in the Euclidean norm, than the second result is.
The check fails for a missing layer, another padding, an epsilon that matters, and products in TF32 or bfloat16. Float32
passes: it moves every result by about 2^-24, where rounding to TF32 moves every weight by up to 2^-12.

For a step of training, the check holds the change of every kernel and matrix, and the change of all running statistics
together. Scales and biases are not checked: the gradients of some are exactly zero, since the next normalization
removes their effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from bridge.bench import torch_peers
from bridge.bench.problems import INPUTS, Problem
from bridge.bench.reference import Arrays, Check
from bridge.numerics import TF32, round_to

#: The number of logits, as for ImageNet.
CLASSES = 1000


def model_problem(name: str, size: int, seed: int, *, width: float = 1.0, classes: int = CLASSES) -> Problem:
    """Return a row of "models" on images of `size` x `size`; `name` is one of `bridge.bench.suites.model_rows`."""
    kind, _, batch = name.partition(", batch ")
    rng = np.random.default_rng((seed, size, int(batch)))
    inputs = []
    for _ in range(INPUTS):
        arrays: dict[str, np.ndarray] = {"images": rng.standard_normal((int(batch), size, size, 3), np.float32)}
        if kind == "training":
            arrays["labels"] = rng.integers(0, classes, int(batch))
        inputs.append(arrays)
    weights = torch_peers.network_weights(classes, width, seed)
    checks = functools.partial(_checks, weights, width, inputs[0])
    return Problem("models", name, ("MobileNetV2",), None, inputs, checks, None, None, width, weights)


def _checks(weights: Arrays, width: float, arrays: Arrays) -> list[Check]:
    rounded = {
        name: round_to(array.astype(np.float64), TF32) if array.dtype.kind == "f" else array
        for name, array in weights.items()
    }
    true, near = torch_peers.truth(weights, width, arrays), torch_peers.truth(rounded, width, arrays)
    return [Check(arrays, nearer(_parts(true, weights), _parts(near, rounded), lambda result: _parts(result, weights)))]


def nearer(true: Arrays, near: Arrays, parts: Callable[[Arrays], Arrays]) -> Callable[[Arrays], str]:
    """Return a check for the first part of a result that is at least as far from `true` as `near` is."""

    def misfit(result: Arrays) -> str:
        found = parts(result)
        for name, wanted in true.items():
            got, limit = found[name], float(np.linalg.norm(near[name] - wanted))
            if got.shape != wanted.shape:
                return f"{name} has shape {got.shape}, expected {wanted.shape}"
            distance = float(np.linalg.norm(got - wanted))
            if not distance < limit:
                return (
                    f"{name} is {distance:.3g} from PyTorch's in float64; weights rounded to TF32 move it {limit:.3g}"
                )
        return ""

    return misfit


def _parts(result: Arrays, before: Arrays) -> Arrays:
    """Return the logits, or the changes of kernels, matrices and running statistics."""
    if "logits" in result:
        return {"logits": result["logits"].astype(np.float64)}
    moved = {
        name: result[name].astype(np.float64) - array.astype(np.float64)
        for name, array in before.items()
        if array.dtype.kind == "f"
    }
    parts = {f"the change of {name}": change for name, change in moved.items() if change.ndim > 1}
    statistics = [change for name, change in moved.items() if "running_" in name]
    return {**parts, "the change of the running statistics": np.concatenate(statistics)}
