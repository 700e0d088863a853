"""Judge each region of an alignment: JAX's result on PyTorch's operands, within the bound of both computations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.diagnosis.target import Expected
from bridge.model import aten, primitives
from bridge.model.alignment import NORMALIZATIONS, Alignment, Region, layer_of, layouts
from bridge.model.causes import Cause, cause_of
from bridge.model.element_order import other_order
from bridge.model.elementwise_functions import PROBES, are_one, named
from bridge.model.explanations import Replayed
from bridge.model.jaxprs import Equation
from bridge.model.known_orders import KnownOrders
from bridge.model.operation_names import joined, kind_of_call, kind_of_convolution, kind_of_ours
from bridge.model.operation_verdicts import NAMES, compared, judge, of_integers, other_shape
from bridge.model.parameters import of_other_bits, with_momentum
from bridge.model.recorded_operations import operation_of, replayed
from bridge.model.running_error import Bounded
from bridge.model.torch_evaluation import is_known
from bridge.model.torch_graph import UNITS, Call
from bridge.numerics import BFLOAT16, FLOAT16, round_to, same_bits


@dataclasses.dataclass(frozen=True)
class Row:
    """A region in words, with its verdict.

    Attributes:
      name: the layer's path in JAX, or the path of the module that ran and the kind.
      torch: the layers or modules of PyTorch; "nothing" where PyTorch computes nothing.
      kind: what it computes.
      isolated: the comparison; None where there is none, for `reason`.
      replayed: how each result came about, by framework; empty where nothing was replayed.
    """

    name: str
    torch: str
    kind: str
    isolated: Comparison | None
    reason: str
    replayed: Mapping[str, Replayed] = dataclasses.field(default_factory=dict)


def judged(
    alignment: Alignment, region: Region, known: KnownOrders | None = None, ours: np.ndarray | None = None
) -> Row | None:
    """Return the row of a region; None for one that only moves elements.

    Args:
      alignment: of both models.
      region: the region.
      known: orders that were revealed before; None: nothing is replayed.
      ours: JAX's result on PyTorch's operands; None: the region is compiled by itself.
    """
    equations = core_equations(alignment, region)
    calls = core_calls(alignment, region)
    is_repeated = not region.is_met and not calls  # JAX computes a tensor that it has
    if is_repeated:
        return None
    if not equations and not calls and not region.wiring:
        return _moved(alignment, region, ours)
    words = _Words(alignment, region, equations, calls)
    if not calls and not region.wiring and words.ours == "nothing" and equations:
        return None
    isolated = words.wired() if region.wiring else _comparison(alignment, region, words, ours)
    made = ", ".join(dict.fromkeys(words.place(call) for call in calls)) or "nothing"
    layers = [call for call in calls if call.name in (*aten.CONTRACTIONS, *NORMALIZATIONS)]
    if (
        layers
        and not equations
        and not words.is_backward
        and isinstance(isolated, Comparison)
        and isolated.verdict.passes
    ):
        # as a residual branch whose last layer starts from zeros
        cause = f"JAX computes nothing where PyTorch computes {words.theirs}"
        isolated = dataclasses.replace(
            isolated,
            verdict=Verdict.CONVENTION,
            name="another operation",
            cause=f"{cause}; all elements agree, since these parameters and inputs do not show the difference",
            fix=f"compute {words.theirs} there in JAX",
        )
    if isinstance(isolated, str):
        return Row(words.name, made, words.kind, None, isolated)
    how: Mapping[str, Replayed] = {}
    if known is not None and isolated.verdict is Verdict.ROUNDING and len(calls) == 1 and not words.is_backward:
        y = run(alignment, region) if ours is None else ours
        isolated, how = replayed(alignment, region, calls[0], y, isolated, known)
    return Row(words.name, made, words.kind, isolated, "", how)


def _moved(alignment: Alignment, region: Region, ours: np.ndarray | None) -> Row | None:
    """Return a row where JAX only moves elements, and a layer reads them in another order than PyTorch's."""
    if region.is_equal or not region.part.equations:
        return None
    ours = run(alignment, region) if ours is None else ours
    theirs = region.tie.layout.to_jax(alignment.graph.values[region.tie.number])
    if ours.shape != theirs.shape or same_bits(ours, theirs.astype(ours.dtype)).all():
        return None
    exact = Expected(theirs.astype(np.float64), np.zeros(theirs.shape))
    order = other_order(ours, theirs) or "the order of the elements is another one in JAX"
    fix = "keep PyTorch's order in JAX"
    found = dataclasses.replace(
        compared(ours, theirs, exact), verdict=Verdict.CONVENTION, name="order of elements", cause=order, fix=fix
    )
    name = region.reader or alignment.scope(region.part.output)
    return Row(name, "nothing", "order of elements", found, "")


