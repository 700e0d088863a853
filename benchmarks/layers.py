"""Time the transposed and the causal layer against PyTorch and lax, interleaved, after a check of every result.

    python benchmarks/layers.py [--rounds 15] [--threads 2]

It prints each layer's time and, for each peer, jaxdw's time relative to that peer's: medians over the rounds. Then the
geometric means of these ratios against the faster PyTorch layout.
"""

import argparse
import functools
import math
import os
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import lax

import jaxdw
from bridge.bench.measure import interleaved

#: Height = width, channels, kernel, stride, padding, output padding: x2 in segmentation and super-resolution networks.
TRANSPOSED = [
    (7, 512, 4, 2, 1, 0),
    (14, 256, 4, 2, 1, 0),
    (28, 128, 4, 2, 1, 0),
    (56, 64, 4, 2, 1, 0),
    (28, 96, 3, 2, 1, 1),
    (56, 96, 3, 2, 1, 1),
    (28, 144, 2, 2, 0, 0),
    (28, 96, 5, 2, 2, 1),
    (14, 96, 8, 4, 2, 0),
]

#: Images of a transposed layer.
BATCH = 8

#: Rows, time, channels: Mamba 130M to 2.8B, with 4 taps, bias and SiLU.
CAUSAL = [(8, 512, 1536), (2, 2048, 1536), (1, 2048, 2048), (1, 1024, 5120), (16, 64, 2560)]

#: Rows and channels of a step of decoding, likewise.
STEPS = [(1, 1536), (8, 1536), (64, 1536), (1, 5120), (16, 5120)]
TAPS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = {
        "transposed": [functools.partial(transposed, *layer) for layer in TRANSPOSED],
        "causal": [functools.partial(causal, *layer) for layer in CAUSAL],
        "step": [functools.partial(step, *layer) for layer in STEPS],
    }
    for kind, problems in kinds.items():
        ratios = []
        for make in problems:
            with torch.inference_mode():
                calls = make(np.random.default_rng(0))
                results = {name: np.asarray(call()) for name, call in calls.items()}
                for name, result in results.items():
                    np.testing.assert_allclose(result, results["jaxdw"], rtol=1e-4, atol=1e-4, err_msg=name)
                times = interleaved({name: [call] for name, call in calls.items()}, options.rounds, 0)
            median = {name: statistics.median(t for t in each if t is not None) for name, each in times.items()}
            against = {name: median["jaxdw"] / ms for name, ms in median.items() if name != "jaxdw"}
            ratios.append(max(ratio for name, ratio in against.items() if name.startswith("torch")))
            said = "  ".join(f"{name} {ratio:.2f}" for name, ratio in against.items())
            print(f"{kind:10} {make.args!s:28} {median['jaxdw']:8.3f} ms, relative to {said}", flush=True)
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{kind}: {mean:.2f} of the time of the faster PyTorch layout ({min(ratios):.2f} to {max(ratios):.2f})")


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def transposed(size, channels, kernel, stride, padding, output_padding, rng):
    x, w = normal(rng, BATCH, size, size, channels), normal(rng, kernel, kernel, 1, channels)
    settings = {"strides": stride, "padding": padding, "output_padding": output_padding}
    ours = jax.jit(functools.partial(jaxdw.depthwise_conv_transpose, **settings))
    low = kernel - 1 - padding
    pads = [(low, low + output_padding)] * 2

    @jax.jit
    def grouped(x, w):
        return lax.conv_general_dilated(
            x,
            w[::-1, ::-1],
            (1, 1),
            pads,
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )

    jx, jw = jnp.asarray(x), jnp.asarray(w)
    calls = {
        "jaxdw": lambda: ours(jx, jw).block_until_ready(),
        "lax": lambda: grouped(jx, jw).block_until_ready(),
    }
    for name, form in {"torch": torch.contiguous_format, "torch.channels_last": torch.channels_last}.items():
        tx = torch.tensor(x).movedim(-1, 1).contiguous(memory_format=form)
        tw = torch.tensor(w).permute(3, 2, 0, 1).contiguous(memory_format=form)
        calls[name] = functools.partial(_transposed_in_torch, tx, tw, stride, padding, output_padding, channels)
    return calls


def _transposed_in_torch(x, w, stride, padding, output_padding, channels):
    return F.conv_transpose2d(x, w, None, stride, padding, output_padding, channels).movedim(1, -1)


def causal(rows, length, channels, rng):
    x, w, b = normal(rng, rows, length, channels), normal(rng, TAPS, 1, channels), normal(rng, channels)
    ours = jax.jit(functools.partial(jaxdw.causal_conv1d, activation="silu"))

    @jax.jit
    def grouped(x, w, b):
        y = lax.conv_general_dilated(
            x, w, (1,), [(TAPS - 1, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=channels
        )
        return jax.nn.silu(y + b)

    arrays = tuple(map(jnp.asarray, (x, w, b)))
    tx, tw, tb = torch.tensor(x), torch.tensor(w).permute(2, 1, 0).contiguous(), torch.tensor(b)
    first = tx.movedim(-1, 1).contiguous()

    def of_torch(x):  # as Mamba's fallback computes it
        y = F.conv1d(x, tw, tb, padding=TAPS - 1, groups=channels)[..., :length]
        return F.silu(y).movedim(1, -1)

    return {
        "jaxdw": lambda: ours(*arrays).block_until_ready(),
        "lax": lambda: grouped(*arrays).block_until_ready(),
        "torch": lambda: of_torch(first),
        "torch.channels_last": lambda: of_torch(tx.movedim(-1, 1)),
    }


def step(rows, channels, rng):
    x, w, b = normal(rng, rows, channels), normal(rng, TAPS, 1, channels), normal(rng, channels)
    before = normal(rng, rows, TAPS - 1, channels)
    ours = jax.jit(functools.partial(jaxdw.causal_conv1d_step, activation="silu"))
    arrays = tuple(map(jnp.asarray, (x, before, w, b)))
    tx, tw, tb = torch.tensor(x), torch.tensor(w).permute(2, 1, 0)[:, 0].contiguous(), torch.tensor(b)
    state = torch.zeros(rows, channels, TAPS)
    state[..., 1:] = torch.tensor(before).movedim(-1, 1)

    def of_torch():  # as Mamba's fallback computes it; the state has K inputs
        now = torch.roll(state, -1, -1)
        now[..., -1] = tx
        return F.silu(torch.sum(now * tw, -1) + tb)

    return {"jaxdw": lambda: jax.block_until_ready(ours(*arrays))[0], "torch": of_torch}


if __name__ == "__main__":
    main()
