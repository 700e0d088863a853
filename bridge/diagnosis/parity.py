"""parity: run a case through implementations, and compare every pair."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.accumulation import MOST_TAPS, AccumulationOrder, replay, reveal
from bridge.accumulation.gradient import InputGradient, has_input_gradient_case, input_gradient_case
from bridge.case import Case
from bridge.diagnosis.comparison import Comparison, compare_sides
from bridge.diagnosis.integers import IntegerTest, integer_test
from bridge.diagnosis.side import Side
from bridge.diagnosis.target import Target
from bridge.diagnosis.verdict import Verdict
from bridge.implementations import Implementation, implementation
from bridge.memory import check_fits

_log = logging.getLogger("bridge")

#: What `parity` compares when it is not told.
DEFAULT = (
    "torch.conv2d",
    "torch.unfold_matmul",
    "torch.unfold_einsum",
    "jax.grouped",
    "jax.patches",
    "jax.taps",
    "numpy.exact",
)

#: Output elements times taps up to which `parity` explains without being asked.
EXPLAINED_UNASKED = 1_000_000


#: Bytes for each element of a result that the exact sums, the bounds and a comparison take at once; measured.
_WORKING_BYTES = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """The comparisons of every pair of implementations on one case.

    Attributes:
      case: what was computed.
      outputs: each implementation's output, by name, in the order they were asked for.
      comparisons: one for each pair, in the same order.
      integer_tests: one for each implementation, against the exact result on small integers; it catches what hides
        inside the bound.
      orders: each implementation's revealed order of addition, but for numpy.exact, which has none; empty if they
        were not asked for.
      quantity, dy: what the outputs are: "y", or "dx", the gradient of sum(dy y) by the input.
    """

    case: Case
    outputs: Mapping[str, np.ndarray]
    comparisons: Sequence[Comparison]
    integer_tests: Sequence[IntegerTest] = ()
    orders: Sequence[AccumulationOrder] = ()
    quantity: str = "y"
    dy: np.ndarray | None = None

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of any pair; where all pass, that of an integer test that failed, which they hid."""
        verdict = max((c.verdict for c in self.comparisons), key=Verdict.rank, default=Verdict.IDENTICAL)
        hidden = [t.verdict for t in self.integer_tests] if verdict.passes else []
        return max([verdict, *hidden], key=Verdict.rank)

    @property
    def names(self) -> list[str]:
        return list(self.outputs)

    def between(self, a: str, b: str) -> Comparison:
        """The comparison of two implementations, whichever came first."""
        for comparison in self.comparisons:
            if {comparison.a, comparison.b} == {a, b}:
                return comparison
        raise ValueError(f"`a` and `b` are {a!r} and {b!r}, expected two of {', '.join(self.names)}")

    def identical_to(self, name: str) -> list[str]:
        """The other implementations with the same bits as this one."""
        others = (other for other in self.outputs if other != name)
        return [other for other in others if self.between(name, other).verdict is Verdict.IDENTICAL]


def parity(
    case: Case,
    implementations: Sequence[str | Implementation] | None = None,
    *,
    explain: bool | None = None,
    quantity: str = "y",
    dy: np.ndarray | None = None,
) -> Diagnosis:
    """Runs the case through each implementation and compares every pair.

    Args:
      case: input, kernel, bias and geometry.
      implementations: names or Implementations; None: PyTorch's convolution, the question's unfold and multiply
        in two ways, lax's convolution, jaxdw's methods and the exact result.
      explain: reveal each implementation's order of addition and replay it, which can prove EXPLAINED and takes about
        2 n runs for n taps; None: where the output is small and the window has at most `MOST_TAPS` taps.
      quantity: "y", the output, or "dx", the gradient of sum(dy y) by the input, from each framework's own
        differentiation; of a gradient no integers are tested.
      dy: the gradient by the output, of its shape and dtype, for "dx".

    Raises:
      ValueError: an unknown name, one named twice, or fewer than two; a quantity that does not fit.
    """
    if isinstance(implementations, str):
        raise TypeError(f"`implementations` is {implementations!r}, expected a list of names or Implementations")
    chosen = [implementation(i) if isinstance(i, str) else i for i in implementations or DEFAULT]
    for each in chosen:
        if not all(hasattr(each, member) for member in ("name", "run", "arithmetic")):
            raise TypeError(
                f"`implementations` has {each!r}, expected names, or objects with a name, run and arithmetic"
            )
    names = [i.name for i in chosen]
    if len(chosen) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`implementations` is {names}, expected at least two, each once")
    if explain is None:
        explain = (
            case.geometry.taps <= MOST_TAPS
            and math.prod(case.geometry.output_shape) * case.geometry.taps <= EXPLAINED_UNASKED
        )
    if quantity not in ("y", "dx"):
        raise ValueError(f"`quantity` is {quantity!r}, expected 'y' or 'dx'")
    target = Target.of(case, quantity, dy)
    # a gradient that is itself a depthwise convolution is explained as that convolution
    subject = case if dy is None else input_gradient_case(case, dy) if has_input_gradient_case(case) else None
    size = math.prod(target.shape)
    check_fits(
        f"The comparison of {len(chosen)} implementations with {size} elements each",
        size * (_WORKING_BYTES + len(chosen) * case.dtype.itemsize),
    )
    sides, tests, orders = [], [], []
    for each in chosen:
        _log.info("running %s", each.name)
        arithmetic = each.arithmetic(case, quantity)
        replayed = None
        if each.name == "numpy.exact":
            y = replayed = target.exact.value  # the one result that no order of addition can change
        else:
            y = each.run(case) if dy is None else each.input_gradient(case, dy)
            if explain and subject is not None:
                _log.info("revealing the order of addition of %s", each.name)
                orders.append(reveal(each if dy is None else InputGradient(each, case), subject))
                replayed = replay(orders[-1], subject)
        emulated = each if isinstance(each, Implementation) and each.emulation else None
        sides.append(Side.of(each.name, y, target, arithmetic, replayed, emulated))
        if dy is None:
            tests.append(integer_test(each, case, arithmetic))
    _log.info("comparing %s", ", ".join(names))
    comparisons = [compare_sides(a, b) for a, b in itertools.combinations(sides, 2)]
    return Diagnosis(case, {side.name: side.y for side in sides}, comparisons, tests, orders, quantity, dy)
