"""BUG: locate the elements that nothing explains.

Faults of taps, biases and channels are tried first. If none explains y, the finding names the support of what lies
outside the bound: elements, channels, batch entries, borders.
"""

from __future__ import annotations

import numpy as np

from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.convention.search import named_within
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.localisation.faults import fault_name, fault_words, holds, regress
from bridge.diagnosis.localisation.support import Support, support
from bridge.diagnosis.one_sided import one_sided
from bridge.diagnosis.output import Output
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import ulp_distance

#: Units in the last place up to which errors in one direction are called one-sided rounding.
_ULPS = 2
#: Up to this many elements are listed one by one.
_LISTED = 8


def locate(output: Output, near_misses: list[tuple[Mistake, np.ndarray]]) -> Finding:
    """Return the finding BUG with its place.

    Args:
      near_misses: the mistakes that explain all but a few elements, and where these are.
    """
    outside = output.outside
    count = int(np.count_nonzero(outside))
    if count <= min(_LISTED, outside.size // 2):
        listed = _listed(outside)
        if count == 1:
            return _unexplained(output, "single element", f"at element {listed}")
        return _unexplained(output, "few elements", f"at {count} elements: {listed}")
    direction = one_sided(output)
    if direction and ulp_distance(output.y, output.target.exact.value).max(where=outside, initial=0) <= _ULPS:
        cause = f"{direction}; {count} of {outside.size} are beyond the bound of rounding"
        return Finding(Verdict.BUG, "one-sided rounding", cause, place="everywhere")
    everywhere = Support(())
    confined = support(output)
    for place in dict.fromkeys((everywhere, confined.only("batch"), confined)):
        inside = place.mask(output)
        if place.restrictions and (mistake := named_within(output, inside)) is not None:
            return _confined(output, place, f"it {mistake.cause}")
        faults = regress(output, np.flatnonzero(inside & np.isfinite(output.y)))
        if faults and all(holds(output, fault, inside) for fault in faults):
            words = fault_words(output, faults)
            if place.is_by_position:
                return _confined(output, place, words)
            where = f"{words}, {place.words}" if place.words else words
            return Finding(Verdict.BUG, fault_name(faults), f"{output.name}: {where}", place=where)
    if near_misses:
        return _near_miss(output, *min(near_misses, key=lambda found: np.count_nonzero(found[1])))
    if _same_values(output):
        return Finding(
            Verdict.BUG,
            "outputs permuted",
            f"{output.name} has the right values in wrong places: sorted, they agree",
            "put the outputs in their places: they are permuted within the tensor, along no single axis",
            confined.words or "everywhere",
        )
    all_wrong = "everywhere" if count == outside.size else "at elements all over the output"
    return _unexplained(output, confined.name or "everywhere", confined.words or all_wrong)


def _unexplained(output: Output, name: str, place: str) -> Finding:
    zero = bool((output.y[output.outside] == 0).all())
    ratio = f"up to {output.worst_ratio:.3g} times the bound of {output.arithmetic.accumulator.name}"
    count = np.count_nonzero(output.outside)
    cause = f"{output.name} is {'zero' if zero else 'wrong'} {place}; {count} of {output.y.size} elements, by {ratio}"
    return Finding(Verdict.BUG, name, cause, place=place)


def _near_miss(output: Output, mistake: Mistake, left: np.ndarray) -> Finding:
    """Return the mistake that explains most elements, and the elements that contradict it."""
    name = "single element" if np.count_nonzero(left) == 1 else "few elements"
    cause = f"{output.name} {mistake.cause}; and beside that it is wrong at {_listed(left)}"
    return Finding(Verdict.BUG, name, cause, place=f"at {_listed(left)}")


def _confined(output: Output, place: Support, what: str) -> Finding:
    count = int(np.count_nonzero(output.outside))
    cause = f"{output.name} is wrong {place.words}, in {count} of {output.y.size} elements: there {what}"
    return Finding(Verdict.BUG, place.name, cause, place=place.words)


def _listed(where: np.ndarray) -> str:
    return ", ".join(str(tuple(int(i) for i in index)) for index in np.argwhere(where))


def _same_values(output: Output) -> bool:
    """Return whether y and the exact result hold the same values, in any order, to within the greatest bound."""
    y, reference = output.y.astype(np.float64).ravel(), output.expected.reference.ravel()
    if not np.isfinite(y).all() or not np.isfinite(reference).all():
        return False
    allowed = output.expected.allowed.max(initial=0)
    return bool(np.abs(np.sort(y) - np.sort(reference)).max() <= allowed < 1e-2 * np.abs(y - reference).max())