def core_equations(alignment: Alignment, region: Region) -> list[Equation]:
    """Return the equations that compute something from the data; of the backward pass, from incoming gradients."""
    found = [
        e
        for e in region.part.equations
        if e.name not in primitives.MOVES
        and e.name != "convert_element_type"
        and not (e.name.startswith("reduce_") and e.aval.size == alignment.program.avals[e.inputs[0]].size)
        and any(alignment.is_data(n) for n in e.inputs)
    ]
    return [e for e in found if alignment.is_back(e.outputs)] if alignment.is_backward(region) else found


def core_calls(alignment: Alignment, region: Region) -> list[Call]:
    """Return the operators that compute something from the data; of the backward pass, from incoming gradients."""
    found = [c for c in region.calls if alignment.is_core(c)]
    return [c for c in found if not alignment.late.isdisjoint(c.outputs)] if alignment.is_backward(region) else found


class _Words:
    """The names of one region."""

    def __init__(
        self, alignment: Alignment, region: Region, equations: Sequence[Equation], calls: Sequence[Call]
    ) -> None:
        self.alignment, self.region, self.equations, self.calls = alignment, region, equations, calls
        self.ours_function = alignment.function_of_ours(region.part.equations, region.part.inputs, region.part.output)
        self.theirs_function = alignment.function_of_theirs(region.calls, region.sources, region.tie.number)
        self.is_backward = alignment.is_backward(region)
        self.at: Call | None = None  # the operator that a cause changes
        self.layer = ""  # the layer of JAX whose parameters differ

    @property
    def ours(self) -> str:
        """What JAX computes."""
        if not self.equations:
            return "nothing"
        if self.ours_function is not None:
            name = named(*self.ours_function)
            if name is not None:
                return "nothing" if name == "identity" else name
        return kind_of_ours(self.equations)

    @property
    def theirs(self) -> str:
        """What PyTorch computes."""
        if not self.calls:
            return "nothing"
        if self.theirs_function is not None:
            name = named(*self.theirs_function)
            if name is not None:
                return "nothing" if name == "identity" else name
        return joined([kind_of_call(call) for call in self.calls])

    @property
    def both(self) -> tuple[str, str]:
        """What both compute; where PyTorch computes nothing, with the function before it: relu6 for relu."""
        data = [n for n in self.region.part.inputs if self.alignment.is_data(n)]
        before = self.alignment.region_of.get(data[0]) if len(data) == 1 and not self.calls else None
        if before is None or self.ours_function is None:
            return self.ours, self.theirs
        theirs = self.alignment.function_of_theirs(before.calls, before.sources, before.tie.number)
        equations = (*before.part.equations, *self.region.part.equations)
        inputs = (*before.part.inputs, *(n for n in self.region.part.inputs if n != data[0]))
        ours = self.alignment.function_of_ours(equations, inputs, self.region.part.output)
        names = [None if each is None else named(*each) for each in (ours, theirs)]
        is_known = names[0] not in (None, "identity") and names[1] not in (None, "identity")
        return (str(names[0]), str(names[1])) if is_known else (self.ours, self.theirs)

    @property
    def parameter(self) -> str:
        """The parameter of PyTorch that a single sum or product takes, such as " with blocks.0.gamma"; else nothing."""
        named = self.alignment.names_of_values
        own = [name for call in self.calls for operand in call.operands for name in named.get(operand, ())]
        return f" with {own[0]}" if len(self.calls) == 1 == len(own) and self.calls[0].name in ("add", "mul") else ""

    @property
    def kind(self) -> str:
        if self.region.wiring:
            return "wiring"
        if len(self.calls) == 1 and self.calls[0].name == "convolution":
            return kind_of_convolution(self.alignment, self.calls[0])
        if self.at is not None:
            return kind_of_call(self.at)
        ours, theirs = self.ours, self.theirs
        if len(self.calls) == 1 and self._shares_parameters:
            return theirs
        is_named = self.ours_function is not None and named(*self.ours_function) is not None
        return theirs if ours == "nothing" or (self.region.is_equal and self.calls and not is_named) else ours

    @property
    def _shares_parameters(self) -> bool:
        """True where both sides take the same parameters."""
        ours = {n for leaf in self.alignment.leaves(self.region) for n in self.alignment.torch_names.get(leaf, ())}
        return any(ours & self.alignment.names_of_values.get(n, frozenset()) for n in self.calls[0].operands)

    @property
    def name(self) -> str:
        """The path of the layer, or of the module and the kind; of a gradient, what it is of or comes through."""
        if not self.alignment.is_backward(self.region):
            return self._place
        name = self.alignment.result_of(self.region)
        return name or f"gradient through {self._place.removesuffix('_gradient')}"

    @property
    def _place(self) -> str:
        if self.region.wiring and self.region.reader:
            return self.region.reader
        if self.layer:
            return self.layer
        if self.at is not None and (layer := self.layer_of(self.at)):
            return layer
        leaves = self.alignment.leaves(self.region)
        layers = list(dict.fromkeys(leaf.rpartition(".")[0] or leaf for leaf in leaves))
        if len(layers) == 1 and self.equations:
            return layers[0]
        missing = [layer for call in self.calls if (layer := self.layer_of(call, everywhere=True))]
        if not self.equations and missing:
            return missing[0]
        if self.equations:
            scope, kind = self.equations[-1].scope, self.kind
        else:
            scope, kind = self.alignment.scope(self.region.part.output), self.theirs
            scope = scope.rpartition(".")[0] if self.alignment.is_layer(scope) else scope
        scope = scope or self.alignment.scope_before(self.region.part)
        kind = kind.rpartition(" to ")[2].replace(" ", "_")
        return scope if scope.rpartition(".")[2] == kind else ".".join(filter(None, (scope, kind)))

    def layer_of(self, call: Call, *, everywhere: bool = False) -> str:
        """Return the path of the layer of JAX whose parameters an operator of PyTorch takes; empty for none.

        Args:
          call: the operator.
          everywhere: look at all parameters of JAX, and not only at those of the region.
        """
        names = {name for n in call.operands for name in self.alignment.names_of_values.get(n, ())}
        for leaf in self.alignment.torch_names if everywhere else self.alignment.leaves(self.region):
            if names & set(self.alignment.torch_names.get(leaf, ())):
                return leaf.rpartition(".")[0] or leaf
        return ""

    @property
    def is_one_layer(self) -> bool:
        """True where both compute one convolution or matrix product."""
        ours = [e for e in self.equations if e.name in primitives.CONTRACTIONS]
        return len(self.calls) == 1 and self.calls[0].name in aten.CONTRACTIONS and len(ours) == 1

    def place(self, call: Call) -> str:
        layer = layer_of(call, self.alignment.names_of_values)
        return call.module or "the model itself" if " in " in layer else layer

    def wired(self) -> Comparison:
        return Comparison(
            *NAMES,
            Verdict.BUG,
            0,
            0,
            math.inf,
            0,
            math.inf,
            name="wiring",
            cause=self.region.wiring,
            fix="let both read the result of the same layer",
        )


