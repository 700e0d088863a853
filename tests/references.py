"""The PyTorch models that MobileNets are compared with, with random weights, offline."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")


@functools.cache
def _torchvision():
    """torchvision's Python beside a PyTorch for which its compiled operators were not built: they are only declared.

    Importing it registers shape rules for `nms` and `qnms`, which must exist for that; no MobileNet calls them.
    """
    pytest.importorskip("torchvision", reason="torchvision is not installed (extra `models`)", exc_type=ImportError)


def torch_model(name: str, num_classes: int = 10, seed: int = 0):
    pass
