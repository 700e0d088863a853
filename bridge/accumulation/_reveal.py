"""Reveal an accumulation order: probe, read the trees, and check them by replay on random data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.accumulation import fingerprint as measure
from bridge.accumulation._replay import default_accumulator, replay
from bridge.accumulation.convolution import as_sums
from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding, where_bias_enters
from bridge.accumulation.partition import Partition, fused_leaves
from bridge.accumulation.probe import Subject, reveal_order, reveal_rounding_of_products
from bridge.accumulation.sums import SumsOfProducts
from bridge.accumulation.tree import BIAS, Tree
from bridge.numerics import cast, same_bits

if TYPE_CHECKING:  # it imports JAX, and this package needs NumPy alone
    from bridge.case import Case

#: Elements that are compared with the sums of a wide accumulator, about.
_SAMPLE = 256

#: A tree that the data contradict in a greater share of its elements is wrong for all of them.
_STRAYS = 0.01


def reveal(implementation: Any, case: Case | SumsOfProducts) -> AccumulationOrder:
    """Reveal the order and the arithmetic in which an implementation computes every output element of a geometry.

    Masks find the order (see `bridge.accumulation.masks`), in about as many runs as a window has taps. It is then
    replayed on random data and on the case's own: an element whose replay differs in one bit has no tree.

    Args:
      implementation: a `bridge.Implementation`, anything with `.run(case)`, or a function of a case.
      case: its geometry and dtype are revealed; its data are only used in the last check. Or other sums of products.

    Raises:
      ImplementationError: the implementation raised, or returned another shape or dtype.

    >>> import numpy as np
    >>> from bridge import Case
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
    return reveal_subject(Subject(implementation, as_sums(case)))


def reveal_subject(subject: Subject, draws: int = 1) -> AccumulationOrder:
    """Reveal the order of a subject, and check it by replay on `draws` sets of random data."""
    sums = subject.sums
    if 0 in sums.shape:
        return _of_nothing(subject)
    drawn = [sums.random(seed) for seed in range(draws)]
    outputs = [subject.output(data) for data in drawn]
    varying = ~same_bits(outputs[0], subject.output(drawn[0]))
    inputs = measure.input_rounding(subject)
    flushed = measure.flushed_subnormals(subject, inputs)

    before = subject.runs
    wide = _as_if_wide(drawn, outputs)
    fused = sums.multiplies and inputs.full(subject.format)
    partition, masks = reveal_order(subject, fused=fused, fused_first=not wide, subnormals=not flushed)
    order_runs = subject.runs - before

    accumulator = _accumulator(subject, partition, inputs)
    exact_products = _accumulator_holds_products(subject, inputs, accumulator)
    if sums.multiplies and not masks.residue and not exact_products:
        reveal_rounding_of_products(subject, partition, (accumulator or default_accumulator(sums.dtype)).format)
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
        subject.name, sums.layout, sums.dtype, tuple(trees), labels, reasons, zero_start, fingerprint
    )
    order = _refused(order, varying, "a second run with the same data gave other bits")
    for data, y in zip((*drawn, sums), (*outputs, subject.output(sums))):
        if data is not sums:
            order = _refused(order, np.isnan(y.astype(np.float64)), "NaN from finite numbers of moderate size")
        order = _without_strays(subject, order, data, y)
    return _counted(order, subject.runs)


def _of_nothing(subject: Subject) -> AccumulationOrder:
    """Return the order of an output without elements."""
    sums = subject.sums
    unseen = Fingerprint(None, None, None, None, None, (), None, None, None, True, 0, 0)
    none = np.zeros(sums.shape, np.int32)
    return AccumulationOrder(subject.name, sums.layout, sums.dtype, (), none, (), none.astype(bool), unseen)