def _comparison(alignment: Alignment, region: Region, words: _Words, ours: np.ndarray | None) -> Comparison | str:
    """Return the verdict on a region, or why there is none."""
    is_alone = ours is None
    try:
        ours = run(alignment, region) if ours is None else ours
    except (TypeError, ValueError) as error:
        return f"JAX does not run it alone: {error}"
    theirs = region.tie.layout.to_jax(alignment.graph.values[region.tie.number])
    if ours.size != theirs.size:
        return _explained(words, other_shape(ours, theirs), cause_of(alignment, region), False)
    if ours.dtype.kind in "iub" and theirs.dtype.kind in "iub":
        same = of_integers(ours, theirs)
        return same if same.verdict.passes else _explained(words, same, cause_of(alignment, region), False)
    if ours.dtype.name in UNITS:
        ours = ours.astype(np.float32)
    if ours.dtype != theirs.dtype:
        return f"JAX gave {ours.dtype} and PyTorch {theirs.dtype}, expected float32"
    is_known = region.tie.is_proved and not is_alone  # what rounding may change need not be known
    if is_known and ours.shape == theirs.shape and same_bits(ours, theirs).all():
        same = Comparison(*NAMES, Verdict.IDENTICAL, ours.size, 0, 0.0, 0, 0.0, (0.0, 0.0))
        return _with_parameters(words, _other_function(words, same))
    return _of_numbers(words, ours, theirs)


