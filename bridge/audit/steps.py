"""What a program runs, step by step: library calls, convolutions, loops and copies, and what each reads and writes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from bridge.audit.hlo import Computation, Instruction, Module, Shape

#: What costs nothing when it runs: names, views, and the far ends of what was begun before.
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

#: What changes where elements lie, and nothing else. A reshape that needs no copy is a bitcast in optimised HLO.
COPIES = ("copy", "transpose", "reshape")

#: Custom calls of the compiler's own that cost nothing either: parts that lie one behind the other, taken as a whole.
VIEWS = ("ConcatBitcast",)

#: Custom calls that run a kernel which somebody wrote by hand: Pallas for TPU, for NVIDIA's cards through Mosaic or
#: through Triton, and Triton alone.
HAND_WRITTEN = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call")

#: Libraries behind a fusion that says so in its backend's notes.
_LIBRARIES = {
    "__ynn_fusion": "YNNPACK",
    "__onednn_fusion": "oneDNN",
    "__xnn_fusion": "XNNPACK",
    "__cudnn$fusion": "cuDNN",
}


@dataclasses.dataclass(frozen=True)
class ProgramStep:
    """One instruction of the entry computation, or of what it calls.

    Attributes:
      name, computation: where it is.
      kind: "library call", "hand-written kernel", "convolution", "matrix product", "fused loop", "copy", or "loop": one
        that XLA did not fuse.
      detail: which library, kernel, emitter or operation; empty for fused loops and copies.
      times: how often it runs; 1 where the text does not say.
      elements: of the largest array that it reads or writes.
      results: arrays that it writes; stored in the device's memory or on the chip.
      read_bytes, written_bytes: between it and the device's main memory, whole tiles and whole operands.
      is_result: whether it makes what the program returns.
      cycles: the compiler's estimate for one run; None where it notes none.
      is_priced: whether a hand-written kernel says what it costs; the compiler does not look inside.
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
    """The steps of a program in the order of the text; `backend` is "cpu", "tpu" or "gpu"."""
    return list(_steps(module, module.entry, backend, 1, True))


def passes(found: Sequence[ProgramStep], elements: int) -> list[ProgramStep]:
    """Those that read or write an array of at least so many elements, as the output's."""
    return [each for each in found if each.elements >= elements]


def products(module: Module) -> dict[str, int]:
    """Multiply-adds of each convolution and matrix product, by name, without those on zeros that padding puts there."""
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
        if each.opcode in ("slice", "slice-start", "dynamic-slice") and operands:  # of a whole, only the part is read
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
        return "library call", operation  # XLA:CPU hands those it does not fuse to Eigen or oneDNN
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
    """ "convolution" or "dot" where the instruction is or holds one, else ""."""
    held = {each.opcode for each in module.inside(instruction)}
    return next((name for name in ("convolution", "dot") if name in held), "")


def _shapes(computation: Computation, name: str) -> tuple[Shape, ...]:
    """The arrays of an operand; of what was begun before, only the one that is there in the end."""
    made = computation.instructions.get(name)
    return () if made is None else _made(made)


def _made(instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays of its result; what is begun also returns what it works on, and how far it is."""
    if instruction.opcode == "copy-start":
        return instruction.shapes[:1]
    if instruction.opcode.endswith("-start"):
        return instruction.shapes[len(instruction.operands) :][:1]
    return instruction.shapes


def target(instruction: Instruction) -> str:
    """What a custom call calls; empty for all else."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def _kernel(instruction: Instruction) -> str:
    """The name that a kernel was given, as far as the text has it, else that of the instruction."""
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
    """The instructions that a computation's result is, behind tuples and views."""
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
    """Along one axis of a convolution: outputs times taps, where the tap reads the input and no zero beside it."""
    window = instruction.attributes.get("window", "")

    def field(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\dx_\-]+)", window)
        return found[1].split("x")[axis] if found else default

    low = int(field("pad", "0_0").partition("_")[0])
    spread = int(field("lhs_dilate", "1"))
    output = np.arange(outputs) * int(field("stride", "1"))
    tap = np.arange(int(field("size", "1"))) * int(field("rhs_dilate", "1"))
    position = output[:, None] + tap - low
    return int(((position >= 0) & (position <= (size - 1) * spread) & (position % spread == 0)).sum())
