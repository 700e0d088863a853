"""The checks, one function each: it returns the outcome for a kernel."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterator

import numpy as np

from bridge._conformance.drawing import with_sizes
from bridge._conformance.kit import Fault, Judge, Kit, is_integer
from bridge._conformance.problems import Problem
from bridge._conformance.result import Outcome
from bridge._conformance.streaming import streaming_fault
from bridge._conformance.subject import Crashed, Refused
from bridge._implementations.user import NoGradient
from bridge.accumulation import reveal
from bridge.case import Case
from bridge.diagnosis import Verdict
from bridge.diagnosis.integers import largest_integer
from bridge.errors import ImplementationError
from bridge.numerics import exact, format_of, same_bits


@dataclasses.dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
      name: its name, as a part of an identifier.
      about: what it compares.
      run: takes the kit, returns the outcome.
    """

    name: str
    about: str
    run: Callable[[Kit], Outcome]


def geometry(kit: Kit) -> Outcome:
    each = list(_each_argument(kit))
    problems = itertools.chain(each, kit.draws("geometry"))
    return kit.examine("geometry", problems, _integers(kit), len(each) + kit.number(24, 500))


def edge_sizes(kit: Kit) -> Outcome:
    return kit.examine("edge_sizes", _edges(kit), _integers(kit))


def dtypes(kit: Kit) -> Outcome:
    problems = [
        dataclasses.replace(each, dtype=dtype) for dtype in kit.features.dtypes for each in _with_long_sums(kit)
    ]
    returned: dict[str, str] = {}

    def judge(problem: Problem) -> Fault | None:
        arithmetic = kit.arithmetic(problem.dtype, bias=problem.bias)
        for number in range(kit.number(2, 20)):
            for case in (problem.integers(arithmetic, kit.seed + number), problem.normal(kit.seed + number)):
                result = kit.subject.run(problem, case)
                returned[problem.dtype] = result.dtype
                if fault := kit.fault(case, result.y, exact=is_integer(case)):
                    return fault
        return None

    found = kit.examine("dtypes", problems, judge)
    others = [f"returns {there} for {here}" for here, there in returned.items() if here != there]
    lacking = [f"does not take {name}" for name in ("float64", "float16", "bfloat16") if name not in returned]
    return _noted(found, *others, *lacking)


def nonfinite(kit: Kit) -> Outcome:
    told: list[str] = []
    values = [np.nan, np.inf, -np.inf]

    def judge(problem: Problem) -> Fault | None:
        rng = kit.rng("nonfinite")
        for value in values:
            for name in ("x", "kernel", "bias"):
                case = _planted(problem.normal(kit.seed), name, value, rng)
                if case is None:
                    continue
                y = kit.subject.run(problem, case).y
                y = _as_expected(problem, case, y, exact(case).value, told)
                if fault := kit.fault(case, y, exact=False):
                    return fault
        return None

    found = kit.examine("nonfinite", kit.draws("nonfinite"), judge, kit.number(6, 60))
    return _noted(found, *dict.fromkeys(told))