def _of_numbers(words: _Words, ours: np.ndarray, theirs: np.ndarray) -> Comparison | str:
    """Return the verdict on two results in float32, within the bound of both computations."""
    alignment, region = words.alignment, words.region
    computed, exact = _exact(words)
    within = _of_operation(alignment, region, words, ours)
    if within is None:
        if exact is None and computed is None:
            same = compared(ours, theirs, Expected(theirs.astype(np.float64), np.full(theirs.shape, np.inf)))
            unknown = next((c.name for c in words.calls if not is_known(c.name)), "")
            return same if same.verdict is Verdict.IDENTICAL else region.unknown or f"no bound is known for {unknown}"
        within = compared(ours, theirs, _within(computed, exact))
        if exact is None and within.verdict is not Verdict.IDENTICAL:
            return region.unknown or f"no bound is known for {', '.join(_unknown(words.calls))} in PyTorch"
    found = within
    if found.verdict is Verdict.BUG and (lower := _lower_precision(region, exact, ours, theirs, found)) is not None:
        return lower
    differs = computed is not None and exact is not None and _differs(computed, exact)
    if found.verdict.passes and not differs:
        return _with_parameters(words, _other_function(words, _of_other_dtype(words, found)))
    if not found.verdict.passes and found.verdict not in (Verdict.BUG, Verdict.NONFINITE):
        return found
    cause = None if words.is_backward else cause_of(alignment, region)
    if cause is None and found.verdict is Verdict.BUG and not words.is_backward:
        allowed = _within(computed, exact).allowed if exact is not None or computed is not None else 0.0
        if order := other_order(ours, theirs, allowed):
            cause = Cause("order of elements", order, "keep PyTorch's order in JAX")
    return _explained(words, found, cause, differs)


def _exact(words: _Words) -> tuple[Bounded | None, Bounded | None]:
    """Return JAX's value and PyTorch's in float64 with their errors, both in JAX's layout; None for an unknown one."""
    alignment, region = words.alignment, words.region
    layout = region.tie.layout
    computed = region.ours
    exact = alignment.exact(region.calls, region.sources, region.tie.number)
    if words.is_backward:
        computed, exact = alignment.eased(region.part, region.tie.number) or (computed, exact)
    if exact is not None:
        errors = (layout.to_jax(np.broadcast_to(e, exact.shape)) for e in (exact.rounding, exact.function))
        exact = Bounded(layout.to_jax(exact.value), *errors)
    return computed, exact


def _of_other_dtype(words: _Words, found: Comparison) -> Comparison:
    """Return PRECISION where PyTorch computes in a dtype below float32 and JAX in float32; else `found`."""
    lower = words.alignment.graph.lower.get(words.region.tie.number)
    is_wide = {str(e.aval.dtype) for e in words.equations} == {"float32"} and (
        words.is_one_layer or not any(str(e.aval.dtype) in UNITS for e in words.alignment.program.equations)
    )
    if lower is None or not is_wide or found.verdict is Verdict.IDENTICAL:
        return found
    cause, fix = f"PyTorch computes in {lower} here, and JAX in float32", f"dtype=jnp.{lower} in JAX"
    return dataclasses.replace(found, verdict=Verdict.PRECISION, name=f"{lower} in PyTorch", cause=cause, fix=fix)


