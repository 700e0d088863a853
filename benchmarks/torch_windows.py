"""Time of `bridge.torch_windows` on MobileNet's depthwise layers, as a ratio to `F.unfold` and one einsum.

python benchmarks/torch_windows.py [--batch 8] [--rounds 5] [--threads 2] [--gradients]

Each layer is measured in both layouts, and `F.conv2d` with it. The ratios are of medians. The calls are interleaved:
only the ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F

from bridge.bench.figures import geometric_mean
from bridge.bench.measure import interleaved
from bridge.bench.suites import NETWORKS, DepthwiseLayer
from bridge.torch_windows import windowed_conv2d

LAYERS = dict.fromkeys(
    layer for name, layers in NETWORKS.items() if name.startswith("MobileNet") for layer in layers.split()
)


def unfold_einsum(x, weight, stride, padding):
    """Return the sums over the columns of `F.unfold`."""
    kernel, channels = weight.shape[-1], x.shape[1]
    columns = F.unfold(x, kernel, padding=padding, stride=stride).view(len(x), channels, kernel * kernel, -1)
    y = torch.einsum("nctl,ct->ncl", columns, weight.view(channels, kernel * kernel))
    return y.view(*y.shape[:2], (x.shape[2] + 2 * padding - kernel) // stride + 1, -1)


def ratios(layer: DepthwiseLayer, batch: int, rounds: int, form: torch.memory_format, gradients: bool) -> list[float]:
    """Return the times of the windows and of `F.conv2d`, divided by that of unfold and einsum."""
    x = torch.randn(batch, layer.channels, layer.height, layer.width).contiguous(memory_format=form)
    weight = torch.randn(layer.channels, 1, layer.kernel, layer.kernel)
    numbers = layer.stride, layer.padding

    def timed(function):
        def call():
            if not gradients:
                with torch.inference_mode():
                    return function(x, weight)
            return torch.autograd.grad(function(x, weight).sum(), (x, weight))

        return [call]

    if gradients:
        x.requires_grad_(), weight.requires_grad_()
    calls = {
        "unfold": timed(lambda x, w: unfold_einsum(x, w, *numbers)),
        "windows": timed(lambda x, w: windowed_conv2d(x, w, None, *numbers)),
        "conv2d": timed(lambda x, w: F.conv2d(x, w, None, *numbers, groups=layer.channels)),
    }
    times = interleaved(calls, rounds, 0)
    medians = {name: statistics.median(t for t in each if t is not None) for name, each in times.items()}
    return [medians[name] / medians["unfold"] for name in ("windows", "conv2d")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gradients", action="store_true", help="time of the output and both gradients")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    found = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {given.batch}; unfold + einsum is 1")
    print(f"{'layer':20}{'windows':>10}{'conv2d':>10}{'windows, channels last':>26}{'conv2d':>10}", flush=True)
    for text in LAYERS:
        layer = DepthwiseLayer.parse(text)
        row = []
        for form in (torch.contiguous_format, torch.channels_last):
            row += ratios(layer, given.batch, given.rounds, form, given.gradients)
        found.append(row)
        print(f"{text:20}{row[0]:10.2f}{row[1]:10.2f}{row[2]:26.2f}{row[3]:10.2f}", flush=True)
    means = [geometric_mean(column) for column in zip(*found)]
    print(f"{'geometric mean':20}{means[0]:10.2f}{means[1]:10.2f}{means[2]:26.2f}{means[3]:10.2f}")
    print(f"{'greatest':20}{max(r[0] for r in found):10.2f}{'':10}{max(r[2] for r in found):26.2f}")


if __name__ == "__main__":
    main()
