"""How long XLA compiles one depthwise layer, forward and with both gradients, against `lax` ("grouped").

python benchmarks/compile_time.py [--rounds 3] [--method taps] [layer ...]

A layer is batch, spatial sizes and channels, a colon, and the kernel: `2x14x14x16:7x7`, `1x2048x32:1024`. The figures
are CPU seconds (of all threads, user and system) of `jax.jit(...).lower(...).compile()`, medians over the rounds; in
each round every program is compiled once, from empty caches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jaxdw

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
    """CPU seconds to lower and compile it."""
    jax.clear_caches()
    began = time.process_time()
    jax.jit(program).lower(*arguments).compile()
    return time.process_time() - began


def programs(layer: str, methods: tuple[str, ...]) -> dict[tuple[str, str], Callable[[], float]]:
    """What measures each program of a layer, by what is computed and the method."""
    sizes, kernel_size = ([int(size) for size in part.split("x")] for part in layer.split(":"))
    x = jax.ShapeDtypeStruct(tuple(sizes), np.float32)
    kernel = jax.ShapeDtypeStruct((*kernel_size, 1, sizes[-1]), np.float32)

    def measured(method: str, gradients: bool) -> float:
        def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jaxdw.depthwise_conv(x, kernel, method=method)

        def with_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
            y, pull = jax.vjp(forward, x, kernel)
            return (y, *pull(dy))

        return seconds(with_gradients, x, kernel, x) if gradients else seconds(forward, x, kernel)

    return {
        (work, method): lambda method=method, work=work: measured(method, work == "gradients")
        for work in ("forward", "gradients")
        for method in methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of compilation, one depthwise layer a row")
    parser.add_argument("layers", nargs="*", default=LAYERS, metavar="layer", help="such as 2x14x14x16:7x7")
    parser.add_argument("--rounds", type=int, default=3, help="how often each program is compiled (default: 3)")
    parser.add_argument("--method", default="taps", help="compared with grouped (default: taps)")
    asked = parser.parse_args()
    jax.block_until_ready(jax.jit(lambda a: a + 1)(jnp.ones(3)))  # what the first compilation starts is not counted
    methods = (asked.method, "grouped")
    print(f"| layer | forward: {methods[0]} | grouped | with both gradients: {methods[0]} | grouped | limit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for layer in asked.layers:
        each = programs(layer, methods)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in each}
        for _ in range(asked.rounds):
            for key, measure in each.items():
                times[key].append(measure())
        medians = [statistics.median(own) for own in times.values()]
        figures = [*medians, 3 * medians[-1] + 1]
        print(f"| {layer} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