def run(alignment: Alignment, region: Region) -> np.ndarray:
    """Return JAX's result on PyTorch's operands; they are rounded to a lower dtype only where JAX needs that."""
    try:
        return region.part.run(*region.operands)
    except TypeError:
        avals = alignment.program.avals
        lowered = (
            x if x.dtype.kind != "f" else x.astype(avals[n].dtype) for n, x in zip(region.part.inputs, region.operands)
        )
        return region.part.run(*lowered)


def _within(ours: Bounded | None, exact: Bounded | None) -> Expected:
    """Return the exact result, and the greater one of both bounds."""
    base = exact if exact is not None else ours
    assert base is not None
    allowed = np.broadcast_to(np.asarray(base.rounding, np.float64), base.shape)
    function = np.asarray(base.function)
    if ours is not None and exact is not None:
        allowed = np.maximum(allowed, ours.rounding)
        function = function + ours.function
    return Expected(base.value, allowed + function)


def _unknown(calls: Sequence[Call]) -> list[str]:
    return [c.name for c in calls if not is_known(c.name)] or [c.name for c in calls]


def _of_operation(alignment: Alignment, region: Region, words: _Words, ours: np.ndarray) -> Comparison | None:
    """Return the verdict on a convolution or a fully connected layer, whose orders and conventions are known."""
    if len(words.calls) != 1:
        return None
    (call,) = words.calls
    if alignment.graph.lower:
        return None
    operation = operation_of(alignment, call)
    if (
        operation is None
        or operation.kind not in ("convolution", "linear")
        or ours.size != operation.output.size
        or call.outputs[0] != region.tie.number
    ):
        return None
    return_ = region.tie.layout.to_torch(ours)
    if return_.ndim > 2:
        return_ = np.moveaxis(return_, 1, -1)
    found = judge(operation, np.ascontiguousarray(return_))
    return found if isinstance(found, Comparison) else None


def _differs(ours: Bounded, exact: Bounded) -> bool:
    """Return True where both are other functions: their float64 values are further apart than float64's errors."""
    with np.errstate(all="ignore"):
        apart = np.abs(ours.value - exact.value) > np.asarray(ours.function) + exact.function
    return bool((apart & np.isfinite(ours.value) & np.isfinite(exact.value)).any())


def _lower_precision(
    region: Region, exact: Bounded | None, ours: np.ndarray, theirs: np.ndarray, found: Comparison
) -> Comparison | None:
    """Return PRECISION where JAX computes in a dtype below float32, and that explains the result."""
    lower = {str(e.aval.dtype) for e in region.part.equations if str(e.aval.dtype) in UNITS}
    if not lower or exact is None:
        return None
    values = {n: Bounded.exact(a) for n, a in zip(region.part.inputs, region.operands)}
    try:
        for equation in region.part.equations:
            values |= zip(
                equation.outputs, primitives.evaluate(equation, [values[n] for n in equation.inputs], lower=True)
            )
    except primitives.UnknownPrimitive:
        return None
    wide = values[region.part.output]
    u = max(UNITS[name] for name in lower)
    allowed = np.asarray(wide.rounding) + u * np.abs(wide.value) + wide.function + exact.function
    with np.errstate(all="ignore"):
        if (np.abs(ours - exact.value) > allowed).any():
            return None
    name = " and ".join(sorted(lower))
    return dataclasses.replace(
        found,
        verdict=Verdict.PRECISION,
        name=f"{name} in JAX",
        cause=f"JAX computes in {name} here",
        fix="compute it in float32 in JAX: dtype=jnp.float32",
    )


def _other_function(words: _Words, found: Comparison) -> Comparison:
    """Return CONVENTION where both compute functions of one number that these data do not tell apart."""
    ours, theirs = words.ours_function, words.theirs_function
    if ours is None and not words.equations:
        ours = PROBES, np.zeros_like(PROBES)
    if theirs is None and not words.calls:
        theirs = PROBES, np.zeros_like(PROBES)
    if ours is None or theirs is None:
        return found
    if are_one(ours, theirs):
        return found
    seen = "" if found.different else "; all elements agree, since these data do not show the difference"
    return dataclasses.replace(
        found,
        verdict=Verdict.CONVENTION,
        name="another operation",
        cause=f"JAX computes {words.both[0]} where PyTorch computes {words.both[1]}{seen}",
        fix=f"compute {words.both[1]} there in JAX",
    )


