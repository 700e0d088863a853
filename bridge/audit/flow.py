"""Which of a program's arguments reach each of its instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.audit.hlo import Computation, Instruction, Module

#: Numbers of arguments.
Arguments = frozenset[int]

#: What hands its operands on as the parameters of the computation that it calls, one by one.
_ONE_BY_ONE = ("fusion", "call", "async-start")


class Flow:
    """The arguments that each instruction is made from.

    A tuple is made from all that its parts are made from, and so is a loop or a branch: it says too much there, and
    never too little.

    >>> body = ["  %x = f32[2] parameter(0)", "  %k = f32[2] parameter(1)", "  ROOT %n = f32[2] negate(%k)"]
    >>> module = Module.parse("\\n".join(["ENTRY %f {", *body, "}"]))
    >>> sorted(Flow(module).of(module.entry.root))
    [1]
    """

    def __init__(self, module: Module):
        self.module = module
        self._reached: dict[tuple[str, str], Arguments] = {}
        entry = module.entry
        self._run(entry, [frozenset([int(each.operands[0])]) for each in entry.parameters])

    def of(self, instruction: Instruction) -> Arguments:
        """Numbers of the arguments; none for constants and what is made of them, and for what never runs."""
        return self._reached.get((instruction.computation, instruction.name), frozenset())

    def _run(self, computation: Computation, arguments: Sequence[Arguments]) -> Arguments:
        """What its result is made from, where its parameters are made from `arguments`."""
        here: dict[str, Arguments] = {}
        for each in computation:
            if each.opcode == "parameter":
                number = int(each.operands[0])
                reached = arguments[number] if number < len(arguments) else frozenset()
            else:
                reached = self._through(each, here)
            here[each.name] = reached
            key = (computation.name, each.name)
            self._reached[key] = self._reached.get(key, frozenset()) | reached
        return here.get(computation.root.name, frozenset())

    def _through(self, instruction: Instruction, here: Mapping[str, Arguments]) -> Arguments:
        operands = [here.get(name, frozenset()) for name in instruction.operands]
        together = frozenset[int]().union(*operands)
        called = self.module.called(instruction)
        if not called:
            return together
        if instruction.opcode in _ONE_BY_ONE:
            return frozenset[int]().union(*(self._run(each, operands) for each in called))
        for each in called:
            self._run(each, [together] * len(each.parameters))
        return together
