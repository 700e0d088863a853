"""Hazards of a program, in sentences: rounding, windows in memory, needless products, strides in tiles."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from bridge.audit.hlo import Instruction, Module, Shape
from bridge.audit.precision import Rounding
from bridge.audit.steps import ProgramStep, products
from jaxdw.geometry import Geometry

#: The arguments in words.
_WORDS = {"x": "the input", "kernel": "the kernel", "bias": "the bias", "dy": "the gradient by the output"}

_TYPES = {"tf32": "TF32", "bf16x3": "three bf16 parts"}

#: Padding to whole tiles is reported from this ratio on.
_WASTE = 1.5

#: Temporaries and products are reported beyond this ratio to what is needed.
_MORE = 1.2


def hazards(
    module: Module,
    steps: Sequence[ProgramStep],
    roundings: Sequence[Rounding],
    geometry: Geometry,
    backend: str,
    *,
    temporary_bytes: int,
    padded_bytes: int,
    sums: int,
) -> list[str]:
    """Return one sentence per hazard, without a full stop.

    Args:
      module, steps, roundings: of the program.
      geometry: of the convolution.
      backend: "cpu", "tpu" or "gpu".
      temporary_bytes: bytes that the compiler allocates besides arguments and results.
      padded_bytes: bytes of the padded input, to compare with.
      sums: how often every product of the convolution is needed: 1, or 2 for both gradients.
    """
    return [
        *_rounded(roundings),
        *_windows(steps, geometry),
        *_needless_products(module, geometry, sums),
        *_temporaries(temporary_bytes, padded_bytes),
        *_loops(steps),
        *_hand_written(steps, backend),
        *(_tiles(module, steps, geometry) if backend == "tpu" else ()),
        *_copies(module, steps, geometry),
    ]


def _rounded(roundings: Sequence[Rounding]) -> list[str]:
    together: dict[Rounding, dict[str, None]] = {}  # arguments that are rounded to one type in one place
    for each in roundings:
        together.setdefault(dataclasses.replace(each, arguments=()), {}).update(dict.fromkeys(each.arguments))
    found = []
    for each, arguments in together.items():
        what, dtype = _and([_WORDS.get(name, name) for name in arguments]), _TYPES.get(each.dtype, each.dtype)
        are = "are" if len(arguments) > 1 else "is"
        if not each.certain:
            found.append(f"{what} may be rounded to {dtype} in {each.where}, at precision {each.precision}")
        elif each.precision:
            found.append(f"{what} {are} rounded to {dtype} by {each.where} ({each.precision})")
        else:
            before = " before the copy" if each.opcode == "copy" else ""
            found.append(f"{what} {are} rounded to {dtype}{before}: {each.where}")
    return found


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _windows(steps: Sequence[ProgramStep], geometry: Geometry) -> list[str]:
    """Find steps that write an element for every tap of every output, as one array or as several."""
    every = geometry.taps * math.prod(geometry.batch + geometry.output_spatial) * geometry.channels
    given = math.prod(geometry.x_shape)
    if geometry.taps == 1:
        return []
    written = [(sum(shape.elements for shape in each.results), each.name) for each in steps if not each.is_result]
    large = [(elements, name) for elements, name in written if elements >= every]
    if not large:
        return []
    elements, name = max(large)
    others = f" and {len(large) - 1} more" if len(large) > 1 else ""
    return [f"windows are materialised: {elements / given:.3g} times the input in %{name}{others}"]


def _needless_products(module: Module, geometry: Geometry, sums: int) -> list[str]:
    """Find convolutions and matrix products with far more products than the depthwise convolution has."""
    needed = int(geometry.valid_taps().sum()) * math.prod(geometry.batch) * geometry.features
    found = []
    for name, count in products(module).items():
        if count >= 2 * needed:
            times = count / needed
            dense = geometry.channels > 1 and times >= geometry.channels
            what = "a dense C x C convolution" if dense else "more products than the sum has"
            found.append(f"{what}: %{name} multiplies {times:.3g} times as often as needed")
    total = sum(products(module).values())
    if not found and total > sums * needed * _MORE:
        found.append(f"more products than the sum has: {total / (sums * needed):.3g} times as many")
    return found


def _temporaries(temporary_bytes: int, padded_bytes: int) -> list[str]:
    if temporary_bytes <= _MORE * padded_bytes:
        return []
    return [f"temporaries take {temporary_bytes / padded_bytes:.3g} times the padded input"]


def _loops(steps: Sequence[ProgramStep]) -> list[str]:
    times = max((each.times for each in steps), default=1)
    inner = sum(each.times == times for each in steps)
    return [] if times == 1 else [f"a loop of {times} rounds starts {inner} programs in each"]


def _hand_written(steps: Sequence[ProgramStep], backend: str) -> list[str]:
    found = []
    for each in steps:
        if each.kind == "hand-written kernel":
            priced = "uses the cost that its author declared" if each.is_priced else "leaves it out"
            estimate = f", and the compiler's estimate in seconds {priced}" if backend == "tpu" else ""
            found.append(f"{each.kind} {each.detail}: what it rounds and keeps inside is not seen here{estimate}")
    return found


def _tiles(module: Module, steps: Sequence[ProgramStep], geometry: Geometry) -> list[str]:
    found = []
    size = math.prod(geometry.output_shape)
    strided = [each for c in module.computations.values() for each in c if each.elements * 2 >= size and _strides(each)]
    if strided:
        rest = f" and {len(strided) - 1} more" if len(strided) > 1 else ""
        found.append(f"strides fall within tiles: {strided[0].opcode} %{strided[0].name}{rest}")
    x = module.entry.parameters[0].shape
    made = [(_waste(shape), each.name, shape) for each in steps for shape in each.results if shape.elements * 2 >= size]
    if _waste(x) >= _WASTE:
        found.append(f"the input takes {_waste(x):.3g} times its size: {_shape_in_tiles(x)}")
    waste, name, shape = max(made, key=lambda each: each[0], default=(0.0, "", x))
    if waste >= _WASTE * max(1.0, _waste(x)):
        found.append(f"%{name} takes {waste:.3g} times its size: {_shape_in_tiles(shape)}")
    return found


def _copies(module: Module, steps: Sequence[ProgramStep], geometry: Geometry) -> list[str]:
    """Find steps that only move at least as many elements as the output has; not copies between two memories."""
    large = [each for each in steps if each.kind == "copy" and each.elements >= math.prod(geometry.output_shape)]
    names = [f"%{each.name}" for each in large if not _instruction(module, each).opcode.endswith("-start")]
    if not names:
        return []
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return [f"copies that compute nothing: {_and(shown)}"]


def _instruction(module: Module, step: ProgramStep) -> Instruction:
    return module.computations[step.computation].instructions[step.name]


def _waste(shape: Shape) -> float:
    return shape.stored_bytes / shape.nbytes if shape.nbytes else 1.0


def _strides(instruction: Instruction) -> bool:
    """Return true if the instruction is a slice that leaves out rows or columns inside tiles."""
    if instruction.opcode != "slice":
        return False
    steps = [
        int(step[1]) if (step := re.fullmatch(r"\[\d+:\d+:(\d+)\]", part)) else 1
        for part in re.findall(r"\[[\d:]+\]", instruction.attributes.get("slice", ""))
    ]
    tiled = instruction.shape.minor_to_major[: len(instruction.shape.tile)]
    return any(steps[axis] > 1 for axis in tiled if axis < len(steps))


def _shape_in_tiles(shape: Shape) -> str:
    parts = [
        f"{shape.sizes[axis]} in {-(-shape.sizes[axis] // tile) * tile} {unit}"
        for axis, tile, unit in zip(shape.minor_to_major, reversed(shape.tile), ("lanes", "sublanes"))
        if shape.sizes[axis] % tile
    ]
    return ", ".join(parts)