def _explained(words: _Words, found: Comparison, cause: Cause | None, differs: bool) -> Comparison:
    if cause is None and words.is_backward:
        return _of_gradient(words, found)
    if cause is not None:
        words.at = cause.call
        return dataclasses.replace(found, verdict=Verdict.CONVENTION, name=cause.name, cause=cause.text, fix=cause.fix)
    ours, theirs = words.ours, words.theirs
    other = _other_numbers(words)
    if found.verdict.passes and other:
        return _with_parameters(words, found)
    if other or (found.verdict is Verdict.BUG and words.is_one_layer):
        return dataclasses.replace(found, verdict=Verdict.BUG, cause="; ".join(filter(None, (other, found.cause))))
    if not words.calls and (extra := _extra_parameter(words)):
        fix = "leave it out in JAX, as use_bias=False does"
        return dataclasses.replace(found, verdict=Verdict.CONVENTION, name="extra parameter", cause=extra, fix=fix)
    if words.equations and all(e.aval.dtype.kind in "iub" for e in words.equations) and not words.calls:
        place = words.layer_of(words.region.calls[-1]) if words.region.calls else ""
        said = f"JAX takes other elements{' of ' + place if place else ''} than PyTorch: the indices differ"
        return dataclasses.replace(found, verdict=Verdict.BUG, name="indices", cause=said, fix="compare the indices")
    if ours != theirs:
        simple = (
            found.verdict is not Verdict.NONFINITE
            and (words.ours_function is not None or not words.equations)
            and (words.theirs_function is not None or not words.calls)
        )
        return dataclasses.replace(
            found,
            verdict=Verdict.CONVENTION if simple or not words.equations or not words.calls else Verdict.BUG,
            name="another operation",
            cause=f"JAX computes {words.both[0]} where PyTorch computes {words.both[1]}{words.parameter}",
            fix=f"compute {words.both[1]} there in JAX",
        )
    if found.verdict.passes and differs:
        return dataclasses.replace(
            found,
            verdict=Verdict.BUG,
            name="another function",
            cause=f"both compute {theirs}, but not the same: the exact results differ, by less than float32 shows here",
        )
    return found


def _extra_parameter(words: _Words) -> str:
    """Say which parameter JAX adds or multiplies by, where PyTorch has none."""
    alignment = words.alignment
    extra = [leaf for leaf in alignment.leaves(words.region) if not alignment.torch_names.get(leaf)]
    return f"JAX computes {words.ours} with {extra[0]}, a parameter that PyTorch has not" if extra else ""


def _of_gradient(words: _Words, found: Comparison) -> Comparison:
    """Return a verdict that fails on a part of the backward pass, with what is known of it."""
    alignment, graph = words.alignment, words.alignment.program.equations
    stops = list(dict.fromkeys(e.scope or "the model itself" for e in graph if e.name == "stop_gradient"))
    stops = [*stops[:2], f"{len(stops) - 2} other modules"] if len(stops) > 3 else stops
    of = " and then ".join(dict.fromkeys(kind_of_call(call) for call in words.calls)) or "nothing"
    if not words.equations and words.calls and alignment.is_zero(words.region):
        cause, name = f"JAX passes no gradient back here, where PyTorch computes {of}", "gradient missing"
    elif factor := _gradient_factor(words):
        cause, name = f"JAX's gradient is {factor:.6g} times PyTorch's", "scale of the gradient"
    elif words.theirs == "nothing":
        cause, name = f"in the backward pass JAX computes {words.ours} where PyTorch computes nothing", "gradient"
    else:
        cause, name = f"JAX's gradient is another one than PyTorch's {of}", "gradient"
    if stops:
        cause += f"; JAX stops gradients in {', '.join(stops)}"
    fix = "look for stop_gradient, custom derivatives and a factor in the JAX function"
    return dataclasses.replace(found, verdict=Verdict.BUG, name=name, cause=cause, fix=fix)


