"""What may surprise in a program, in plain words: rounding, windows in memory, needless products, strides in tiles."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from bridge.audit.hlo import Instruction, Module, Shape
from bridge.audit.precision import Rounding
from bridge.audit.steps import Step, products
from jaxdw.geometry import Geometry

#: What the arguments are to people.
_WORDS = {"x": "the input", "kernel": "the kernel", "bias": "the bias", "dy": "the gradient by the output"}

_TYPES = {"tf32": "TF32", "bf16x3": "three bf16 parts"}

#: From which share on padding to whole tiles is worth a word.
_WASTE = 1.5

#: Temporaries and products beyond this share of what is needed are worth a word.
_MORE = 1.2


def hazards(
    module: Module,
    steps: Sequence[Step],
    roundings: Sequence[Rounding],
    geometry: Geometry,
    backend: str,
    *,
    temporary_bytes: int,
    padded_bytes: int,
    sums: int,
) -> list[str]:
    """One sentence each, without a full stop; none where nothing was found.

    Args:
      module, steps, roundings: of the program.
      geometry: of the convolution.
      backend: "cpu", "tpu" or "gpu".
      temporary_bytes: what the compiler allocates besides arguments and results.
      padded_bytes: of the padded input, to which those are compared.
      sums: 1, or 2 for both gradients: how often every product of the convolution is needed.
    """
    return [
        *_rounded(roundings),
        *_windows(steps, geometry),
        *_needless_products(module, geometry, sums),
        *_temporaries(temporary_bytes, padded_bytes),
        *_loops(steps),
        *(_tiles(module, steps, geometry) if backend == "tpu" else ()),
    ]


def _rounded(roundings: Sequence[Rounding]) -> list[str]:
    found: dict[str, None] = {}
    for each in roundings:
        what = " and ".join(_WORDS.get(name, name) for name in each.arguments)
        dtype = _TYPES.get(each.dtype, each.dtype)
        if not each.certain:
            text = f"{what} may be rounded to {dtype} in {each.where}, at precision {each.precision}"
        elif each.precision:
            text = f"{what} is rounded to {dtype} by {each.where} ({each.precision})"
        else:
            before = " before the copy" if each.opcode == "copy" else ""
            text = f"{what} is rounded to {dtype}{before}: {each.where}"
        found[text] = None
    return list(found)


def _windows(steps: Sequence[Step], geometry: Geometry) -> list[str]:
    """Arrays with an element for every tap of every output."""
    every = geometry.taps * math.prod(geometry.batch + geometry.output_spatial) * geometry.channels
    given = math.prod(geometry.x_shape)
    if geometry.taps == 1:
        return []
    large = [
        (shape, each.name) for each in steps if not each.is_result for shape in each.results if shape.elements >= every
    ]
    if not large:
        return []
    shape, name = max(large, key=lambda found: found[0].elements)
    others = f" and {len(large) - 1} more" if len(large) > 1 else ""
    return [f"windows are materialised: {shape.elements / given:.3g} times the input in %{name}{others}"]


def _needless_products(module: Module, geometry: Geometry, sums: int) -> list[str]:
    """Convolutions and matrix products that multiply far more than the convolution has products."""
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


def _loops(steps: Sequence[Step]) -> list[str]:
    times = max((each.times for each in steps), default=1)
    inner = sum(each.times == times for each in steps)
    return [] if times == 1 else [f"a loop of {times} rounds runs {inner} programs of its own in each"]


def _tiles(module: Module, steps: Sequence[Step], geometry: Geometry) -> list[str]:
    found = []
    size = math.prod(geometry.output_shape)
    strided = [each for c in module.computations.values() for each in c if each.elements * 2 >= size and _strides(each)]
    if strided:
        rest = f" and {len(strided) - 1} more" if len(strided) > 1 else ""
        found.append(f"strides fall within tiles: {strided[0].opcode} %{strided[0].name}{rest}")
    (x,) = module.entry.parameters[0].shapes[:1]
    if x.nbytes and x.stored_bytes >= _WASTE * x.nbytes:
        found.append(f"the input takes {x.stored_bytes / x.nbytes:.3g} times its size: {_shape_in_tiles(x)}")
    copies = [each for each in steps if each.kind == "copy" and each.elements >= size]
    if copies:
        names = ", ".join(f"%{each.name}" for each in copies)
        found.append(f"the layout is changed by {names}")
    return found


def _strides(instruction: Instruction) -> bool:
    """Whether a slice leaves out rows or columns of tiles."""
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
