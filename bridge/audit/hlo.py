"""Parse optimised HLO, as `compiled.as_text()` prints it, into computations of instructions.

The parser reads only what an audit needs: shapes with their layouts, operands, attributes and calls. The rest of a
line stays text in `attributes`. A line that is no instruction is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: Bits per element of the types whose names do not say it.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}

#: Attributes that name computations.
_CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "called_computations",
    "true_computation",
    "false_computation",
)

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](\{(?P<layout>[^{}]*)\})?")
_NAME = re.compile(r"%?(?P<name>[\w.\-]+)$")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[(){}\[\],]')
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
      dtype: as HLO names it: "f32", "bf16", "s32", "pred".
      sizes: of its axes.
      minor_to_major: its axes, fastest first; empty if the text has no layout.
      tile: sizes of the first tile, as (8, 128); empty if memory is not tiled.
      space: memory space; 0 is the device's main memory, on a TPU 1 is the memory on the chip.

    >>> Shape.parse("f32[8,56,56,144]{3,0,2,1:T(8,128)S(1)}").stored_bytes
    25690112
    """

    dtype: str
    sizes: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @classmethod
    def parse(cls, text: str) -> Shape:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ValueError(f"`text` is {text!r}, expected a shape such as f32[8,56]{{1,0}}")
        order, _, rest = (match["layout"] or "").partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        return cls(
            match["dtype"],
            _numbers(match["sizes"].replace("<=", "")),
            _numbers(order),
            _numbers(tile[1]) if tile else (),
            int(space[1]) if space else 0,
        )

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bits(self) -> int:
        """Bits per element."""
        found = re.search(r"\d+", self.dtype)
        return BITS.get(self.dtype, int(found[0]) if found else 0)

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of tiles."""
        return self.elements * self.bits // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory: the minor axes fill whole tiles."""
        sizes = list(self.sizes)
        for axis, size in zip(self.minor_to_major, reversed(self.tile)):
            sizes[axis] = -(-sizes[axis] // size) * size
        return math.prod(sizes) * self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      name: without the percent sign.
      shapes: of its result; several for a tuple, in the order of the text.
      opcode: such as "fusion", "convolution", "custom-call".
      operands: names of instructions of the same computation; for a constant or a parameter, its text.
      attributes: the rest of the line, as text.
      computation: the name of its computation.
      is_root: true for the instruction that its computation returns.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: Mapping[str, str] = dataclasses.field(hash=False)
    computation: str = ""
    is_root: bool = False

    @property
    def shape(self) -> Shape:
        """The first array of its result."""
        return self.shapes[0] if self.shapes else Shape("token", ())

    @property
    def elements(self) -> int:
        """Elements of its largest result."""
        return max((shape.elements for shape in self.shapes), default=0)

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs."""
        named = (self.attributes.get(key, "") for key in _CALLS)
        return tuple(name for text in named for name in re.findall(r"[\w.\-]+", text))

    @property
    def op_name(self) -> str:
        """Its name in the traced program, as "jit(f)/conv_general_dilated"; empty if the text has none."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        """The backend's notes; empty if they are no JSON object."""
        try:
            found = json.loads(self.attributes.get("backend_config", "{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: Mapping[str, Instruction]
    is_entry: bool

    @property
    def root(self) -> Instruction:
        return next((each for each in self.instructions.values() if each.is_root), list(self.instructions.values())[-1])

    @property
    def parameters(self) -> list[Instruction]:
        """The parameters, in the order of the arguments."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.operands[0]))

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: Mapping[str, Computation]

    @classmethod
    def parse(cls, text: str) -> Module:
        """Parse the text of one HLO module.

        Raises:
          ValueError: the text has no entry computation.
        """
        computations: dict[str, Computation] = {}
        header: re.Match[str] | None = None
        body: dict[str, Instruction] = {}
        for line in _INDEX_COMMENT.sub("", text).splitlines():
            if header is None:
                header, body = _HEADER.match(line), {}
            elif line.startswith("}"):
                if body:
                    name = header["name"]
                    computations[name] = Computation(name, body, header["entry"] is not None)
                header = None
            elif (found := _instruction(line, header["name"])) is not None:
                body[found.name] = found
        module = cls(computations)
        if not any(each.is_entry for each in computations.values()):
            first = next(iter(text.splitlines()), "")
            raise ValueError(f"`text` begins with {first[:60]!r}, expected HLO with an ENTRY computation")
        return module

    @property
    def entry(self) -> Computation:
        return next(each for each in self.computations.values() if each.is_entry)

    def called(self, instruction: Instruction) -> list[Computation]:
        """Return the computations that an instruction runs, as far as the text has them."""
        return [self.computations[name] for name in instruction.calls if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield the instruction and everything that it runs, at any depth; each computation once."""
        yield instruction
        seen: set[str] = set()
        waiting = self.called(instruction)
        while waiting:
            computation = waiting.pop()
            if computation.name in seen:
                continue
            seen.add(computation.name)
            for each in computation:
                yield each
                waiting += self.called(each)


def _instruction(line: str, computation: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = match["rest"]
    end = _closing(rest, 0) if rest.startswith("(") else len(rest.partition(" ")[0])  # a layout has no spaces
    shapes = tuple(Shape.parse(found[0]) for found in _SHAPE.finditer(rest[:end]))
    opcode = re.match(r"\s*([a-z][\w\-]*)\(", rest[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    operands = tuple(_operand(part) for part in _split(rest[start + 1 : stop - 1]))
    attributes = {}
    for part in _split(rest[stop:].lstrip(", ")):
        key, equals, value = part.partition("=")
        if equals:
            attributes[key.strip()] = value.strip()
    name, is_root = match["name"], match["root"] is not None
    return Instruction(name, shapes, opcode[1], operands, attributes, computation, is_root)


def _operand(text: str) -> str:
    """Return the name of an operand, which may follow its shape; for a constant, its text."""
    last = text.rsplit(" ", 1)[-1]
    match = _NAME.match(last)
    return match["name"] if match else text


def _closing(text: str, start: int) -> int:
    """Return the position after the bracket that closes the one at `start`; quoted text does not count."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += _DEPTH.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    cuts, depth = [-1], 0
    for token in _TOKEN.finditer(text):
        depth += _DEPTH.get(token[0], 0)
        if token[0] == "," and depth == 0:
            cuts.append(token.start())
    parts = (text[start + 1 : stop].strip() for start, stop in itertools.pairwise([*cuts, len(text)]))
    return [part for part in parts if part]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