def _gradient_factor(words: _Words) -> float | None:
    """Return the number by which all of JAX's result is PyTorch's, to within 2^-12; None where there is none."""
    region = words.region
    theirs = region.tie.layout.to_jax(words.alignment.graph.values[region.tie.number])
    if region.ours is None or region.ours.shape != theirs.shape:
        return None
    ours, wide = region.ours.value.ravel(), theirs.astype(np.float64).ravel()
    norm = float(wide @ wide)
    factor = float(ours @ wide) / norm if norm > 0 else 0.0
    is_near = np.abs(ours - factor * wide).max(initial=0.0) <= 2.0**-12 * np.abs(ours).max(initial=0.0)
    return factor if factor and is_near else None


def _with_parameters(words: _Words, found: Comparison) -> Comparison:
    """Return BUG or CONVENTION where parameters or the momentum differ and the results do not show it; else `found`."""
    if other := _other_numbers(words):
        return dataclasses.replace(found, verdict=Verdict.BUG, name="parameters", cause=other, fix="convert it again")
    for call in words.calls:
        momentum = words.alignment.program.settings.get(words.layer_of(call), {}).get("momentum")
        if momentum is not None and call.get("momentum") is not None:
            found = with_momentum(found, momentum, call.get("momentum"))
    return found


def _other_numbers(words: _Words) -> str:
    """Say which parameters of a layer have other numbers in JAX than in PyTorch."""
    program, graph = words.alignment.program, words.alignment.graph
    said = []
    for n in words.region.part.inputs:
        path = program.parameters.get(n, "")
        for name in words.alignment.torch_names.get(path, ()) if path else ():
            layer, _, own = name.rpartition(".")
            theirs = graph.layers.get(layer, {}).get(own)
            ours = np.asarray(program.constants[n])
            if theirs is None or ours.size != theirs.size or ours.dtype != theirs.dtype:
                continue
            if np.array_equal(np.sort(ours, axis=None), np.sort(theirs, axis=None), equal_nan=True):
                if _is_turned(words, n, theirs):
                    said.append(f"{path} has the numbers of {name} in another order")
                continue
            words.layer = words.layer or path.rpartition(".")[0]
            if others := words.alignment.torch_with_numbers(ours):
                said.append(f"{path} has the numbers of {others[0]}")
                continue
            here = _nearest_layout(ours, theirs)
            wide = theirs.astype(np.float64)
            rounded = [
                f.name for f in (FLOAT16, BFLOAT16) if here is not None and np.array_equal(round_to(wide, f), here)
            ]
            if rounded:
                said.append(f"{path} has the numbers of {name}, rounded to {rounded[0]}")
            elif here is not None and np.count_nonzero(~same_bits(here, theirs)) <= theirs.size / 2:
                said.append(of_other_bits(name, here, theirs))
            else:
                said.append(f"{path} has other numbers than {name}")
    return "; ".join(filter(None, said))


def _is_turned(words: _Words, number: int, theirs: np.ndarray) -> bool:
    """Return True for the kernel of a convolution whose numbers are at other places than PyTorch's."""
    for equation in words.equations:
        if equation.name == "conv_general_dilated" and number == equation.inputs[1] and words.is_one_layer:
            specification = equation.params["dimension_numbers"].rhs_spec
            kernel = np.asarray(words.alignment.program.constants[number]).transpose(specification)
            is_plain = set(equation.params["lhs_dilation"]) == {1} and kernel.shape == theirs.shape
            return is_plain and not same_bits(kernel, theirs).all()
    return False


def _nearest_layout(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """Return a parameter of JAX in the layout of PyTorch in which most elements are equal, and then nearest."""
    at = np.linspace(0, theirs.size - 1, min(256, theirs.size)).astype(np.int64)
    wanted = theirs.ravel()[at].astype(np.float64)

    def nearness(array: np.ndarray) -> tuple[int, float]:
        some = array.ravel()[at]
        return int(np.count_nonzero(some == wanted)), -float(np.abs(some - wanted).sum())

    fitting = [each.to_torch(ours) for each in itertools.islice(layouts(theirs.shape, ours.shape), 130)]
    return max(fitting, key=nearness, default=None)
