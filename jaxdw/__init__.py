"""Depthwise convolution for JAX and Flax, with work on the windows, and the bits of PyTorch where you need them."""

import importlib

from jaxdw.conv import depthwise_conv as depthwise_conv
from jaxdw.drop_in import accelerate as accelerate
from jaxdw.drop_in import conv_general_dilated as conv_general_dilated
from jaxdw.epilogue import Epilogue as Epilogue
from jaxdw.geometry import Geometry as Geometry
from jaxdw.matmul import chain_matmul as chain_matmul
from jaxdw.windows import contract as contract
from jaxdw.windows import fold as fold
from jaxdw.windows import map_windows as map_windows
from jaxdw.windows import unfold as unfold
from jaxdw.windows.windowed_conv import windowed_conv as windowed_conv

__version__ = "0.1.0"

#: Modules that are imported when they are first used: all but `sharding` import Flax.
_LAZY = ("nnx", "linen", "models", "sharding")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"jaxdw.{name}")
    raise AttributeError(f"module 'jaxdw' has no attribute {name!r}")
