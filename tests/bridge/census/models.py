"""Small PyTorch models whose depthwise layers are known."""

import torch
import torch.nn.functional as F
from torch import nn


class DynamicSame(nn.Conv2d):
    """TensorFlow's SAME as timm's `Conv2dSame` has it: the amount depends on the input, and is added in `forward`."""

    def forward(self, x):
        pads = []
        for size, kernel, stride, dilation in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Functional(nn.Module):
    """No layer of its own: the weight is a parameter, the convolution a function."""

    def __init__(self):
        super().__init__()
        self.taps = nn.Parameter(torch.randn(4, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.taps, padding=1, groups=4)


class Twice(nn.Module):
    """One layer, run on its input, on the same input again, and on its own output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        return self.layer(self.layer(x) + self.layer(x))


class Swallows(nn.Module):
    """Goes on where a part of it fails."""

    def __init__(self):
        super().__init__()
        self.fails = nn.Conv2d(5, 5, 3, groups=5)
        self.works = nn.Conv2d(4, 4, 3, groups=4)

    def forward(self, x):
        try:
            return self.fails(x)
        except RuntimeError:
            return self.works(x)


def depthwise(channels=4, multiplier=1, kernel=3, dims=2, **options):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return convolution(channels, channels * multiplier, kernel, groups=channels, **options)


def small():
    """Two depthwise layers behind a dense one; takes an image."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), depthwise(8, padding=1), nn.ReLU(), depthwise(8, 2, 5, stride=2, bias=False)
    )


def image():
    """The same with an input of its own."""
    return small(), torch.ones(1, 3, 16, 16)


def dense():
    return nn.Sequential(nn.Conv2d(3, 8, 3))


def broken():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), depthwise(7)))


def number():
    return 3
