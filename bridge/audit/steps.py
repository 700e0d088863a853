"""The steps of a program: library calls, convolutions, loops and copies, and the bytes that each moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from bridge.audit.hlo import Computation, Instruction, Module, Shape

#: Opcodes that cost nothing when they run: names and views.
_FREE = (
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
    "partition-id",
    "replica-id",
)

#: Opcodes that only move elements. A reshape that needs no copy is a bitcast in optimised HLO.
COPIES = ("copy", "transpose", "reshape")

#: Custom calls of the compiler that cost nothing either: they join parts that are adjacent in memory.
VIEWS = ("ConcatBitcast",)

#: Custom calls that run a hand-written kernel: Pallas for TPUs, Pallas for NVIDIA GPUs by Mosaic or Triton, and Triton.
HAND_WRITTEN = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call")

#: Libraries that run a fusion, by the kind in its backend's notes.
_LIBRARIES = {
    "__ynn_fusion": "YNNPACK",
    "__onednn_fusion": "oneDNN",
    "__xnn_fusion": "XNNPACK",
    "__cudnn$fusion": "cuDNN",
}


@dataclasses.dataclass(frozen=True)
class ProgramStep:
    """One instruction of the entry computation, or of a computation that it calls.

    Attributes:
      name, computation: the place.
      kind: "library call", "hand-written kernel", "convolution", "matrix product", "fused loop", "copy", or "loop" for
        a loop that XLA did not fuse.
      detail: the library, kernel, emitter or operation; empty for fused loops and copies.
      times: the number of runs; 1 if the text does not say.
      elements: of the largest array that it reads or writes.
      results: arrays that it writes, in the device's memory or on the chip.
      read_bytes, written_bytes: from and to the device's main memory, whole tiles and whole operands.
      is_result: true if it makes the result of the program.
      cycles: the compiler's estimate for one run; None if it notes none.
      is_priced: true if a hand-written kernel declares its cost; the compiler does not read the kernel.
    """

    name: str
    computation: str
    kind: str
    detail: str
    times: int
    elements: int
    results: tuple[Shape, ...]
    read_bytes: int
    written_bytes: int
    is_result: bool
    cycles: int | None = None
    is_priced: bool = False

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def steps(module: Module, backend: str) -> list[ProgramStep]:
    """Return the steps of a program in the order of the text; `backend` is "cpu", "tpu" or "gpu"."""
    return list(_steps(module, module.entry, backend, 1, True))


def passes(found: Sequence[ProgramStep], elements: int) -> list[ProgramStep]:
    """Return the steps that read or write an array of at least so many elements."""
    return [each for each in found if each.elements >= elements]


def products(module: Module) -> dict[str, int]:
    """Return the products of each convolution and matrix product by name, without products of padding zeros."""
    found = {}
    for computation in module.computations.values():
        for each in computation:
            count = _products(computation, each)
            if count:
                found[each.name] = count
    return found


def _steps(
    module: Module, computation: Computation, backend: str, times: int, outermost: bool
) -> Iterator[ProgramStep]:
    returned = _returned(computation) if outermost else set()
    for each in computation:
        if each.opcode in _FREE or each.opcode.endswith("-done") or target(each) in VIEWS:
            continue
        if each.opcode == "call":
            for called in module.called(each):
                yield from _steps(module, called, backend, times, outermost and each.name in returned)
            continue
        if each.opcode in ("while", "conditional"):
            count = _trips(each)
            for called in module.called(each):
                yield from _steps(module, called, backend, times * count, False)
            continue
        kind, detail = _kind(module, each, backend)
        results = _made(each)
        operands = [shape for name in each.operands for shape in _shapes(computation, name)]
        if each.opcode in ("slice", "slice-start", "dynamic-slice") and operands:  # only the part is read
            operands = [dataclasses.replace(results[0], space=operands[0].space), *operands[1:]]
        yield ProgramStep(
            each.name,
            computation.name,
            kind,
            detail,
            times,
            max((shape.elements for shape in (*operands, *results)), default=0),
            results,
            sum(shape.stored_bytes for shape in operands if shape.space == 0),
            sum(shape.stored_bytes for shape in results if shape.space == 0),
            each.name in returned,
            _cycles(each),
            "cost_estimate" in each.backend_config.get("custom_call_config", {}),
        )


def _kind(module: Module, instruction: Instruction, backend: str) -> tuple[str, str]:
    config = instruction.backend_config
    if instruction.opcode == "custom-call":
        if target(instruction) in HAND_WRITTEN:
            return "hand-written kernel", _kernel(instruction)
        return "library call", target(instruction) or "unnamed"
    for key in ("fusion_config", "fusion_backend_config"):
        named = config.get(key, {}).get("kind", "") if isinstance(config.get(key), dict) else ""
        if named in _LIBRARIES:
            return "library call", f"{_LIBRARIES[named]} {_operation(module, instruction)}".strip()
        if named.startswith("__triton"):
            return "fused loop", named
        if named.startswith("__custom"):
            return "library call", str(config[key].get("custom_fusion_config", {}).get("name", named))
    operation = _operation(module, instruction)
    if operation and backend == "cpu" and instruction.opcode == operation:
        return "library call", operation  # XLA:CPU passes those that it does not fuse to Eigen or oneDNN
    if operation == "convolution":
        return "convolution", config.get("convolution_algorithm_config", {}).get("emitter", "")
    if operation == "dot":
        return "matrix product", ""
    if instruction.opcode in COPIES or instruction.opcode in ("copy-start", "slice-start"):
        return "copy", ""
    if instruction.opcode == "fusion":
        only_copies = all(e.opcode in (*_FREE, *COPIES) for c in module.called(instruction) for e in c)
        return "copy" if only_copies else "fused loop", ""
    return "loop", instruction.opcode.removesuffix("-start")


def _operation(module: Module, instruction: Instruction) -> str:
    """Return "convolution" or "dot" if the instruction is or contains one, else ""."""
    held = {each.opcode for each in module.inside(instruction)}
    return next((name for name in ("convolution", "dot") if name in held), "")


def _shapes(computation: Computation, name: str) -> tuple[Shape, ...]:
    """Return the arrays of an operand; of an asynchronous operation, only the final array."""
    made = computation.instructions.get(name)
    return () if made is None else _made(made)


def _made(instruction: Instruction) -> tuple[Shape, ...]:
    """Return the arrays of its result, without the operands and states that an asynchronous start also returns."""
    if instruction.opcode == "copy-start":
        return instruction.shapes[:1]
    if instruction.opcode.endswith("-start"):
        return instruction.shapes[len(instruction.operands) :][:1]
    return instruction.shapes


def target(instruction: Instruction) -> str:
    """Return the target of a custom call; empty for other instructions."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def _kernel(instruction: Instruction) -> str:
    """Return the name of a kernel if the text has it, else the name of the instruction."""
    noted = re.search(r'\bname = "([^"]+)"', instruction.attributes.get("backend_config", ""))
    if noted:
        return noted[1]
    *path, last = ["", *instruction.op_name.split("/")]
    named = path[-1] if last == "pallas_call" else last
    return named if named and "(" not in named else f"%{instruction.name}"


