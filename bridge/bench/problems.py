"""Problems: the rows of the suites. Each has a computation, inputs, and checks that results must pass first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bridge.bench.reference import (
    Arrays,
    Check,
    block,
    convolve,
    exactly,
    gradients,
    integers,
    squarable,
    within,
)
from bridge.bench.special_layers import SpecialLayer, checks, normal
from bridge.bench.suites import DepthwiseLayer
from bridge.memory import check_fits

#: Inputs in rotation, so that no way finds its inputs in a cache.
INPUTS = 3

#: The epsilon of the blocks' batch normalization, as in PyTorch.
EPSILON = 1e-5

#: The epsilon of the layer norm in a block of ConvNeXt.
NORM_EPSILON = 1e-6

#: The learning rate of the step of training.
RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a problem.

    Attributes:
      name: "jaxdw" or a peer's.
      start: puts arrays where the framework wants them, and returns the call that computes. The same program serves
        every start.
      fetch: converts what a call returned to NumPy arrays by name, channels last.
      wait: waits for what a call returned; needed only where the call itself does not wait.
    """

    name: str
    start: Callable[[Arrays], Callable[[], Any]]
    fetch: Callable[[Any], dict[str, np.ndarray]] = lambda result: result
    wait: Callable[[Any], Any] = lambda result: result


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a suite.

    Attributes:
      suite, name: of the row.
      networks: the networks that have the layer.
      layer: its geometry; None for whole models and special layers.
      special: a layer of "transposed", "causal" or "large".
      inputs: standard normal float32 data to time on.
      checks: makes the checks that every way must pass first.
      nbytes: the bytes that any way must move: operands read once, results written once; None for whole models.
      flops: two per product, products with padding included; None if the work is more than sums of products.
      width, weights: of whole models; the weights are a state_dict of PyTorch.
    """

    suite: str
    name: str
    networks: tuple[str, ...]
    layer: DepthwiseLayer | None
    inputs: Sequence[Arrays]
    checks: Callable[[], Sequence[Check]]
    nbytes: int | None
    flops: int | None
    width: float = 1.0
    weights: Arrays = dataclasses.field(default_factory=dict)
    special: SpecialLayer | None = None


def problem(suite: str, name: str, networks: tuple[str, ...], batch: int, seed: int) -> Problem:
    """Return a row of "layers", "gradients", "windows" or "blocks"."""
    layer = DepthwiseLayer.parse(name)
    # a row has the same numbers whichever rows are measured with it
    rng = np.random.default_rng((seed, SEEDS.index(suite), layer.height, layer.width, layer.channels, layer.kernel))
    inputs = [_normal(suite, rng, layer, batch) for _ in range(INPUTS)]
    nbytes, flops = work(suite, layer, batch)
    return Problem(
        suite, name, networks, layer, inputs, lambda: _checks(suite, rng, layer, batch, inputs), nbytes, flops
    )


def special_problem(suite: str, name: str, networks: tuple[str, ...], batch: int, seed: int) -> Problem:
    """Return a row of "transposed", "causal" or "large"."""
    layer = SpecialLayer.parse(name, batch)
    rng = np.random.default_rng((seed, *layer.shapes["x"], layer.kernel))
    inputs = [normal(rng, layer) for _ in range(INPUTS)]
    return Problem(suite, name, networks, None, inputs, lambda: checks(rng, layer), layer.nbytes, None, special=layer)


def work(suite: str, layer: DepthwiseLayer, batch: int) -> tuple[int, int | None]:
    """Return the bytes that any way must move in float32, and the operations; see `Problem`.

    >>> work("layers", DepthwiseLayer.parse("4x4x2:3:1"), 1)
    (328, 576)
    """
    g = layer.geometry(batch)
    x, w, y = (int(np.prod(shape)) for shape in (g.x_shape, g.kernel_shape, g.output_shape))
    elements = {"gradients": 2 * (x + w + y), "blocks": x + w + y + 4 * g.channels}.get(suite, x + w + y)
    return 4 * elements, {"layers": 2 * g.taps * y, "gradients": 6 * g.taps * y}.get(suite)


#: The suites of layers. Their positions are part of the seed.
SEEDS = ("layers", "gradients", "windows", "blocks")


def _normal(suite: str, rng: np.random.Generator, layer: DepthwiseLayer, batch: int) -> Arrays:
    g = layer.geometry(batch)
    check_fits(f"batch {batch} of {layer}", (INPUTS + 1) * work(suite, layer, batch)[0])
    arrays = {"x": rng.standard_normal(g.x_shape, np.float32), "w": rng.standard_normal(g.kernel_shape, np.float32)}
    if suite == "gradients":
        arrays["dy"] = rng.standard_normal(g.output_shape, np.float32)
    if suite == "blocks":
        for name in ("scale", "bias", "mean"):
            arrays[name] = rng.uniform(-1, 1, g.channels).astype(np.float32)
        arrays["var"] = rng.uniform(0.5, 2, g.channels).astype(np.float32)
    return arrays


def _checks(
    suite: str, rng: np.random.Generator, layer: DepthwiseLayer, batch: int, inputs: Sequence[Arrays]
) -> Sequence[Check]:
    if suite == "blocks":
        y, bound = block(inputs[0], layer, EPSILON)
        return [Check(inputs[0], within({"y": y}, {"y": bound}))]
    if suite == "windows":
        whole = squarable(rng, layer, batch)
        return [Check(whole, exactly({"y": convolve(whole["x"] * np.abs(whole["x"]), whole["w"], layer)}))]
    checks = []
    for fine in ("x", "dy") if suite == "gradients" else ("x",):
        whole = integers(rng, layer, batch, fine)
        expected = {"y": convolve(whole["x"], whole["w"], layer)}
        if suite == "gradients":
            expected["dx"], expected["dw"] = gradients(whole["x"], whole["w"], whole["dy"], layer)
        else:
            del whole["dy"]
        checks.append(Check(whole, exactly(expected)))
    return checks
