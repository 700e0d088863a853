"""CPU seconds to compile one depthwise layer, forward and with both gradients, against `lax` ("grouped").

python benchmarks/compile_time.py [--rounds 3] [--method taps] [layer ...]

A layer is batch, spatial sizes and channels, a colon, and the kernel: `2x14x14x16:7x7`, `1x2048x32:1024`. The figures
are CPU seconds (of all threads, user and system) of `jax.jit(...).lower(...).compile()`, medians over the rounds. In
each round every program is compiled once, from empty caches.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jaxdw
from bridge.bench.jax_peers import with_gradients

LAYERS = (
    "2x28x28x96:3x3",
    "2x14x14x96:5x5",
    "2x14x14x16:7x7",
    "8x14x14x384:7x7",
    "2x28x28x32:13x13",
    "1x56x56x32:31x31",
    "1x56x56x32:51x51",
    "1x2048x32:1024",
    "1x4096x32:4096",
)


def seconds(program: Callable[..., object], *arguments: jax.ShapeDtypeStruct) -> float:
    """Return the CPU seconds to lower and compile a program."""
    jax.clear_caches()
    began = time.process_time()
    jax.jit(program).lower(*arguments).compile()
    return time.process_time() - began


def measurements(layer: str, method: str) -> list[Callable[[], float]]:
    """Return the measurements of a layer: forward by the method and by grouped, then both with gradients."""
    sizes, kernel_size = ([int(size) for size in part.split("x")] for part in layer.split(":"))
    x = jax.ShapeDtypeStruct(tuple(sizes), np.float32)
    kernel = jax.ShapeDtypeStruct((*kernel_size, 1, sizes[-1]), np.float32)
    forward = [functools.partial(jaxdw.depthwise_conv, method=each) for each in (method, "grouped")]
    gradients = [functools.partial(seconds, with_gradients(each), x, kernel, x) for each in forward]
    return [*(functools.partial(seconds, each, x, kernel) for each in forward), *gradients]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of compilation, one depthwise layer per row")
    parser.add_argument("layers", nargs="*", default=LAYERS, metavar="layer", help="such as 2x14x14x16:7x7")
    parser.add_argument("--rounds", type=int, default=3, help="compilations of each program (default: 3)")
    parser.add_argument("--method", default="taps", help="the method to compare with grouped (default: taps)")
    asked = parser.parse_args()
    jax.block_until_ready(jax.jit(lambda a: a + 1)(jnp.ones(3)))  # what the first compilation starts is not counted
    method = asked.method
    print(f"| layer | forward: {method} | grouped | with both gradients: {method} | grouped | limit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for layer in asked.layers:
        each = measurements(layer, method)
        rounds = [[measure() for measure in each] for _ in range(asked.rounds)]
        medians = [statistics.median(times) for times in zip(*rounds)]
        figures = [*medians, 3 * medians[-1] + 1]
        print(f"| {layer} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
