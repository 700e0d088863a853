"""Accumulation orders: reveal the order in which an implementation adds, and replay it bit for bit. NumPy only."""

from bridge.accumulation._divergence import Divergence as Divergence
from bridge.accumulation._divergence import divergence as divergence
from bridge.accumulation._divergence import first_divergence as first_divergence
from bridge.accumulation._replay import replay as replay
from bridge.accumulation._reveal import reveal as reveal
from bridge.accumulation.convolution import MOST_TAPS as MOST_TAPS
from bridge.accumulation.convolution import ConvolutionSums as ConvolutionSums
from bridge.accumulation.convolution import check_taps as check_taps
from bridge.accumulation.order import AccumulationOrder as AccumulationOrder
from bridge.accumulation.order import Fingerprint as Fingerprint
from bridge.accumulation.order import NotASum as NotASum
from bridge.accumulation.order import Rounding as Rounding
from bridge.accumulation.sums import SumsOfProducts as SumsOfProducts
from bridge.accumulation.tree import BIAS as BIAS
from bridge.accumulation.tree import Tree as Tree
from bridge.accumulation.vectors import DotProduct as DotProduct
from bridge.accumulation.vectors import reveal_dot as reveal_dot
from bridge.accumulation.vectors import reveal_sum as reveal_sum