def _cycles(instruction: Instruction) -> int | None:
    where = "bundle_analysis_data" if target(instruction) in HAND_WRITTEN else "window_config"
    noted = instruction.backend_config.get(where, {})
    count = str(noted.get("estimated_cycles", "")) if isinstance(noted, dict) else ""
    return int(count) if count.isdecimal() else None


def _returned(computation: Computation) -> set[str]:
    """Return the instructions that make a computation's result, behind tuples and views."""
    found, waiting = set(), [computation.root.name]
    while waiting:
        each = computation.instructions.get(waiting.pop())
        if each is not None and each.name not in found:
            found.add(each.name)
            if each.opcode in ("tuple", "bitcast", "get-tuple-element"):
                waiting += each.operands
    return found


def _trips(instruction: Instruction) -> int:
    known = instruction.backend_config.get("known_trip_count", {})
    count = str(known.get("n", "1")) if isinstance(known, dict) else "1"
    return int(count) if count.isdecimal() else 1


def _products(computation: Computation, instruction: Instruction) -> int:
    operands = [_shapes(computation, name) for name in instruction.operands]
    if len(operands) < 2 or not operands[0] or not operands[1]:
        return 0
    left, right = operands[0][0], operands[1][0]
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", ""))
    if labels:
        of_left, of_right, of_result = labels.groups()
        count = right.sizes[of_right.index("i")]
        for label, size in zip(of_result, instruction.shape.sizes):
            if label.isdigit():
                size = _pairs(instruction, int(label), left.sizes[of_left.index(label)], size)
            count *= size
        return count
    if instruction.opcode == "dot":
        axes = re.findall(r"\d+", instruction.attributes.get("lhs_contracting_dims", ""))
        return instruction.elements * math.prod(left.sizes[int(axis)] for axis in axes)
    return 0


def _pairs(instruction: Instruction, axis: int, size: int, outputs: int) -> int:
    """Count the pairs of output and tap along one axis of a convolution where the tap reads an input, not a zero."""
    window = instruction.attributes.get("window", "")

    def field(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\dx_\-]+)", window)
        return found[1].split("x")[axis] if found else default

    low = int(field("pad", "0_0").partition("_")[0])
    dilation = int(field("lhs_dilate", "1"))
    output = np.arange(outputs) * int(field("stride", "1"))
    tap = np.arange(int(field("size", "1"))) * int(field("rhs_dilate", "1"))
    position = output[:, None] + tap - low
    return int(((position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)).sum())
