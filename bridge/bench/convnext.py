"""The problems of "convnext": a whole block of ConvNeXt, forward and backward, and the checks of its results.

A block is a depthwise convolution, a layer norm, two linear layers around a GELU, and a scaled residual (Liu et al.,
2022). As in `bridge.bench.models`, PyTorch computes it in float64 twice: with the arrays as they are, and with all of
them rounded to TF32. Each result of a way must be nearer to the first, in the Euclidean norm, than the second is.
"""

from __future__ import annotations

import math

import numpy as np

from bridge.bench import torch_peers
from bridge.bench.models import nearer
from bridge.bench.problems import INPUTS, Problem
from bridge.bench.reference import Arrays, Check
from bridge.bench.suites import DepthwiseLayer
from bridge.numerics import TF32, round_to

#: The channels between the two linear layers, over those of the block.
EXPANSION = 4


def convnext_problem(name: str, networks: tuple[str, ...], batch: int, seed: int) -> Problem:
    """Return a row of "convnext" with the named depthwise layer, of stride 1."""
    layer = DepthwiseLayer.parse(name)
    rng = np.random.default_rng((seed, layer.height, layer.width, layer.channels, layer.kernel))
    inputs = [_drawn(rng, layer, batch) for _ in range(INPUTS)]
    return Problem("convnext", name, networks, layer, inputs, lambda: [_check(layer, inputs[0])], None, None)


def _drawn(rng: np.random.Generator, layer: DepthwiseLayer, batch: int) -> Arrays:
    """Draw x, dy and the parameters, so that activations keep their size."""
    g, c, wide = layer.geometry(batch), layer.channels, EXPANSION * layer.channels

    def normal(*shape: int, deviation: float = 1.0) -> np.ndarray:
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    return {
        "x": normal(*g.x_shape),
        "w": normal(*g.kernel_shape, deviation=1 / layer.kernel),
        "bias": normal(c),
        "scale": 1 + normal(c, deviation=0.1),
        "shift": normal(c),
        "w1": normal(c, wide, deviation=1 / math.sqrt(c)),
        "b1": normal(wide),
        "w2": normal(wide, c, deviation=1 / math.sqrt(wide)),
        "b2": normal(c),
        "gamma": normal(c),
        "dy": normal(*g.x_shape),
    }


def _check(layer: DepthwiseLayer, arrays: Arrays) -> Check:
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    rounded = {name: round_to(array, TF32) for name, array in wide.items()}
    true, near = (torch_peers.convnext_truth(layer, each) for each in (wide, rounded))
    return Check(arrays, nearer(true, near, dict))
