"""Find the arguments of a program that reach each of its instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.audit.hlo import Computation, Instruction, Module

#: Numbers of arguments.
Arguments = frozenset[int]

#: Opcodes whose operands are, one by one, the parameters of the computation that they call.
_ONE_BY_ONE = ("fusion", "call", "async-start")


class Flow:
    """The arguments that each instruction depends on.

    A tuple depends on everything that its parts depend on, and so does a loop or a branch. Their result may have too
    many arguments, and never too few.

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
        """Return numbers of arguments; none for constants, for what depends on constants alone, and for dead code."""
        return self._reached.get((instruction.computation, instruction.name), frozenset())

    def _run(self, computation: Computation, arguments: Sequence[Arguments]) -> Arguments:
        """Return the arguments that the result depends on, if the parameters depend on `arguments`."""
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
