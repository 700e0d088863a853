"""Depthwise convolution for JAX and Flax, with work on the windows, and the bits of PyTorch where you need them."""

from jaxdw.conv import depthwise_conv as depthwise_conv
from jaxdw.geometry import Geometry as Geometry
from jaxdw.windows import contract as contract
from jaxdw.windows import fold as fold
from jaxdw.windows import map_windows as map_windows
from jaxdw.windows import unfold as unfold

__version__ = "0.1.0"
