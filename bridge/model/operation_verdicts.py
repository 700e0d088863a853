"""The verdict on one operation: two results on the same operands, each compared with the exact one and its bound."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge.case import Case
from bridge.diagnosis import Comparison, Verdict, compare
from bridge.diagnosis.target import Expected
from bridge.model.operation_bounds import expected, matrix_sum, nearest
from bridge.model.operations import Operation
from bridge.numerics import BFLOAT16, FLOAT16, TF32, Format, round_to, same_bits, ulp_distance
from bridge.weights.layouts import CONVOLUTION

#: The names of the two results.
NAMES = ("JAX", "PyTorch")


def judge(operation: Operation, ours: np.ndarray) -> Comparison | str:
    """Return the verdict on JAX's result of an operation, or the reason why there is none.

    Args:
      operation: PyTorch's, float32.
      ours: JAX's result on the same operands, in the same layout.
    """
    theirs = operation.output
    if ours.dtype != theirs.dtype or theirs.dtype != np.float32:
        return f"JAX gave {ours.dtype} and PyTorch {theirs.dtype}, expected float32"
    if _sizes(ours) != _sizes(theirs):
        return other_shape(ours, theirs)
    ours = ours.reshape(theirs.shape)
    x, parameters, settings = operation.operands[0], operation.parameters, operation.settings
    if operation.kind == "convolution" and settings["groups"] == x.shape[-1] > 1:
        case = _depthwise_case(x, parameters["weight"], parameters.get("bias"), settings, operation.layer)
        return compare(ours, theirs, case, names=NAMES)
    within = expected(operation)
    if within is None:
        found = compared(ours, theirs, Expected(theirs.astype(np.float64), np.full(theirs.shape, np.inf)))
        return found if not found.different else f"no bound is known for {operation.kind}{_distances(operation, ours)}"
    found = compared(ours, theirs, within)
    return lower_precision(operation, ours, found) if found.verdict is Verdict.BUG else found


def _distances(operation: Operation, ours: np.ndarray) -> str:
    """Say how far both results of a function are from the correctly rounded one; nothing where it is not known."""
    right = nearest(operation)
    if right is None:
        return ""
    told = (
        f"{name} is within {int(ulp_distance(y, right)[np.isfinite(y) & np.isfinite(right)].max(initial=0))} ULP"
        for name, y in zip(NAMES, (ours, operation.output))
    )
    return f"; {' and '.join(told)} of the correctly rounded result"


def _depthwise_case(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, settings: Mapping[str, Any], name: str
) -> Case:
    """Return a depthwise convolution of PyTorch, with its settings, as a case."""
    return Case(
        x,
        np.ascontiguousarray(CONVOLUTION.to_flax(weight)),
        bias,
        strides=tuple(settings["stride"]),
        padding=tuple((p, p) for p in settings["padding"]),
        kernel_dilation=tuple(settings["dilation"]),
        name=name,
    )


def compared(ours: np.ndarray, theirs: np.ndarray, within: Expected) -> Comparison:
    """Return IDENTICAL, ROUNDING, BUG, NONFINITE, or INCONCLUSIVE where they differ and the bound is infinite."""
    differs = ~same_bits(ours, theirs)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    a, b = ours[differs & finite], theirs[differs & finite]
    distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
    allowed = within.allowed[differs & finite]
    with np.errstate(all="ignore"):
        ratios = [np.where(np.isfinite(y), within.ratio(y), 0.0) for y in (ours, theirs)]
        shared = np.where(distance > 0, distance / (2 * allowed), 0.0)
    sides = float(ratios[0].max(initial=0.0)), float(ratios[1].max(initial=0.0))
    worst = np.maximum(*ratios)
    verdict, name, cause, place = Verdict.IDENTICAL, "", "", ""
    where = None
    if differs.any():
        verdict, name, cause = Verdict.ROUNDING, "order", "order of operations, fused or not"
        where = np.unravel_index(np.argmax(np.where(differs, worst, -1.0)), ours.shape)
    if np.isinf(allowed[distance > 0]).any():
        verdict, name, cause = Verdict.INCONCLUSIVE, "overflow possible", "an intermediate result may overflow"
    if max(sides) > 1:
        wrong = [side for side, ratio in zip(NAMES, sides) if ratio > 1]
        verdict, name = Verdict.BUG, "outside the bound"
        cause = f"{' and '.join(wrong)} computed something else: the error is {max(sides):.3g} times the rounding bound"
        place = _place(worst > 1)
        where = np.unravel_index(np.argmax(worst), ours.shape)
    if (unlike := differs & ~finite).any():
        verdict, name = Verdict.NONFINITE, "nonfinite"
        where = np.unravel_index(np.argmax(unlike), ours.shape)
        cause = f"{np.count_nonzero(unlike)} elements are NaN or infinite in one result only, or in another way"
    return Comparison(
        *NAMES,
        verdict,
        ours.size,
        int(np.count_nonzero(differs)),
        float(distance.max(initial=0.0)),
        int(ulp_distance(a, b).max(initial=0)),
        float(shared.max(initial=0.0)),
        sides,
        where=None if where is None else tuple(map(int, where)),
        name=name,
        cause=cause,
        place=place,
    )


def lower_precision(operation: Operation, ours: np.ndarray, found: Comparison) -> Comparison:
    """Return PRECISION where operands rounded to a lower format explain the result; else `found`.

    The test is as strict as the one that failed: the exact result of rounded operands, in the bound of float32.
    """
    results = zip(NAMES, (ours, operation.output), found.own_bound_ratios)
    outside = {name: y for name, y, ratio in results if ratio > 1}
    for fmt in (TF32, FLOAT16, BFLOAT16):
        total = matrix_sum(operation, functools.partial(_rounded, fmt))
        if total is None:
            return found
        within = total.expected()
        if all((within.ratio(y) <= 1).all() for y in outside.values()):
            return dataclasses.replace(
                found,
                verdict=Verdict.PRECISION,
                name=f"{fmt.name} inputs",
                cause=f"{' and '.join(outside)} rounded input and kernel to {fmt.name}",
                fix='in JAX: precision="highest"; in PyTorch: torch.set_float32_matmul_precision("highest")',
            )
    return found


def _rounded(fmt: Format, array: np.ndarray) -> np.ndarray:
    return round_to(array.astype(np.float64), fmt).astype(array.dtype)


def _place(outside: np.ndarray) -> str:
    """Say how many elements are outside the bound, and in which channels."""
    if not outside.ndim:
        return ""
    channels = np.flatnonzero(outside.reshape(-1, outside.shape[-1]).any(axis=0))
    share = f"{np.count_nonzero(outside)} of {outside.size} elements"
    if len(channels) == outside.shape[-1]:
        return f"{share}, in all {len(channels)} channels"
    some = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    return f"{share}, in channels {some}"


def _sizes(array: np.ndarray) -> list[int]:
    """Return the shape without axes of size one: PyTorch keeps those of a mean over an image."""
    return [n for n in array.shape if n > 1]


def of_integers(ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Return IDENTICAL or BUG for integers or booleans, whatever their dtypes."""
    differs = ours != theirs
    count = int(np.count_nonzero(differs))
    found = Comparison(*NAMES, Verdict.IDENTICAL, ours.size, count, 0.0, 0, 0.0)
    if not count:
        return found
    where = tuple(int(i) for i in np.argwhere(differs)[0]) if differs.ndim else ()
    cause = f"{count} of {ours.size} numbers differ; the first is {ours[where]} in JAX and {theirs[where]} in PyTorch"
    return dataclasses.replace(found, verdict=Verdict.BUG, where=where, name="other numbers", cause=cause)


def other_shape(ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Return BUG for two shapes."""
    cause = f"JAX gives the shape {ours.shape}, PyTorch {theirs.shape}"
    fix = "compare stride, padding and features of the two layers"
    return Comparison(*NAMES, Verdict.BUG, 0, 0, math.inf, 0, math.inf, name="shape", cause=cause, fix=fix)
