"""Depthwise layers, forward: each way in turn, one run, the same inputs. Prints medians in ms and ratios to jaxdw.

python benchmarks/layers.py [--rounds 9] [--layers 8x56x56x144:3:1 ...]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time

# PyTorch's idle OpenMP threads would spin through the next way's turn, and slow it by up to 3 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

import jaxdw

#: batch x height x width x channels : kernel : stride
LAYERS = ("8x56x56x144:3:1", "4x56x56x96:7:1", "8x14x14x384:3:1", "8x7x7x960:3:1", "4x28x28x120:5:1", "8x56x56x144:3:2")
INPUTS = 3  # in rotation, so that no way keeps one input in cache


def ways(kernel: np.ndarray, stride: int) -> dict:
    """name -> (make an argument from an NHWC array, compute and wait, result as an NHWC array)."""
    size, channels = kernel.shape[0], kernel.shape[-1]
    pad = size // 2
    w = jnp.asarray(kernel)
    layer = nnx.Conv(
        channels,
        channels,
        (size, size),
        stride,
        padding=pad,
        feature_group_count=channels,
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    layer.kernel[...] = w
    graph, state = nnx.split(layer)
    taps = jax.jit(lambda x: jaxdw.depthwise_conv(x, w, strides=stride, padding=pad))
    grouped = jax.jit(
        lambda x: lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
    )
    flax = jax.jit(lambda x: nnx.merge(graph, state)(x))
    weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))

    def conv(x):
        with torch.inference_mode():
            return F.conv2d(x, weight, None, stride, pad, 1, channels)

    def image(x, form=torch.contiguous_format):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).contiguous(memory_format=form)

    def from_torch(y):
        return y.permute(0, 2, 3, 1).numpy()

    def on_jax(f):
        return jnp.asarray, lambda x: f(x).block_until_ready(), np.asarray

    return {
        "jaxdw": on_jax(taps),
        "lax grouped": on_jax(grouped),
        "nnx.Conv": on_jax(flax),
        "torch": (image, conv, from_torch),
        "torch channels_last": (lambda x: image(x, torch.channels_last), conv, from_torch),
    }


def measure(layer: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, interleaved; the results are checked against each other first."""
    shape, size, stride = layer.split(":")
    rng = np.random.default_rng(0)
    sizes = tuple(map(int, shape.split("x")))
    inputs = [rng.standard_normal(sizes, np.float32) for _ in range(INPUTS)]
    kernel = rng.standard_normal((int(size), int(size), 1, sizes[-1]), np.float32)
    table = ways(kernel, int(stride))
    arguments = {name: [make(x) for x in inputs] for name, (make, _, _) in table.items()}
    results = {name: back(compute(arguments[name][0])) for name, (_, compute, back) in table.items()}
    magnitude = np.abs(inputs[0]).max() * np.abs(kernel).max() * int(size) ** 2
    for name, y in results.items():  # two sums of n terms in any order: 2 n u sum |x w|
        assert np.abs(y - results["jaxdw"]).max() <= 2 * int(size) ** 2 * 2.0**-24 * magnitude, name
    times: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(rounds):
        for name, (_, compute, _) in table.items():
            x = arguments[name][turn % INPUTS]
            start = time.perf_counter()
            compute(x)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    options = parser.parse_args()
    table = Table(title=f"Forward, float32, median ms of {options.rounds} interleaved rounds, and time / jaxdw's")
    table.add_column("layer")
    ratios: dict[str, list[float]] = {}
    for layer in options.layers:
        medians = {name: statistics.median(times) for name, times in measure(layer, options.rounds).items()}
        if len(table.columns) == 1:
            for name in medians:
                table.add_column(name, justify="right")
        row = [layer]
        for name, ms in medians.items():
            ratios.setdefault(name, []).append(ms / medians["jaxdw"])
            row.append(f"{ms:.2f}" if name == "jaxdw" else f"{ms:.2f} ({ratios[name][-1]:.1f}x)")
        table.add_row(*row)
    means = [f"{statistics.geometric_mean(values):.1f}x" for values in itertools.islice(ratios.values(), 1, None)]
    table.add_row("geometric mean", "", *means)
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}", highlight=False)


if __name__ == "__main__":
    main()
