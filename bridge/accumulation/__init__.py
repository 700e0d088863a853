"""The order in which an implementation adds: reveal it, and replay it bit for bit. NumPy only."""

from bridge.accumulation._divergence import divergence
from bridge.accumulation._replay import replay
from bridge.accumulation._reveal import MOST_TAPS, check_taps, reveal
from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding
from bridge.accumulation.sums import reveal_dot, reveal_sum
from bridge.accumulation.tree import BIAS, Tree

__all__ = [
    "BIAS",
    "MOST_TAPS",
    "AccumulationOrder",
    "Fingerprint",
    "NotASum",
    "Rounding",
    "Tree",
    "check_taps",
    "divergence",
    "replay",
    "reveal",
    "reveal_dot",
    "reveal_sum",
]
