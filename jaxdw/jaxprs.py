"""Walk a jaxpr: evaluate it with some equations replaced, enter jaxprs that it calls, find equations at any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

#: Primitives that only call a jaxpr, and the parameter that holds it. `jax.checkpoint` is "checkpoint" or "remat2".
CALLS = {
    "jit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

#: Takes an equation and its operands; returns the results, or None to evaluate the equation as it is.
Replace = Callable[[JaxprEqn, list[Any]], list[Any] | None]


def called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Return the jaxpr that an equation only calls; None for an equation that does anything else."""
    parameter = CALLS.get(equation.primitive.name)
    return None if parameter is None else closed(equation.params[parameter])


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr without constants as a closed one; JAX 0.12 has one class for both."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def is_jaxpr(value: Any) -> bool:
    """Return whether a parameter of an equation is a jaxpr, closed or not."""
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def evaluate(program: ClosedJaxpr, arguments: Sequence[Any], replace: Replace) -> list[Any]:
    """Return the outputs of a program, each equation replaced by what `replace` returns for it."""
    jaxpr = program.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = replace(equation, [read(atom) for atom in equation.invars])
        if results is None:
            inputs = [atom for atom in equation.invars if not isinstance(atom, Literal)]
            alone = Jaxpr((), inputs, equation.outvars, [equation], equation.effects, jaxpr.debug_info)
            results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*map(read, inputs))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def inner(equation: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield the jaxprs among the parameters of an equation: of calls, loops, conditions, kernels."""
    for value in equation.params.values():
        yield from filter(is_jaxpr, value if isinstance(value, tuple) else (value,))


def equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Yield every equation of a jaxpr and of the jaxprs within it, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for each in inner(equation):
            yield from equations(each)
