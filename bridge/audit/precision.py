"""The narrowest type that touches the data, and where."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from bridge.audit.flow import Flow
from bridge.audit.hlo import Instruction, Module, Shape
from bridge.audit.steps import HAND_WRITTEN, target

#: Bits of the significand, the hidden one included. "bf16x3" is a product made of three bfloat16 products.
SIGNIFICANT_BITS = {
    "f64": 53,
    "f32": 24,
    "bf16x3": 16,
    "tf32": 11,
    "f16": 11,
    "bf16": 8,
    "f8e3m4": 5,
    "f8e4m3": 4,
    "f8e4m3fn": 4,
    "f8e4m3b11fnuz": 4,
    "f8e4m3fnuz": 4,
    "f8e5m2": 3,
    "f8e5m2fnuz": 3,
    "f8e8m0fnu": 1,
    "f4e2m1fn": 2,
}

#: NumPy's names in HLO.
HLO_TYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}

#: What a product at each precision rounds float32 operands to inside, by backend; nothing where there is no entry.
_PRODUCTS = {
    "tpu": {"default": "bf16", "high": "bf16x3"},
    "gpu": {"default": "tf32", "high": "tf32"},
}

#: What an `algorithm=` of a dot takes its operands as.
_ALGORITHMS = {
    "dot_tf32_tf32_f32": "tf32",
    "dot_bf16_bf16_f32": "bf16",
    "dot_bf16_bf16_bf16": "bf16",
    "dot_bf16_bf16_f32_x3": "bf16x3",
    "dot_f16_f16_f32": "f16",
    "dot_f16_f16_f16": "f16",
}

#: Libraries that multiply, among the targets of custom calls.
_MULTIPLIES = re.compile(r"cudnn|cublas|gemm|conv|dot|matmul", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A place where data gets narrower.

    Attributes:
      dtype: what it is rounded to: a key of `SIGNIFICANT_BITS`.
      arguments: names of the program's arguments that are in it.
      instruction, opcode, computation: where.
      certain: whether the program says so; otherwise it leaves it to hardware or a library, which do so as a rule.
      precision: what the program asks for there: "default", "high", or the name of an algorithm; empty for conversions.
    """

    dtype: str
    arguments: tuple[str, ...]
    instruction: str
    opcode: str
    computation: str
    certain: bool = True
    precision: str = ""

    @property
    def bits(self) -> int:
        return SIGNIFICANT_BITS[self.dtype]

    @property
    def where(self) -> str:
        return f"{self.opcode} %{self.instruction} in %{self.computation}"


def roundings(module: Module, arguments: Sequence[str], backend: str, dtype: str) -> list[Rounding]:
    """Where what was given in `dtype` gets narrower than that, in the order of the text.

    Args:
      module: the optimised program.
      arguments: names of its arguments.
      backend: "cpu", "tpu" or "gpu".
      dtype: of the arguments: NumPy's name.
    """
    flow, given = Flow(module), SIGNIFICANT_BITS[HLO_TYPES[dtype]]
    found = []
    for computation in module.computations.values():
        for each in computation:
            named = tuple(arguments[number] for number in sorted(flow.of(each)) if number < len(arguments))
            if named:
                here = [*_conversions(module, each), *_products(module, flow, arguments, each, backend)]
                for narrow, certain, precision, names in here:
                    if SIGNIFICANT_BITS[narrow] < given:
                        place = (each.name, each.opcode, computation.name)
                        found.append(Rounding(narrow, names or named, *place, certain, precision))
    return found


def narrowest(found: Sequence[Rounding], dtype: str) -> str:
    """The type with the fewest significant bits that the data is rounded to: HLO's name.

    >>> narrowest([], "float32")
    'f32'
    """
    return min((each.dtype for each in found), key=SIGNIFICANT_BITS.__getitem__, default=HLO_TYPES[dtype])


Found = tuple[str, bool, str, tuple[str, ...]]  # dtype, certain, precision, arguments or () for all


def _conversions(module: Module, instruction: Instruction) -> Iterator[Found]:
    """A result narrower than an operand, unless that happened in a computation that is there to be looked into."""
    if instruction.opcode == "reduce-precision":
        bits = int(instruction.attributes.get("mantissa_bits", "52")) + 1
        named = next((name for name, own in SIGNIFICANT_BITS.items() if own <= bits), "f8e8m0fnu")
        yield named, True, f"{bits} significant bits", ()
        return
    if module.called(instruction) and instruction.opcode in ("fusion", "call", "while", "conditional", "async-start"):
        return
    result = _significant(instruction.shape)
    before = [_significant(shape) for shape in _operand_shapes(module, instruction)]
    if result is not None and any(own is not None and own > result for own in before):
        yield instruction.shape.dtype, True, "", ()


def _products(
    module: Module, flow: Flow, arguments: Sequence[str], instruction: Instruction, backend: str
) -> Iterator[Found]:
    """What a convolution or a matrix product rounds float32 operands to inside, each of the first two by itself."""
    library = target(instruction) not in HAND_WRITTEN and _MULTIPLIES.search(target(instruction)) is not None
    if instruction.opcode not in ("convolution", "dot") and not library:
        return
    computation = module.computations[instruction.computation]
    algorithm, precisions = _asked(instruction)
    for operand, precision in zip(instruction.operands[:2], precisions):
        made = computation.instructions.get(operand)
        if made is None or made.shape.dtype != "f32":
            continue
        if algorithm in _ALGORITHMS:
            narrow, certain, asked = _ALGORITHMS[algorithm], True, algorithm
        elif algorithm:  # one of those that keep float32, or nearly
            continue
        else:
            narrow, certain, asked = _PRODUCTS.get(backend, {}).get(precision, ""), False, precision
        names = tuple(arguments[number] for number in sorted(flow.of(made)) if number < len(arguments))
        if narrow and names:
            yield narrow, certain, asked, names


def _asked(instruction: Instruction) -> tuple[str, tuple[str, str]]:
    """The algorithm, "" where none is set, and the precision of the first two operands."""
    algorithm = instruction.attributes.get("algorithm", "")
    written = re.findall(r"\w+", instruction.attributes.get("operand_precision", ""))
    for config in instruction.backend_config.values():
        asked = config.get("precision_config", {}) if isinstance(config, dict) else {}
        written = written or [str(each).lower() for each in asked.get("operand_precision", ())]
        algorithm = algorithm or str(asked.get("algorithm", "ALG_UNSET")).removeprefix("ALG_").lower()
    padded = [*written, "default", "default"]
    return algorithm if algorithm != "unset" else "", (padded[0], padded[1])


def _operand_shapes(module: Module, instruction: Instruction) -> list[Shape]:
    here = module.computations[instruction.computation].instructions
    return [here[name].shape for name in instruction.operands if name in here]


def _significant(shape: Shape) -> int | None:
    """None for what is no floating type."""
    return SIGNIFICANT_BITS.get(shape.dtype) if shape.is_float else None
