"""Reveal, check and name: the whole of what `reveal` does, from the first run to the verdict on the last element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from bridge.accumulation import fingerprint as measure
from bridge.accumulation._replay import default_accumulator, replay
from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding, where_bias_enters
from bridge.accumulation.partition import Partition, fused_leaves
from bridge.accumulation.probe import Runs, Subject, reveal_order, reveal_rounding_of_products
from bridge.accumulation.tree import Tree
from bridge.case import Case
from bridge.numerics import cast, same_bits
from jaxdw.geometry import Geometry

#: Taps of the largest window that the commands reveal unless they are told otherwise: 11x11 takes half a minute.
MOST_TAPS = 128

#: A tree that the data contradict in a greater share of its elements is wrong for all of them.
_STRAYS = 0.01


def check_taps(option: str, geometry: Geometry, most: int) -> None:
    """Refuse, before the work, to reveal an order that would take too long.

    Args:
      option: what asked for it.
      geometry: whose windows count.
      most: the most taps, `MOST_TAPS` unless the user lifts it.

    Raises:
      ValueError: a window has more.
    """
    if geometry.taps > most:
        raise ValueError(
            f"`{option}` on windows of {geometry.taps} taps: an order of addition takes a run for each tap, and a "
            f"replay for each set of taps that an output has, which may be hours; expected at most {most} taps, or "
            f"`--max-taps {geometry.taps}`"
        )


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


def reveal_subject(subject: Subject, draws: int = 1) -> AccumulationOrder:
    """`reveal`, of an implementation that is already wrapped, held against `draws` sets of random data."""
    case = subject.case
    if 0 in case.geometry.output_shape:
        return _of_nothing(subject)
    drawn = [_random(case, subject.products, seed) for seed in range(draws)]
    outputs = [subject.output(data) for data in drawn]
    varying = ~same_bits(outputs[0], subject.output(drawn[0]))
    inputs = measure.input_rounding(subject)
    flushed = measure.flushed_subnormals(subject, inputs)

    before = subject.runs
    narrow = not _as_if_wide(drawn, outputs)
    fused = subject.products and inputs.full(subject.format)
    partition, masks = reveal_order(subject, fused=fused, fused_first=narrow, subnormals=not flushed)
    order_runs = subject.runs - before

    accumulator = _accumulator(subject, partition, inputs)
    exact_products = _accumulator_holds_products(subject, inputs, accumulator)
    if subject.products and not masks.residue and not exact_products:
        reveal_rounding_of_products(subject, partition, (accumulator or default_accumulator(case.dtype)).format)
    partition.check()

    trees, labels, refusals = _collect(subject, partition)
    products = _products(trees)
    if products and exact_products:
        products = "exact" if measure.holds_products(subject, trees[0], labels.ravel() == 0) else "rounded"
    zero_start = measure.starts_from_zero(subject).reshape(labels.shape)
    fingerprint = Fingerprint(
        *inputs,
        accumulator=accumulator,
        products=products,
        flushed=flushed,
        padding_taps=measure.padding_taps(subject),
        bias=_bias(subject, trees, labels, inputs, accumulator),
        zero_start=bool(zero_start.all()) if zero_start.all() or not zero_start.any() else None,
        deterministic=not varying.any(),
        order_runs=order_runs,
        runs=subject.runs,
    )
    reasons = tuple(map(NotASum, refusals))
    order = AccumulationOrder(
        subject.name, case.geometry, case.dtype, tuple(trees), labels, reasons, zero_start, fingerprint
    )
    order = _refused(order, varying, "a second run with the same data gave other bits")
    for data, y in zip((*drawn, case), (*outputs, subject.output(case))):
        if data is not case:
            order = _refused(order, np.isnan(y.astype(np.float64)), "NaN from finite numbers of moderate size")
        order = _held_against(subject, order, data, y)
    return _counted(order, subject.runs)


def _of_nothing(subject: Subject) -> AccumulationOrder:
    """The order of an output without elements."""
    g = subject.case.geometry
    unseen = Fingerprint(None, None, None, None, None, (), None, None, None, True, 0, 0)
    none = np.zeros(g.output_shape, np.int32)
    return AccumulationOrder(subject.name, g, subject.case.dtype, (), none, (), none.astype(bool), unseen)


def _random(case: Case, products: bool, seed: int) -> Case:
    """Normal numbers: the same ones at every call, so that what is revealed can be repeated."""
    rng = np.random.default_rng(seed)

    def normal(array: np.ndarray) -> np.ndarray:
        return rng.standard_normal(array.shape).astype(case.dtype)

    return case.replace(
        x=normal(case.x) if products else np.ones_like(case.x),
        kernel=normal(case.kernel),
        bias=None if case.bias is None else normal(case.bias),
    )


def _as_if_wide(drawn: list[Case], outputs: list[np.ndarray]) -> bool:
    """Whether the first channel of the first image is what a float64 accumulator gives, of products rounded or not."""
    if drawn[0].dtype == np.float64:
        return False
    rounded_too, exact_too = True, True
    for case, y in zip(drawn, outputs):
        g = case.geometry
        one: tuple[Any, ...] = (*[slice(0, 1)] * len(g.batch), ...)
        bias = None if case.bias is None else case.bias[: g.multiplier]
        first = case.replace(x=case.x[(*one, slice(0, 1))], kernel=case.kernel[..., : g.multiplier], bias=bias)
        y = first.split_channels(y[(*one, slice(0, g.multiplier))])
        total = np.zeros(y.shape) if bias is None else np.zeros(y.shape) + bias.astype(np.float64)
        of_rounded = total.copy()
        for x, w, _ in first.tap_terms():
            total += x.astype(np.float64) * w
            of_rounded += x * w
        exact_too = exact_too and bool(same_bits(cast(total, case.dtype), y).all())
        rounded_too = rounded_too and bool(same_bits(cast(of_rounded, case.dtype), y).all())
    return exact_too or rounded_too


def _accumulator(subject: Subject, partition: Partition, inputs: measure.Inputs) -> Rounding | None:
    """The accumulator of the largest group that adds three terms or more."""
    groups = [group for group in partition.groups if group.settled and not group.exact and len(group.leaves) > 2]
    if not groups:
        return None
    main = max(groups, key=lambda group: group.count)
    where = partition.labels == partition.groups.index(main)
    return measure.accumulator(subject, main.whole.tree(subject.names), where, inputs)


def _accumulator_holds_products(subject: Subject, inputs: measure.Inputs, accumulator: Rounding | None) -> bool:
    """Whether a product has no more bits than the accumulator, so that it can enter exactly."""
    bits = sum((rounding.format if rounding else subject.format).precision for rounding in (inputs.x, inputs.kernel))
    return bits <= (accumulator or default_accumulator(subject.case.dtype)).format.precision


def _bias(
    subject: Subject,
    trees: list[Tree],
    labels: np.ndarray,
    inputs: measure.Inputs,
    accumulator: Rounding | None,
) -> str | None:
    """Where the bias enters the most frequent tree."""
    where = where_bias_enters(trees[0]) if trees else None
    output = inputs.output or Rounding(subject.format)
    if where == "last" and measure.rounds_before_bias(subject, trees[0], labels.ravel() == 0, output, accumulator):
        return "rounded"
    return where


def _products(trees: list[Tree]) -> str | None:
    """ "fused" where any product enters unrounded. One that starts a sum, or one lane of it, is rounded either way."""
    if all(len(tree.leaves) < 2 or tree.kind == "exact" for tree in trees):
        return None
    return "fused" if any(tree.fused for tree in trees) else "rounded"


def _collect(subject: Subject, partition: Partition) -> tuple[list[Tree], np.ndarray, list[str]]:
    """The distinct trees, the most frequent first, and for each element its tree or its refusal."""
    beyond = measure.algorithm(subject) if any(group.refusal for group in partition.groups) else ""
    outcomes: dict[Tree | str, int] = {}
    of_group: list[Tree | str] = []
    for group in partition.groups:
        if group.refusal is not None:
            outcome: Tree | str = f"not a tree of additions: {group.refusal}{beyond}"
        elif group.exact:
            outcome = Tree.exact([subject.names[leaf] for leaf in group.leaves])
        else:
            outcome = group.whole.tree(subject.names, fused_leaves(group))
        of_group.append(outcome)
        outcomes[outcome] = outcomes.get(outcome, 0) + group.count
    ranked = sorted(outcomes, key=lambda outcome: -outcomes[outcome])
    trees = [outcome for outcome in ranked if isinstance(outcome, Tree)]
    refusals = [outcome for outcome in ranked if isinstance(outcome, str)]
    number = {tree: at for at, tree in enumerate(trees)} | {reason: -1 - at for at, reason in enumerate(refusals)}
    label_of = np.array([number[outcome] for outcome in of_group], np.int32)
    return trees, label_of[partition.labels].reshape(subject.case.geometry.output_shape), refusals


def _refused(order: AccumulationOrder, where: np.ndarray, reason: str) -> AccumulationOrder:
    """The order without the trees of the elements `where`; the reason names the first, and how many."""
    where = where & (order.labels >= 0)
    if not where.any():
        return order
    first = tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape))
    refusal = NotASum(f"{reason} ({int(where.sum())} elements, the first at {first})")
    labels = np.where(where, np.int32(-1 - len(order.refusals)), order.labels)
    return dataclasses.replace(order, labels=labels, refusals=(*order.refusals, refusal))


def _held_against(subject: Subject, order: AccumulationOrder, data: Case, y: np.ndarray) -> AccumulationOrder:
    """The order without what its replay does not reproduce."""
    wrong = ~same_bits(replay(order, data), y) & (order.labels >= 0)
    for label, tree in enumerate(order.trees):
        of_tree = order.labels == label
        strays = wrong & of_tree
        if strays.sum() > _STRAYS * of_tree.sum():
            precision = (order.fingerprint.accumulator or default_accumulator(order.dtype)).format.precision
            cause = (
                "the summation is compensated, as Kahan's: what an addition drops comes back later"
                if measure.compensates(subject, tree, of_tree.ravel(), precision)
                else "the order changes with the data, or the arithmetic is none that is known here"
            )
            order = _refused(order, of_tree, f"masks show {tree}, but replaying that gives other bits: {cause}")
        else:
            order = _refused(order, strays, f"replaying {tree} gives other bits: the order changes with the data")
    return order


def _counted(order: AccumulationOrder, runs: int) -> AccumulationOrder:
    """The order with the runs that it took, and without trees that no element has left."""
    counts = np.bincount(order.labels[order.labels >= 0], minlength=len(order.trees))
    kept = np.flatnonzero(counts)
    renumbered = np.zeros(len(counts) + 1, np.int32)
    renumbered[kept] = np.arange(len(kept))
    return dataclasses.replace(
        order,
        trees=tuple(order.trees[label] for label in kept),
        labels=np.where(order.labels >= 0, renumbered[order.labels], order.labels).astype(np.int32),
        fingerprint=dataclasses.replace(order.fingerprint, runs=runs),
    )
