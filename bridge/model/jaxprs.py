"""Read a JAX model as a flat list of equations, each with the path of the module that made it, and run parts of it.

Calls, rematerialization, custom derivatives and loops are walked: a loop that carries nothing is mapped, another is
unrolled. A choice by platform takes the CPU's branch. A convolution of `jaxdw` with an epilogue is read as its
definition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bridge.model.model_inputs import ModelInputs
from bridge.model.results import named
from jaxdw import epilogue
from jaxdw._compat import scan_counts

#: How the path of the running module stands among the names of an equation.
_SCOPE = re.compile(r"module<([^<>]*)>")

#: The paths of the modules whose `__call__` runs or has failed, the innermost last.
_RUNNING: list[str] = []

#: Names of calls that say nothing about what they compute.
_NAMELESS = {"<lambda>", "_where", "fn", "wrapped", "f", "", "_run", "_reduce_sum", "_var", "_mean", "clip"}


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation of JAX.

    Attributes:
      primitive: the operation; `params` are its settings.
      inputs, outputs: numbers of values.
      scope: the path of the module that was running; empty for the model itself, and for functions.
      aval: shape and dtype of the first result.
      call: the name of the innermost function that says what it computes, such as "gelu"; empty for none.
      call_number: the same for all equations of one such call.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str
    aval: Any
    call: str = ""
    call_number: int = -1

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model as equations in the order of computing.

    Attributes:
      equations: the operations.
      inputs: the numbers of the data; `outputs`: of the results.
      parameters: the path of each parameter, by its number.
      constants: the values of all parameters and constants, by number.
      avals: shape and dtype of each value.
      results: the name of each output.
      settings: of modules by path, as `bridge.model.jax_side.JaxModel` has them.
      incoming: the inputs that are gradients of the outputs; the first ones.
    """

    equations: Sequence[Equation]
    inputs: Sequence[int]
    outputs: Sequence[int]
    parameters: Mapping[int, str]
    constants: Mapping[int, Any]
    avals: Mapping[int, Any]
    results: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    incoming: Sequence[int] = ()


class ModelFails(ValueError):
    """A model that does not run to its end.

    Attributes:
      begun: what it computed before, with the values that were at hand then as results; None where that is not known.
    """

    def __init__(self, message: str, begun: Program | None) -> None:
        super().__init__(message)
        self.begun = begun


def read(function: Callable[..., Any], parameters: Mapping[str, Any], inputs: ModelInputs) -> Program:
    """Return the equations of a function of the parameters by path, and of the inputs.

    Raises:
      ModelFails: the function fails, or returns something that is no array.
    """
    names = list(parameters)
    values = [parameters[name] for name in names]
    results: list[str] = []

    def flat(values: Sequence[Any], *arrays: Any) -> Any:
        args, kwargs = inputs.split(arrays)
        made = list(arrays_in(function(dict(zip(names, values)), *args, **kwargs)))
        results[:] = [name for name, _ in made]
        return [jnp.asarray(value) for _, value in made]

    _RUNNING.clear()
    try:
        closed = jax.make_jaxpr(flat)(values, *inputs.arrays)
    except Exception as error:
        shapes = ", ".join(str(np.shape(x)) for x in inputs.arrays)
        where = f" in {_RUNNING[-1]}" if _RUNNING else ""
        begun = _begun(flat, names, values, inputs.arrays)
        raise ModelFails(f"`model` fails{where} on `inputs` of shape {shapes}: {_said(error)}", begun) from error
    return dataclasses.replace(_Reader().read(closed, names, values), results=results)


def definition(function: Callable[..., Any], *operands: Any) -> Program:
    """Return the equations of a function of arrays, which a primitive computes.

    Args:
      function: of arrays.
      operands: shapes and dtypes.
    """
    return _Reader().read(jax.make_jaxpr(function)(*operands), [], [])


def _begun(
    function: Callable[..., Any], names: Sequence[str], values: Sequence[Any], arrays: Sequence[Any]
) -> Program | None:
    """Return what a function computes before it fails: the values in its frames; None where they cannot be had."""

    def begun(values: Sequence[Any], *arrays: Any) -> list[Any]:
        own = getattr(arrays[0], "_trace", None)  # the values of a `jit` inside have another one
        try:
            function(values, *arrays)
        except Exception as error:
            known = [each for frame, _ in traceback.walk_tb(error.__traceback__) for each in frame.f_locals.values()]
            every = (x for each in known for x in (each if type(each) is tuple else (each,)))
            tracers = {id(x): x for x in every if isinstance(x, jax.core.Tracer) and getattr(x, "_trace", None) is own}
            return [x for x in tracers.values() if jnp.issubdtype(x.dtype, jnp.floating)]
        return []

    try:
        closed = jax.make_jaxpr(begun)(values, *arrays)
        return _Reader().read(closed, names, values)
    except Exception:
        return None