def zeros(kit: Kit) -> Outcome:
    problem = kit.features.first
    case = problem.zeros()
    tiny = np.array(format_of(case.dtype).smallest_subnormal, case.dtype)
    kernel = np.zeros_like(case.kernel)
    taps = kernel.reshape(-1, kernel.shape[-1])
    taps[len(taps) // 2] = 1
    small = case.replace(x=np.full_like(case.x, tiny), kernel=kernel)
    negative = case.replace(x=np.full_like(case.x, -0.0), kernel=np.ones_like(case.kernel))
    try:
        kept, y = (kit.subject.run(problem, each).y for each in (small, negative))
    except (Refused, Crashed) as error:
        return Outcome(reason=str(error))
    words = ["keeps subnormal numbers" if (kept == tiny).any() else "flushes subnormal numbers to zero"]
    signs = np.signbit(y)
    words.append(f"a sum of negative zeros is {'-0' if signs.all() else '+0' if not signs.any() else '-0 or +0'}")
    return Outcome(2, note="; ".join(words))


def gradients(kit: Kit) -> Outcome:
    wide = [each for each in kit.features.dtypes if each != kit.features.first.dtype]
    every = kit.draws("gradients")
    number = kit.number(8, 100)
    extra = (dataclasses.replace(next(every), dtype=dtype) for dtype in wide)

    def judge(problem: Problem) -> Fault | None:
        return _gradient_fault(kit, problem)

    def problems() -> Iterator[Problem]:
        yield dataclasses.replace(kit.features.first, bias=kit.features.bias)
        yield from extra
        yield from every

    try:
        return kit.examine("gradients", problems(), judge, number + len(wide) + 1)
    except NoGradient as error:
        return Outcome(reason=str(error))


def order(kit: Kit) -> Outcome:
    problem = dataclasses.replace(kit.features.first, batch=1, bias=kit.features.bias)

    class Runnable:
        name = kit.subject.function.spelled

        @staticmethod
        def run(case: Case) -> np.ndarray:
            return kit.subject.run(problem, case).y

    try:
        found = reveal(Runnable, problem.normal(kit.seed))
    except (ImplementationError, Refused, Crashed) as error:
        return Outcome(reason=str(error))
    tree, count, _ = found.classes()[0]
    few = len(found.trees) + len(found.refusals)
    shown = textwrap.shorten(str(tree), 160, placeholder=" ...")
    note = f"{shown} in {count} of {found.labels.size} outputs" + f", {few} orders" * (few > 1)
    return Outcome(found.fingerprint.runs, note=f"{note}; products {found.fingerprint.products}")


def invariance(kit: Kit) -> Outcome:
    changed: dict[str, None] = {}

    def judge(problem: Problem) -> Fault | None:
        case = problem.normal(kit.seed)
        whole = kit.subject.run(problem, case).y
        for name, parts in _parts(kit, problem, case):
            y = np.concatenate([kit.subject.run(*part).y[cut] for part, cut, _ in parts], axis=parts[0][2])
            if fault := kit.fault(case, y, exact=False):
                return dataclasses.replace(fault, context=f"in two parts along {name}")
            if not same_bits(y, whole).all():
                changed[name] = None
        return kit.fault(case, whole, exact=False)

    problems = (dataclasses.replace(each, batch=each.batch + 1) for each in kit.draws("invariance"))
    found = kit.examine("invariance", problems, judge, kit.number(4, 60))
    told = [f"bits change with {name}, within the bound" for name in changed]
    return _noted(found, *(told or ["no bit changes"] * (found.failure is None and found.tried > 0)))


def streaming(kit: Kit) -> Outcome:
    if not kit.features.state and not kit.features.return_state:
        return Outcome(reason="only a causal kernel with a state streams")
    problems = (
        dataclasses.replace(each, strides=(1,), dilation=(1,), padding=((each.kernel_size[0] - 1, 0),))
        for each in kit.draws("streaming")
    )
    changed: list[str] = []
    found = kit.examine(
        "streaming", problems, lambda problem: streaming_fault(kit, problem, changed), kit.number(12, 300)
    )
    return _noted(found, *(dict.fromkeys(changed) or ["no bit changes"] * (found.failure is None)))


def activation(kit: Kit) -> Outcome:
    if not kit.features.activation:
        return Outcome(reason="only a causal kernel with an activation has one")

    def judge(problem: Problem) -> Fault | None:
        # Sums are multiples of a large number, so that SiLU of them is the sum, or nearly zero, whatever exp is used.
        case = problem.integers(kit.arithmetic(problem.dtype), kit.seed)
        large = np.array(128 if case.dtype.itemsize > 2 else 16, case.dtype)
        case = case.replace(kernel=case.kernel * large, bias=None if case.bias is None else case.bias * large)
        y = kit.subject.run(problem, case, activation="silu").y
        return _activation_fault(case, y)

    problems = (dataclasses.replace(each, bias=kit.features.bias) for each in kit.draws("activation"))
    return kit.examine("activation", problems, judge, kit.number(4, 60))


def races(kit: Kit) -> Outcome:
    least = kit.features.first.channels
    sizes = {1: (1000,), 2: (40, 40), 3: (12, 12, 12)}
    words: list[str] = []
    repetitions = kit.number(10, 100)

    def judge(problem: Problem) -> Fault | None:
        case = problem.normal(kit.seed)
        first = kit.subject.run(problem, case).y
        for number in range(1, repetitions):
            y = kit.subject.run(problem, case).y
            if not (same := same_bits(y, first)).all():
                sentence = f"run {number + 1} has other bits than the first run, on the same arrays"
                return Fault(case, ~same, y, first, sentence=sentence, name="not deterministic")
        if _changing_gradients(kit, problem, case, repetitions):
            words.append("bits of gradients change from run to run")
        return None

    problems = [
        with_sizes(each, batch=3, spatial=sizes[rank], channels=max(16, least), bias=kit.features.bias)
        for rank, each in kit.features.base.items()
    ]
    return _noted(kit.examine("races", problems, judge), *dict.fromkeys(words))


def inputs_unchanged(kit: Kit) -> Outcome:
    if kit.subject.framework == "jax":
        return Outcome(reason="JAX arrays cannot be changed")

    def judge(problem: Problem) -> Fault | None:
        case = problem.normal(kit.seed)
        if changed := kit.subject.run(problem, case).changed:
            names = " and ".join(changed)
            return Fault(case, sentence=f"{names} changed in place", name="input changed")
        return None

    return kit.examine("inputs_unchanged", kit.draws("inputs_unchanged"), judge, kit.number(4, 60))


def memory_layouts(kit: Kit) -> Outcome:
    if kit.subject.framework == "jax":
        return Outcome(reason="JAX arrays have no strides")

    def judge(problem: Problem) -> Fault | None:
        case = problem.integers(kit.arithmetic(problem.dtype), kit.seed)
        for form in ("strided", "moved"):
            y = kit.subject.run(problem, case, form=form).y
            if fault := kit.fault(case, y, exact=True):
                return dataclasses.replace(fault, context=_FORMS[form])
        return None

    return kit.examine("memory_layouts", kit.draws("memory_layouts"), judge, kit.number(6, 60))


#: The forms in memory, in words.
_FORMS = {
    "strided": "with arguments that have unused elements between theirs",
    "moved": "with arguments whose axes lie in memory in another order",
}

#: The checks in the order of the table.
CHECKS = (
    Check("geometry", "integers on random geometries: every output exact", geometry),
    Check("edge_sizes", "integers on the smallest, empty, odd and long sizes: every output exact", edge_sizes),
    Check("dtypes", "each dtype: integers exact, random numbers within the rounding bound", dtypes),
    Check("nonfinite", "NaN and infinities: where the exact result has them, and nowhere else", nonfinite),
    Check("zeros", "subnormal numbers and signed zeros: reported", zeros),
    Check("gradients", "by x, kernel and bias: integers exact, random numbers within the bound", gradients),
    Check("order", "order of addition: reported", order),
    Check("invariance", "split by batch, channels or position: within the bound, other bits reported", invariance),
    Check("streaming", "states and chunks of a stream: integers exact", streaming),
    Check("activation", "SiLU follows the sum and its bias", activation),
    Check("races", "the same bits run after run", races),
    Check("inputs_unchanged", "x, kernel and bias are not changed in place", inputs_unchanged),
    Check("memory_layouts", "arguments that are not contiguous: every output exact", memory_layouts),
)


def _noted(outcome: Outcome, *notes: str) -> Outcome:
    return dataclasses.replace(outcome, note="; ".join(filter(None, (*notes, outcome.note))))


def _integers(kit: Kit) -> Judge:
    """Return the judge of outputs on integers, none of which may differ from the exact one."""

    def judge(problem: Problem) -> Fault | None:
        case = problem.integers(kit.arithmetic(problem.dtype, bias=problem.bias), kit.seed)
        fault = kit.fault(case, kit.subject.run(problem, case).y, exact=True)
        if fault is None:
            return None
        random = problem.normal(kit.seed)  # which tells one mistake from another better
        return kit.fault(random, kit.subject.run(problem, random).y, exact=False) or fault

    return judge


def _each_argument(kit: Kit) -> Iterator[Problem]:
    """Yield problems with one argument other than its default, and other ones along the axes."""
    features = kit.features
    for rank, base in features.base.items():
        yield base
        several = (2, 3, 2)[:rank]
        if features.bias:
            yield dataclasses.replace(base, bias=True)
        if features.multiplier:
            yield dataclasses.replace(base, multiplier=3)
        if features.strides:
            yield dataclasses.replace(base, strides=several)
        if features.dilation and features.any_kernel and features.own_padding != "SAME":
            yield with_sizes(base, dilation=several, spatial=tuple(n + 2 for n in base.spatial))
        if features.padding:
            yield dataclasses.replace(base, padding=tuple((n, n) for n in (0, 2, 1)[:rank]))
        if features.output_padding and features.strides:
            yield dataclasses.replace(base, strides=several, output_padding=tuple(n - 1 for n in several))


def _edges(kit: Kit) -> Iterator[Problem]:
    """Yield the sizes at which kernels are wrong; for further numbers of axes a few of them."""
    features = kit.features
    for rank, base in features.base.items():
        rest, least = tuple(min(n, 3) for n in base.spatial[1:]), base.channels
        every = kit.full or base is features.first
        padded = features.padding or features.own_padding == "SAME" or kit.kind != "depthwise"
        if padded:
            yield with_sizes(base, spatial=(1,) * rank)
        if padded and features.any_kernel:
            pads = ((2, 2),) * rank if kit.kind == "depthwise" else base.padding
            yield with_sizes(base, spatial=(2,) * rank, kernel_size=(5,) * rank, padding=pads)
        yield with_sizes(base, spatial=base.kernel_size)
        if kit.kind != "transpose":
            yield with_sizes(base, spatial=(0, *rest))
        yield with_sizes(base, batch=0)
        for channels in (1, 5, 7, 31, 33, 64, 65) if every else (1, 7):
            yield with_sizes(base, channels=channels, bias=features.bias)
        lengths = (31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257) if every else (33, 257)
        for length in (*lengths, *((1023, 1025, 4097) if kit.full else ())):
            yield with_sizes(base, spatial=(length, *rest), channels=least)
        for batch in (32_769, *((65_537,) if kit.full else ())) if every else ():
            yield with_sizes(base, batch=batch, spatial=tuple(k + 1 for k in base.kernel_size), channels=least)


def _with_long_sums(kit: Kit) -> Iterator[Problem]:
    """Yield the first problem of each rank, and one with more taps, if the kernel takes it."""
    more = {1: (31,), 2: (7, 7), 3: (3, 4, 5)}
    for rank, base in kit.features.base.items():
        yield dataclasses.replace(base, bias=kit.features.bias)
        if not kit.features.any_kernel:
            continue
        size = more[rank]
        long = with_sizes(base, kernel_size=size, spatial=tuple(k + 9 for k in size))
        if not kit.features.padding and kit.features.own_padding == "SAME":
            odd = tuple(k - 1 + k % 2 for k in size)
            long = with_sizes(long, kernel_size=odd, padding=tuple((k // 2, k // 2) for k in odd))
        yield long


def _as_expected(problem: Problem, case: Case, y: np.ndarray, expected: np.ndarray, told: list[str]) -> np.ndarray:
    """Return the output with the expected value where another one is allowed; add to `told` why.

    A weight over padding is skipped, or multiplied by zero, which gives NaN. An infinite input may become NaN in the
    outputs that read it.
    """
    nan = np.isnan(y) & np.isinf(expected)
    if nan.any():
        told.append("gives NaN where the exact result is infinite")
    over_padding = np.zeros_like(nan)
    if not np.isfinite(case.kernel).all():
        inside = np.asarray(case.geometry.valid_taps().all(axis=tuple(range(problem.rank, 2 * problem.rank))))
        over_padding = ~inside[..., None] & ~np.isfinite(y)
        if (over_padding & np.isfinite(expected)).any():
            told.append("multiplies padding by weights, so that NaN and infinite ones reach the borders")
    return np.where(nan | over_padding, expected, y)


def _planted(case: Case, name: str, value: float, rng: np.random.Generator) -> Case | None:
    """Return the case with one element of an operand replaced; None if there is no such operand."""
    array = getattr(case, name)
    if array is None:
        return None
    changed = array.copy()
    changed.reshape(-1)[int(rng.integers(array.size))] = value
    return case.replace(**{name: changed})


def _gradient_fault(kit: Kit, problem: Problem) -> Fault | None:
    """Return the first fault among the gradients: on integers, on random numbers, and for one repeated number."""
    arithmetic, terms = kit.arithmetic(problem.dtype, "dx"), problem.terms_of_gradients
    normal = problem.normal(kit.seed)
    dy = np.random.default_rng(kit.seed + 1).standard_normal(problem.call.output_shape).astype(normal.dtype)
    trials = [(normal, dy, False, "contiguous"), (normal, np.ones_like(dy), False, "expanded")]
    if largest_integer(arithmetic, terms):  # else half precision holds no sums of so many integers
        integers = problem.integers(arithmetic, kit.seed, terms)
        trials.insert(0, (integers, problem.integer_gradient(arithmetic, kit.seed + 1), True, "contiguous"))
    names = {"x": "dx", "kernel": "dkernel", "bias": "dbias"}
    for case, upstream, exactly, form in trials:
        found = kit.subject.run(problem, case, upstream, form=form).gradients
        for name, quantity in names.items():
            if name in found:
                fault = kit.fault(case, found[name], quantity=quantity, dy=upstream, exact=exactly)
                if fault is not None:
                    said = "with a gradient by the output of stride 0, as y.sum() gives" if form == "expanded" else ""
                    return dataclasses.replace(fault, context=said)
    return None


Part = tuple[tuple[Problem, Case], tuple[slice, ...], int]


def _parts(kit: Kit, problem: Problem, case: Case) -> Iterator[tuple[str, list[Part]]]:
    """Yield ways to compute a case in two parts: the problem of each, what to take of its output, and the axis."""
    all_of: tuple[slice, ...] = (slice(None),)
    if problem.batch > 1:
        cuts = (slice(0, 1), slice(1, None))
        sizes = (1, problem.batch - 1)
        yield (
            "the batch",
            [
                ((dataclasses.replace(problem, batch=n), case.replace(x=case.x[cut])), all_of, 0)
                for n, cut in zip(sizes, cuts)
            ],
        )
    least = kit.features.base[problem.rank].channels
    at = least if least >= 8 else problem.channels // 2
    if 0 < at < problem.channels:
        parts: list[Part] = []
        for low, high in ((0, at), (at, problem.channels)):
            own = slice(low * problem.multiplier, high * problem.multiplier)
            few = Case(
                case.x[..., low:high],
                case.kernel[..., own],
                None if case.bias is None else case.bias[own],
                strides=case.strides,
                padding=case.padding,
                kernel_dilation=case.kernel_dilation,
                input_dilation=case.input_dilation,
            )
            parts.append(((dataclasses.replace(problem, channels=high - low), few), all_of, case.x.ndim - 1))
        yield "the channels", parts
    if problem.strides[0] == 1 and problem.call.output_spatial[0] > 1:
        if problem.kind == "causal":
            yield "the position", _in_time(problem, case)
        elif problem.kind == "depthwise" and (kit.features.padding or kit.features.own_padding == "VALID"):
            yield "the position", _in_rows(problem, case)


def _in_time(problem: Problem, case: Case) -> list[Part]:
    """Return two parts of a causal problem along time; the second begins with the inputs that its outputs read."""
    half, before = problem.spatial[0] // 2, problem.spans[0] - 1
    own = problem.before
    start = max(0, half - before) if not own else half
    second = with_sizes(problem, spatial=(problem.spatial[0] - start,))
    first = with_sizes(problem, spatial=(half,))
    return [
        ((first, case.replace(x=case.x[:, : own + half])), (slice(None),), 1),
        ((second, case.replace(x=case.x[:, start:])), (slice(None), slice(half - start, None)), 1),
    ]


def _in_rows(problem: Problem, case: Case) -> list[Part]:
    """Return two parts of a problem along its first spatial axis, whose padding is zeros in x."""
    padded = np.pad(case.x, ((0, 0), *problem.padding, (0, 0)))
    rows, none = problem.call.output_spatial[0], ((0, 0),) * problem.rank
    parts: list[Part] = []
    for low, high in ((0, rows // 2), (rows // 2, rows)):
        few = case.replace(x=padded[:, low : high + problem.spans[0] - 1], padding=none)
        part = dataclasses.replace(problem, spatial=few.geometry.spatial, padding=none)
        parts.append(((part, few), (slice(None),), 1))
    return parts


def _changing_gradients(kit: Kit, problem: Problem, case: Case, repetitions: int) -> bool:
    """Return whether gradients have other bits in another run; False if there are none."""
    dy = np.ones(problem.call.output_shape, case.dtype)
    try:
        runs = [kit.subject.run(problem, case, dy).gradients for _ in range(min(3, repetitions))]
    except (NoGradient, Refused, Crashed):
        return False
    return any(
        not same_bits(first, again).all()
        for other in runs[1:]
        for first, again in zip(runs[0].values(), other.values())
        if first is not None and again is not None
    )


def _activation_fault(case: Case, y: np.ndarray) -> Fault | None:
    """Return the fault of a wrong SiLU of large integers, with the mistake that explains every output, if any."""
    almost_zero = 2.0**-100 if case.dtype.itemsize > 2 else 2.0**-18

    def activated(total: np.ndarray) -> np.ndarray:
        return np.maximum(total, total.dtype.type(0))

    def wrong(expected: np.ndarray) -> np.ndarray:
        near = np.abs(y.astype(np.float64) - expected.astype(np.float64)) <= almost_zero
        return ~np.where(expected != 0, y == expected, near)

    total = exact(case).value
    expected = activated(total)
    if not wrong(expected).any():
        return None
    guesses = [("no activation", "has no activation applied", total)]
    if case.bias is not None:
        bare = activated(exact(case.replace(bias=None)).value)
        late = "adds the bias after the activation, not before it"
        guesses += [("bias after the activation", late, bare + case.bias)]
        guesses += [("bias missing", "has no bias where it has an activation", bare)]
    for name, cause, guess in guesses:
        if not wrong(guess).any():
            return Fault(case, wrong(expected), y, expected, sentence=cause, verdict=Verdict.CONVENTION, name=name)
    return Fault(case, wrong(expected), y, expected, sentence="is not SiLU of the sum", name="activation")
