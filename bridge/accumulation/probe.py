"""Reveal the order in which an implementation adds, for every output element.

The masks stand in the kernel and the input is the same everywhere, so one run asks the same question of every output
element; those at the borders have fewer taps, and answer where both masks are among theirs. Elements with the same
answers are one group. The largest group whose tree is not known asks next, and where several partners would serve it,
it takes the one that serves most other groups too.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from bridge.accumulation import masks as masking
from bridge.accumulation.insertion import Question, lowest
from bridge.accumulation.masks import Masks
from bridge.accumulation.partition import Group, Partition
from bridge.accumulation.sums import SumsOfProducts
from bridge.accumulation.tree import BIAS, Leaf
from bridge.errors import ImplementationError
from bridge.numerics import Format, format_of

#: Questions after which masks that suit an implementation have shown that they do.
_TRIAL = 3

#: Runs between two lines of progress.
_TOLD = 32

_log = logging.getLogger("bridge")


class Subject:
    """An implementation of some sums of products, fed with one x and one weight per term.

    Attributes:
      name: of the implementation.
      sums: whose layout and dtype count, not their data.
      names: the leaves: the terms in order, then the bias where there is one.
      runs: how often the implementation has run.
    """

    def __init__(self, implementation: Any, sums: SumsOfProducts):
        """`implementation`: a function of the data of `sums`, or an object that has one as `.run`."""
        self._run: Any = getattr(implementation, "run", implementation)
        if not callable(self._run):
            raise TypeError(f"`implementation` is {implementation!r}, expected a function of a Case, or one as `.run`")
        self.name = getattr(implementation, "name", getattr(implementation, "__name__", "function"))
        self.sums = sums
        self.names: tuple[Leaf, ...] = (*range(sums.terms), *([BIAS] if sums.has_bias else []))
        self.runs = 0

    @property
    def format(self) -> Format:
        return format_of(self.sums.dtype)

    def output(self, sums: SumsOfProducts) -> np.ndarray:
        """Return the implementation's output, of the shape and dtype of the sums.

        Raises:
          ImplementationError: it raised, or returned something else.
        """
        self.runs += 1
        if not self.runs % _TOLD:
            _log.info("revealing %s: run %d, %d taps", self.name, self.runs, sums.terms)
        try:
            with np.errstate(all="ignore"):  # masks and infinities are meant to overflow
                y = np.asarray(self._run(sums.data))
        except ImplementationError:
            raise
        except Exception as error:
            raise ImplementationError(
                f"{self.name} raised {type(error).__name__} on run {self.runs}: {error}"
            ) from error
        if y.shape != sums.shape or y.dtype != sums.dtype:
            raise ImplementationError(f"{self.name} returned {y.dtype} {y.shape}, expected {sums.dtype} {sums.shape}")
        return y

    def probe(self, x: float, weights: np.ndarray) -> np.ndarray:
        """Return the output, flat, with every input x and the weights of `names`, the bias last."""
        return self.output(self.sums.uniform(x, weights)).ravel()

    def readers(self, term: int) -> np.ndarray:
        """Return which elements read the input of a term: bool, flat."""
        return np.broadcast_to(self.sums.reads[..., term], self.sums.shape).ravel()

    def partition(self) -> Partition:
        """Return the elements grouped by the terms that they read; the bias is the first leaf to insert."""
        terms, reads = self.sums.terms, self.sums.reads
        kinds, kind = np.unique(np.packbits(reads.reshape(-1, terms), axis=1), axis=0, return_inverse=True)
        bias = [terms] if self.sums.has_bias else []
        leaf_sets = [(*bias, *np.flatnonzero(np.unpackbits(row, count=terms)).tolist()) for row in kinds]
        labels = np.broadcast_to(kind.reshape(reads.shape[:-1]), self.sums.shape).ravel()
        return Partition(leaf_sets, labels)


def ask(subject: Subject, partition: Partition, masks: Masks, i: int, j: int) -> None:
    """Ask all elements one question: +M at leaf i, -M at leaf j."""
    terms = len(subject.names)
    answers = []
    for units in masks.unit_sets(np.delete(np.arange(terms), [i, j])):
        weights = np.zeros(terms)
        weights[units] = masks.unit
        weights[i], weights[j] = masks.mask, -masks.mask
        if subject.names[-1] == BIAS:
            scale = {i: masks.bias_mask, j: -masks.bias_mask}
            weights[-1] = scale.get(terms - 1, masks.x * weights[-1])
        answers.append(masks.decode(subject.probe(masks.x, weights), len(units)))
    signs, counts, sound = (np.stack(parts) for parts in zip(*answers))
    partition.record(i, j, (signs[0], counts.sum(axis=0), np.logical_and.reduce(sound)), terms, masks)


def settle(subject: Subject, partition: Partition, masks: Masks, most: int | None = None) -> None:
    """Ask until every group has its tree or is refused; or at most `most` questions."""
    asked = 0
    while groups := partition.open():
        lead = max(groups, key=lambda group: group.count)
        question = lead.advance(partition.most_like(lead.leaf_set))
        if question is None:
            continue
        if asked == most:
            return
        partner = most_shared(question, groups)
        ask(subject, partition, masks, question.leaf, partner)
        asked += 1


def most_shared(question: Question, groups: list[Group]) -> int:
    """Return the partner that most groups can answer; of several the best guess, or the first."""
    sharing = [group.leaf_set for group in groups if group.leaf_set >> question.leaf & 1]
    if all(leaves >> question.partner & 1 for leaves in sharing):
        return question.partner
    partners = [leaf for leaf in range(question.partners.bit_length()) if question.partners >> leaf & 1]
    return max(partners, key=lambda partner: sum(leaves >> partner & 1 for leaves in sharing))


def reveal_order(subject: Subject, *, fused: bool, fused_first: bool, subnormals: bool) -> tuple[Partition, Masks]:
    """Find every element's tree, by the first masks that suit the implementation.

    Args:
      subject: what to probe.
      fused: whether products of full precision get in, so that FMA may show in the same runs.
      fused_first: whether to expect that, the accumulator being no wider than the data.
      subnormals: whether subnormal numbers are kept.
    """
    fmt, terms = subject.format, len(subject.names)
    candidates = [masking.wide(fmt, subnormals=subnormals), masking.narrow()]
    if fused and masking.fused(fmt, terms).capacity >= terms - 2:
        candidates.insert(0 if fused_first else 1, masking.fused(fmt, terms))
    trials = []
    for masks in candidates:
        partition = subject.partition()
        settle(subject, partition, masks, _TRIAL)
        trials.append((partition, masks))
        if not partition.without_tree:
            break
    else:  # what none of them suits is best seen with the wide masks, unless others see more
        trials.sort(key=lambda trial: (trial[0].without_tree, trial[1] != masking.wide(fmt, subnormals=subnormals)))
        partition, masks = trials[0]
    settle(subject, partition, masks)
    return partition, masks


def reveal_rounding_of_products(subject: Subject, partition: Partition, accumulator: Format) -> None:
    """Find out which products enter unrounded, in runs of their own: one per leaf, beside a leaf of its sibling."""
    masks = masking.product_rounding(subject.format, accumulator)
    products = [leaf for leaf, name in enumerate(subject.names) if name != BIAS]
    wanting: dict[Group, list[int]] = {}  # the first is the last
    while True:
        for group in partition.groups:
            rest = wanting.setdefault(group, [leaf for leaf in reversed(products) if group.leaf_set >> leaf & 1])
            while rest and not group.wants_product(rest[-1]):
                rest.pop()
        lead = max((group for group in partition.groups if wanting[group]), key=lambda group: group.count, default=None)
        if lead is None:
            return
        leaf = wanting[lead][-1]
        siblings = lead.whole.siblings(leaf)
        question = Question(leaf, lowest(siblings), siblings)
        groups = [group for group in partition.groups if wanting[group] and group.wants_product(leaf)]
        ask(subject, partition, masks, leaf, most_shared(question, groups))