def _as_if_wide(drawn: list[SumsOfProducts], outputs: list[np.ndarray]) -> bool:
    """Return whether some elements are those of a float64 accumulator, of products rounded (as OpenBLAS) or not."""
    shape, dtype = drawn[0].shape, drawn[0].dtype
    if dtype == np.float64:
        return False
    size = outputs[0].size
    at = np.unravel_index(np.arange(0, size, max(1, size // _SAMPLE)), shape)
    read = np.broadcast_to(drawn[0].reads, (*shape, drawn[0].terms))[at]
    rounded_too, exact_too = True, True
    for sums, y in zip(drawn, outputs):
        operands = sums.operands(at)
        total = operands(BIAS)[0].astype(np.float64) if sums.has_bias else np.zeros(len(at[0]))
        of_rounded = total.copy()
        for term in np.flatnonzero(read.any(axis=0)).tolist():
            x, w = (np.where(read[:, term], operand, dtype.type(0)) for operand in operands(term))
            total += x.astype(np.float64) * w
            of_rounded += x * w
        exact_too = exact_too and bool(same_bits(cast(total, dtype), y[at]).all())
        rounded_too = rounded_too and bool(same_bits(cast(of_rounded, dtype), y[at]).all())
    return exact_too or rounded_too


def _accumulator(subject: Subject, partition: Partition, inputs: measure.Inputs) -> Rounding | None:
    """Return the accumulator of the largest group that adds three terms or more."""
    groups = [group for group in partition.groups if group.settled and not group.exact and len(group.leaves) > 2]
    if not groups:
        return None
    main = max(groups, key=lambda group: group.count)
    where = partition.labels == partition.groups.index(main)
    return measure.accumulator(subject, main.whole.tree(subject.names), where, inputs)


def _accumulator_holds_products(subject: Subject, inputs: measure.Inputs, accumulator: Rounding | None) -> bool:
    """Return whether a product has no more bits than the accumulator, so that it can enter exactly."""
    bits = sum((rounding.format if rounding else subject.format).precision for rounding in (inputs.x, inputs.kernel))
    return bits <= (accumulator or default_accumulator(subject.sums.dtype)).format.precision


def _bias(
    subject: Subject,
    trees: list[Tree],
    labels: np.ndarray,
    inputs: measure.Inputs,
    accumulator: Rounding | None,
) -> str | None:
    """Return where the bias enters the most frequent tree."""
    where = where_bias_enters(trees[0]) if trees else None
    output = inputs.output or Rounding(subject.format)
    if where == "last" and measure.rounds_before_bias(subject, trees[0], labels.ravel() == 0, output, accumulator):
        return "rounded"
    return where


def _products(trees: list[Tree]) -> str | None:
    """ "fused" where any product enters unrounded. One that starts a sum, or one lane of it, is rounded either way."""
    if all(tree.size < 2 or tree.kind == "exact" for tree in trees):
        return None
    return "fused" if any(tree.fused for tree in trees) else "rounded"


def _collect(subject: Subject, partition: Partition) -> tuple[list[Tree], np.ndarray, list[str]]:
    """Return the distinct trees, the most frequent first, and for each element its tree or its refusal."""
    beyond = subject.sums.transform(subject.output) if any(group.refusal for group in partition.groups) else ""
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
    return trees, label_of[partition.labels].reshape(subject.sums.shape), refusals


def _refused(order: AccumulationOrder, where: np.ndarray, reason: str) -> AccumulationOrder:
    """Return the order without the trees of the elements `where`; the reason names the first, and how many."""
    where = where & (order.labels >= 0)
    if not where.any():
        return order
    first = tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape))
    refusal = NotASum(f"{reason} ({int(where.sum())} elements, the first at {first})")
    labels = np.where(where, np.int32(-1 - len(order.refusals)), order.labels)
    return dataclasses.replace(order, labels=labels, refusals=(*order.refusals, refusal))


def _without_strays(
    subject: Subject, order: AccumulationOrder, data: SumsOfProducts, y: np.ndarray
) -> AccumulationOrder:
    """Return the order without the elements that its replay does not reproduce."""
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
    """Return the order with the runs that it took, and without trees that no element has left."""
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
