"""The order in which an implementation adds: reveal it, and replay it bit for bit. NumPy only."""

from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding
from bridge.accumulation.parting import parting
from bridge.accumulation.replay import replay
from bridge.accumulation.reveal import reveal
from bridge.accumulation.sums import reveal_dot, reveal_sum
from bridge.accumulation.tree import BIAS, Tree

__all__ = [
    "BIAS",
    "AccumulationOrder",
    "Fingerprint",
    "NotASum",
    "Rounding",
    "Tree",
    "parting",
    "replay",
    "reveal",
    "reveal_dot",
    "reveal_sum",
]
