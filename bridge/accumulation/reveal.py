"""Reveal, check and name: the whole of what `reveal` does, from the first run to the verdict on the last element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bridge.accumulation import fingerprint as measure
from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding, where_bias_enters
from bridge.accumulation.partition import Partition, fused_leaves
from bridge.accumulation.probe import Runs, Subject, reveal_order, reveal_rounding_of_products
from bridge.accumulation.replay import default_accumulator, replay
from bridge.accumulation.tree import Tree
from bridge.case import Case

#: A tree that the data contradict in a greater share of its elements is wrong for all of them.
_STRAYS = 0.01


def reveal(implementation: Runs | Callable[[Case], np.ndarray], case: Case) -> AccumulationOrder:
    """In which order, and in what arithmetic, an implementation computes every output element of a geometry.

    The order is found by masks (see `bridge.accumulation.masks`), in about as many runs as a window has taps, and then
    held against random data and the case's own: an element whose replay differs in one bit has no tree.

    Args:
      implementation: a `bridge.Implementation`, anything with `.run(case)`, or a function of a case.
      case: its geometry and dtype are revealed; its data are only used in the last check.

    Raises:
      RuntimeError: the implementation raised, or returned another shape or dtype.

    >>> import numpy as np
    >>> def backwards(case):
    ...     y = np.zeros(case.geometry.output_shape, case.dtype)
    ...     for x, w, _ in reversed(list(case.tap_terms())):
    ...         y = y + (x * w).reshape(y.shape)
    ...     return y
    >>> x, kernel = np.ones((1, 6, 2), np.float32), np.ones((3, 1, 2), np.float32)
    >>> order = reveal(backwards, Case(x, kernel, padding="VALID"))
    >>> order.trees, order.fingerprint.products, str(order.fingerprint.accumulator)
    ((Tree('0+(1+2)'),), 'rounded', 'float32')
    """
    return reveal_subject(Subject(implementation, case))


def reveal_subject(subject: Subject) -> AccumulationOrder:
    """`reveal`, of an implementation that is already wrapped."""
    case = subject.case
    shape = case.geometry.output_shape
    if 0 in shape:
        nothing = Fingerprint(None, None, None, None, None, (), None, None, None, True, 0, 0)
        return AccumulationOrder(
            subject.name, case.geometry, case.dtype, (), np.zeros(shape, np.int32), (), np.zeros(shape, bool), nothing
        )
    random = _random(case, subject.products)
    first, second = subject.output(random), subject.output(random)
    varying = _different(first, second)
    inputs = measure.input_rounding(subject)
    flushed = measure.flushed_subnormals(subject, inputs)

    before = subject.runs
    fused = subject.products and inputs.full(subject.format)
    partition, masks = reveal_order(subject, fused=fused, subnormals=not flushed)
    order_runs = subject.runs - before

    main = max(
        (group for group in partition.groups if group.settled and not group.exact and len(group.leaves) > 2),
        key=lambda group: group.count,
        default=None,
    )
    accumulator = None
    if main is not None:
        where = partition.labels == partition.groups.index(main)
        accumulator = measure.accumulator(subject, main.insertion.tree(subject.names), where, inputs)
    exact_products = _products_are_exact(subject, inputs, accumulator)
    if subject.products and not masks.residue and not exact_products:
        reveal_rounding_of_products(subject, partition, (accumulator or default_accumulator(case.dtype)).format)
    partition.check()

    trees, labels, refusals = _collect(subject, partition)
    bias = None
    if trees:
        where = labels.ravel() == 0
        bias = where_bias_enters(trees[0])
        output = inputs.output or Rounding(subject.format)
        if bias == "last" and measure.rounds_before_bias(subject, trees[0], where, output, accumulator):
            bias = "rounded"
    zero_start = measure.starts_from_zero(subject).reshape(shape)
    padding = measure.padding_taps(subject)

    def build() -> AccumulationOrder:
        measured = Fingerprint(
            inputs.x,
            inputs.kernel,
            inputs.output,
            accumulator,
            None if exact_products else _products(trees),
            flushed,
            padding,
            bias,
            bool(zero_start.all()) if zero_start.all() or not zero_start.any() else None,
            not varying.any(),
            order_runs,
            subject.runs,
        )
        return AccumulationOrder(
            subject.name,
            case.geometry,
            case.dtype,
            tuple(trees),
            labels,
            tuple(map(NotASum, refusals)),
            zero_start,
            measured,
        )

    _refuse(labels, refusals, varying, "a second run with the same data gave other bits")
    _refuse(labels, refusals, np.isnan(first.astype(np.float64)), "NaN from finite numbers of moderate size")
    for data, y in ((random, first), (case, None)):
        y = subject.output(data) if y is None else y
        _hold_against(subject, build(), labels, refusals, data, y)
    return build()


def _random(case: Case, products: bool) -> Case:
    """Normal numbers: the same ones at every call, so that what is revealed can be repeated."""
    rng = np.random.default_rng(0)

    def normal(array: np.ndarray) -> np.ndarray:
        return rng.standard_normal(array.shape).astype(case.dtype)

    return case.replace(
        x=normal(case.x) if products else np.ones_like(case.x),
        kernel=normal(case.kernel),
        bias=None if case.bias is None else normal(case.bias),
    )


def _different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where bits differ; any NaN equals any other."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    nan = np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64))
    return (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)) & ~nan


def _products_are_exact(subject: Subject, inputs: measure.Inputs, accumulator: Rounding | None) -> bool:
    bits = sum((rounding.format if rounding else subject.format).precision for rounding in (inputs.x, inputs.kernel))
    return bits <= (accumulator or default_accumulator(subject.case.dtype)).format.precision


def _products(trees: list[Tree]) -> str | None:
    """"fused" where any product enters unrounded. One that starts a sum, or one lane of it, is rounded either way."""
    if all(len(tree.leaves) < 2 or tree.kind == "exact" for tree in trees):
        return None
    return "fused" if any(tree.fused for tree in trees) else "rounded"


def _collect(subject: Subject, partition: Partition) -> tuple[list[Tree], np.ndarray, list[str]]:
    """The distinct trees, the most frequent first, and for each element its tree or its refusal."""
    beyond = measure.reach(subject) if any(group.refusal for group in partition.groups) else ""
    outcomes: dict[Tree | str, int] = {}
    of_group: list[Tree | str] = []
    for group in partition.groups:
        if group.refusal is not None:
            outcome: Tree | str = f"not a tree of additions: {group.refusal}{beyond}"
        elif group.exact:
            outcome = Tree.exact([subject.names[leaf] for leaf in group.leaves])
        else:
            outcome = group.insertion.tree(subject.names, fused_leaves(group))
        of_group.append(outcome)
        outcomes[outcome] = outcomes.get(outcome, 0) + group.count
    ranked = sorted(outcomes, key=lambda outcome: -outcomes[outcome])
    trees = [outcome for outcome in ranked if isinstance(outcome, Tree)]
    refusals = [outcome for outcome in ranked if isinstance(outcome, str)]
    number = {tree: at for at, tree in enumerate(trees)} | {reason: -1 - at for at, reason in enumerate(refusals)}
    label_of = np.array([number[outcome] for outcome in of_group], np.int32)
    return trees, label_of[partition.labels].reshape(subject.case.geometry.output_shape), refusals


def _refuse(labels: np.ndarray, refusals: list[str], where: np.ndarray, reason: str) -> None:
    """Take the tree from the elements `where`; the reason names the first, and how many."""
    where = where & (labels >= 0)
    if where.any():
        first = tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape))
        refusals.append(f"{reason} ({int(where.sum())} elements, the first at {first})")
        labels[where] = -len(refusals)


def _hold_against(
    subject: Subject, order: AccumulationOrder, labels: np.ndarray, refusals: list[str], data: Case, y: np.ndarray
) -> None:
    """Refuse what the replay does not reproduce."""
    wrong = _different(replay(order, data), y) & (labels >= 0)
    if not wrong.any():
        return
    for label, tree in enumerate(order.trees):
        of_tree = labels == label
        strays = wrong & of_tree
        if not strays.any():
            continue
        if strays.sum() <= _STRAYS * of_tree.sum():
            _refuse(labels, refusals, strays, f"replaying {tree} gives other bits: the order changes with the data")
            continue
        precision = (order.fingerprint.accumulator or default_accumulator(order.dtype)).format.precision
        compensated = measure.compensates(subject, tree, of_tree.ravel(), precision)
        cause = (
            "the summation is compensated (as Kahan's): what an addition drops comes back later"
            if compensated
            else "the order changes with the data, or the arithmetic is none that is known here"
        )
        _refuse(labels, refusals, of_tree, f"masks show {tree}, but replaying that gives other bits: {cause}")
