"""The order in which an implementation adds: reveal it, and replay it bit for bit. NumPy only."""

from bridge.accumulation._divergence import divergence
from bridge.accumulation._replay import replay
from bridge.accumulation._reveal import reveal
from bridge.accumulation.convolution import MOST_TAPS, ConvolutionSums, check_taps
from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum, Rounding
from bridge.accumulation.sums import SumsOfProducts
from bridge.accumulation.tree import BIAS, Tree
from bridge.accumulation.vectors import DotProduct, reveal_dot, reveal_sum

__all__ = [
    "BIAS",
    "MOST_TAPS",
    "AccumulationOrder",
    "ConvolutionSums",
    "DotProduct",
    "Fingerprint",
    "NotASum",
    "Rounding",
    "SumsOfProducts",
    "Tree",
    "check_taps",
    "divergence",
    "replay",
    "reveal",
    "reveal_dot",
    "reveal_sum",
]
