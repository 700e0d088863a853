"""Which kernel oneDNN, the library of PyTorch's convolutions on CPU, runs for a depthwise convolution. NumPy only."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence

import numpy as np


def padding_fits(padding: Sequence[int], spans: Sequence[int], outputs: int) -> bool:
    """Return True if the padding is narrow enough for oneDNN's depthwise kernel (`jit_uni_dw_convolution`).

    1. Along each axis it is smaller than the dilated kernel.
    2. Along the last axis it is at most the number of outputs that the kernel computes at once.

    Read in oneDNN 3.12, which torch 2.13 has, and seen on x86-64.

    Args:
      padding: the same at both ends, one int per spatial axis.
      spans: the extents of the dilated kernel, one per spatial axis.
      outputs: output positions along the last axis.

    >>> padding_fits((1, 1), (3, 3), 56), padding_fits((1, 3), (3, 3), 56)
    (True, False)
    """
    narrow = all(amount < span for amount, span in zip(padding, spans))
    return narrow and padding[-1] <= min(outputs, outputs_at_once())


def is_a_plain_loop(taps: int, outputs: Sequence[int], elements: int) -> bool:
    """Return True if oneDNN has no memory for a matrix product, and runs a loop that rounds each product.

    It is for convolutions that its depthwise kernels do not compute (`scratchpad_limit` in gemm_convolution_utils.cpp).

    Args:
      taps: the number of kernel positions.
      outputs: output positions, one int per spatial axis.
      elements: of x, the kernel and the output together.
    """
    return taps * math.prod(outputs[-2:]) > 15 * elements


def never_returns(channels: int, taps: int, outputs: int) -> bool:
    """Return True if oneDNN does not return from a depthwise convolution in float16 here.

    With AVX512-FP16 it keeps the inputs of one row in registers (`grouped_bs` in jit_brdgmm_kernel.cpp). Where no
    register is left for the kernel, the loop that makes the program steps by zero. Seen in oneDNN 3.12, torch 2.13.

    Args:
      channels: of x.
      taps: along the last axis, which has stride 1 and no dilation.
      outputs: output positions along the last axis.
    """
    has_float16 = _allowed().startswith(("ALL", "DEFAULT", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10"))
    return has_float16 and "AVX512_SPR" in _simd() and 1 < channels < 32 and taps > 14 and outputs > 29


@functools.cache
def outputs_at_once() -> int:
    """Return how many outputs oneDNN's depthwise kernel computes at once along the last axis.

    They are 6 with AVX-512, 4 with AVX2, and 3 with SSE4.1. ONEDNN_MAX_CPU_ISA, which oneDNN reads when it starts, can
    forbid the wider ones.
    """
    has, most = _simd(), _allowed()
    if most.startswith("SSE") or most == "AVX" or not {"AVX2", "X86_V3", "AVX512_SKX", "X86_V4"} & has:
        return 3
    return 6 if {"AVX512_SKX", "X86_V4"} & has and not most.startswith("AVX2") else 4  # older and newer names


def _allowed() -> str:
    """Return the instruction set that oneDNN may use at most, as the user or oneDNN names it."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() or "ALL"


@functools.cache
def _simd() -> frozenset[str]:
    """Return what this processor has, in NumPy's names."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    return frozenset([*simd["baseline"], *simd["found"]])