def arrays_in(result: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays that a model returns by name; a registered tree has names of its own."""
    for name, value in named(result):
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
                raise TypeError(f"it returns a {type(leaf).__name__}{name and ' as ' + repr(name)}, expected arrays")
            yield ".".join(filter(None, (name, *(key_name(key) for key in path)))), leaf


def key_name(key: Any) -> str:
    """Return a key of a tree's path as a word."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _said(error: Exception) -> str:
    """Return an error in one line of at most 300 characters."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class _Reader:
    """Number the values while equations are walked."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        self.calls = 0

    def read(self, closed: Any, names: Sequence[str], values: Sequence[Any]) -> Program:
        variables = [self.new(variable.aval) for variable in closed.jaxpr.invars]
        given = dict(zip(variables, values))
        self.constants |= given
        outputs = self.walk(closed.jaxpr, closed.consts, variables, "", ("", -1))
        parameters = dict(zip(variables, names))
        return Program(
            _needed(self.equations, outputs), variables[len(names) :], outputs, parameters, self.constants, self.avals
        )

    def new(self, aval: Any) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def constant(self, value: Any, aval: Any) -> int:
        number = self.new(aval)
        self.constants[number] = value
        return number

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], given: Sequence[int], scope: str, call: tuple[str, int]
    ) -> list[int]:
        """Add the equations of a jaxpr, and return the numbers of its results."""
        known: dict[Any, int] = dict(zip(jaxpr.invars, given))
        known |= {v: self.constant(c, v.aval) for v, c in zip(jaxpr.constvars, consts)}

        def number(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self.constant(np.asarray(atom.val, atom.aval.dtype), atom.aval)
            return known[atom]

        for eqn in jaxpr.eqns:
            inputs = [number(atom) for atom in eqn.invars]
            here = _scope(eqn, scope)
            results = self.equation(eqn.primitive, eqn.params, inputs, [v.aval for v in eqn.outvars], here, call)
            known |= dict(zip(eqn.outvars, results))
        return [number(atom) for atom in jaxpr.outvars]

    def equation(
        self,
        primitive: Any,
        params: Mapping[str, Any],
        inputs: Sequence[int],
        avals: Sequence[Any],
        scope: str,
        call: tuple[str, int],
    ) -> list[int]:
        """Add one equation, or those of the program that it calls."""
        name = primitive.name
        if name == "platform_index":
            cpu = next(i for i, each in enumerate(params["platforms"]) if each is None or "cpu" in each)
            return [self.constant(np.int32(cpu), avals[0])]
        if name == "cond" and inputs[0] in self.constants:
            branch = params["branches"][int(np.clip(self.constants[inputs[0]], 0, len(params["branches"]) - 1))]
            return self.walk(branch.jaxpr, branch.consts, inputs[1:], scope, call)
        if name == "scan":
            return self.scan(params, inputs, scope, call)
        if name == "depthwise_conv_with_epilogue":
            outer = scope.rpartition(".")[0]  # the epilogue belongs to the module around the layer
            return self.defined(functools.partial(epilogue.definition, **params), inputs, outer, call)
        inner = params.get("call_jaxpr", params.get("jaxpr", params.get("fun_jaxpr")))
        if inner is not None and name not in ("while", "cond"):
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return self.walk(jaxpr, consts, inputs, scope, self.named(str(params.get("name", "")), call))
        if not avals:
            return []  # it only prints or stores, as `jax.debug.print` does
        if name == "while":
            raise ValueError("`model` has a `while` loop, expected none: a `scan` or a Python loop is compared")
        outputs = [self.new(aval) for aval in avals]
        self.equations.append(Equation(primitive, params, tuple(inputs), tuple(outputs), scope, avals[0], *call))
        return outputs

    def named(self, name: str, call: tuple[str, int]) -> tuple[str, int]:
        """Return the call of this name, or the one that it is in."""
        if name in _NAMELESS or call[0]:
            return call
        self.calls += 1
        return name, self.calls

    def defined(
        self, function: Callable[..., Any], inputs: Sequence[int], scope: str, call: tuple[str, int]
    ) -> list[int]:
        closed = jax.make_jaxpr(function)(*(_like(self.avals[number]) for number in inputs))
        return self.walk(closed.jaxpr, closed.consts, inputs, scope, call)

    def scan(self, params: Mapping[str, Any], inputs: Sequence[int], scope: str, call: tuple[str, int]) -> list[int]:
        """Map a loop that carries nothing; unroll another."""
        body, length = params["jaxpr"], params["length"]
        consts, carry = scan_counts(params)
        run = jax.extend.core.jaxpr_as_fun(body)
        fixed, state, rows = inputs[:consts], list(inputs[consts : consts + carry]), inputs[consts + carry :]
        if not carry:
            axes = (None,) * consts + (0,) * len(rows)
            mapped = jax.vmap(lambda *args: run(*args), in_axes=axes)
            return self.defined(mapped, inputs, scope, call)
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        results: dict[int, list[int]] = {}
        for i in order:
            some = [self.defined(lambda row, i=i: row[i], [row], scope, call)[0] for row in rows]
            made = self.walk(body.jaxpr, body.consts, [*fixed, *state, *some], scope, call)
            state, results[i] = made[:carry], made[carry:]
        stacked = [
            self.defined(lambda *each: jnp.stack(each), [results[i][k] for i in range(length)], scope, call)[0]
            for k in range(len(results[0]) if results else 0)
        ]
        return [*state, *stacked]


def _needed(equations: Sequence[Equation], outputs: Sequence[int]) -> list[Equation]:
    """Return the equations on which the results depend."""
    needed, kept = set(outputs), []
    for equation in reversed(equations):
        if needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            kept.append(equation)
    return kept[::-1]


def _like(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _scope(eqn: Any, outer: str) -> str:
    found = _SCOPE.findall(str(eqn.source_info.name_stack))
    return found[-1] if found else outer


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Run one equation."""
    result = equation.primitive.bind(*values, **equation.params)
    return list(result) if equation.primitive.multiple_results else [result]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some equations as a function of values outside.

    Attributes:
      equations: in order.
      inputs: the numbers of what it takes; `output`: of what it gives.
    """

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    output: int

    def traced(self, *values: Any) -> Any:
        """Return the result within a program that is traced."""
        known = dict(zip(self.inputs, values))
        for eqn in self.equations:
            known |= zip(eqn.outputs, bind(eqn, [known[number] for number in eqn.inputs]))
        return known[self.output]

    def run(self, *values: Any) -> np.ndarray:
        """Return the result, compiled by itself, so that no neighbour is fused with it."""
        return np.asarray(_compiled(self)(*values))


_PROGRAMS: dict[Any, Callable[..., Any]] = {}


def _compiled(part: Part) -> Callable[..., Any]:
    """Return the compiled part; parts of the same equations share a program."""
    numbers = {number: i for i, number in enumerate(part.inputs)}
    lines = []
    for eqn in part.equations:
        inputs = tuple(numbers.setdefault(number, len(numbers)) for number in eqn.inputs)
        outputs = tuple(numbers.setdefault(number, len(numbers)) for number in eqn.outputs)
        lines.append((eqn.name, str(sorted((k, str(v)) for k, v in eqn.params.items())), inputs, outputs))
    key = tuple(lines), len(part.inputs), numbers[part.output]
    if key not in _PROGRAMS:
        if len(_PROGRAMS) > 512:
            _PROGRAMS.clear()
        _PROGRAMS[key] = jax.jit(part.traced)
    return _PROGRAMS[key]


@contextlib.contextmanager
def paths_as_scopes(modules: Mapping[int, str], types: Sequence[type]) -> Iterator[None]:
    """Give each equation the path of the module whose `__call__` runs.

    Args:
      modules: paths by the identity of the module.
      types: the modules' types, whose `__call__` is wrapped meanwhile.
    """
    own: list[tuple[type, Any]] = []

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = modules.get(id(self))
            if path is None:
                return original(self, *args, **kwargs)
            depth = len(_RUNNING)
            _RUNNING.append(path or "the model itself")
            with jax.named_scope(f"module<{path}>"):
                result = original(self, *args, **kwargs)
            del _RUNNING[depth:]  # what fails stays
            return result

        return call

    try:
        for kind in dict.fromkeys(types):
            if "__call__" in vars(kind):
                own.append((kind, vars(kind)["__call__"]))
                setattr(kind, "__call__", wrapped(vars(kind)["__call__"]))  # noqa: B010  (a method cannot be assigned)
        yield
    finally:
        for kind, original in own:
            setattr(kind, "__call__", original)  # noqa: B010
