"""Find the places where data gets narrower, and the narrowest type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from bridge.audit.flow import Flow
from bridge.audit.hlo import Instruction, Module, Shape
from bridge.audit.steps import HAND_WRITTEN, target

#: Bits of the significand, with the hidden bit. "bf16x3" is a product made of three bfloat16 products.
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

#: The type that a product rounds float32 operands to inside, by backend and precision; no entry means no rounding.
_PRODUCTS = {
    "tpu": {"default": "bf16", "high": "bf16x3"},
    "gpu": {"default": "tf32", "high": "tf32"},
}

#: The type that a dot with this `algorithm=` rounds its operands to.
_ALGORITHMS = {
    "dot_tf32_tf32_f32": "tf32",
    "dot_bf16_bf16_f32": "bf16",
    "dot_bf16_bf16_bf16": "bf16",
    "dot_bf16_bf16_f32_x3": "bf16x3",
    "dot_f16_f16_f32": "f16",
    "dot_f16_f16_f16": "f16",
}

#: Targets of custom calls that are libraries which multiply.
_MULTIPLIES = re.compile(r"cudnn|cublas|gemm|conv|dot|matmul", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A place where data gets narrower.

    Attributes:
      dtype: the type that it is rounded to: a key of `SIGNIFICANT_BITS`.
      arguments: names of the program's arguments that the data depends on.
      instruction, opcode, computation: the place.
      certain: true if the program says so; else hardware or a library decides, and usually rounds.
      precision: the precision that the program asks for: "default", "high", or an algorithm; empty for conversions.
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
    """Return the places where data that was given in `dtype` gets narrower, in the order of the text.

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
    """Return HLO's name of the type with the fewest significant bits that the data is rounded to.

    >>> narrowest([], "float32")
    'f32'
    """
    return min((each.dtype for each in found), key=SIGNIFICANT_BITS.__getitem__, default=HLO_TYPES[dtype])


Found = tuple[str, bool, str, tuple[str, ...]]  # dtype, certain, precision, arguments or () for all


def _conversions(module: Module, instruction: Instruction) -> Iterator[Found]:
    """Yield a result narrower than an operand; not for calls, whose computations are read themselves."""
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
    """Yield the types that a convolution or a matrix product rounds its float32 operands to, one per operand."""
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
        elif algorithm:  # the algorithm keeps float32, or nearly
            continue
        else:
            narrow, certain, asked = _PRODUCTS.get(backend, {}).get(precision, ""), False, precision
        names = tuple(arguments[number] for number in sorted(flow.of(made)) if number < len(arguments))
        if narrow and names:
            yield narrow, certain, asked, names


def _asked(instruction: Instruction) -> tuple[str, tuple[str, str]]:
    """Return the algorithm, empty if none is set, and the precisions of the first two operands."""
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
    """Return the significant bits, None if the type is not floating."""
    return SIGNIFICANT_BITS.get(shape.dtype) if shape.is_float else None
