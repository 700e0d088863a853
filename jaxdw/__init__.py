"""Depthwise convolution for JAX and Flax, with work on the windows, and the bits of PyTorch where you need them."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: The public names, by the module that each is imported from when it is first used. `import jaxdw` loads no framework.
_PUBLIC = {
    "jaxdw.causal": ("causal_conv1d", "causal_conv1d_step"),
    "jaxdw.conv": ("depthwise_conv",),
    "jaxdw.conv_transpose": ("depthwise_conv_transpose",),
    "jaxdw.drop_in": ("accelerate", "conv_general_dilated"),
    "jaxdw.epilogue": ("Epilogue",),
    "jaxdw.geometry": ("Geometry",),
    "jaxdw.matmul": ("ordered_matmul",),
    "jaxdw.norm": ("batch_norm",),
    "jaxdw.full_conv": ("ordered_conv",),
    "jaxdw.sum_order": ("SumOrder",),
    "jaxdw.windows": ("contract", "fold", "map_windows", "unfold"),
    "jaxdw.windows.windowed_conv": ("windowed_conv",),
}
_NAMES = {name: module for module, names in _PUBLIC.items() for name in names}

#: Public modules; all but `sharding` and `training` import Flax.
_LAZY = ("nnx", "linen", "models", "sharding", "training")

if TYPE_CHECKING:  # the same names for type checkers and editors
    from jaxdw.causal import causal_conv1d as causal_conv1d
    from jaxdw.causal import causal_conv1d_step as causal_conv1d_step
    from jaxdw.conv import depthwise_conv as depthwise_conv
    from jaxdw.conv_transpose import depthwise_conv_transpose as depthwise_conv_transpose
    from jaxdw.drop_in import accelerate as accelerate
    from jaxdw.drop_in import conv_general_dilated as conv_general_dilated
    from jaxdw.epilogue import Epilogue as Epilogue
    from jaxdw.full_conv import ordered_conv as ordered_conv
    from jaxdw.geometry import Geometry as Geometry
    from jaxdw.matmul import ordered_matmul as ordered_matmul
    from jaxdw.norm import batch_norm as batch_norm
    from jaxdw.sum_order import SumOrder as SumOrder
    from jaxdw.windows import contract as contract
    from jaxdw.windows import fold as fold
    from jaxdw.windows import map_windows as map_windows
    from jaxdw.windows import unfold as unfold
    from jaxdw.windows.windowed_conv import windowed_conv as windowed_conv


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jaxdw.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'jaxdw' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_NAMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_LAZY})
