"""Everything that can run a Case, by name: `torch.conv2d`, `jax.taps`, `torch.conv2d[mkldnn=off]`."""

from bridge.errors import ImplementationError
from bridge.implementations.algorithm import Algorithm, Emulation, Knob, declared
from bridge.implementations.registry import (
    FRAMEWORKS,
    Implementation,
    counterpart,
    implementation,
    implementations,
    is_exact,
    knobs,
)

__all__ = [
    "FRAMEWORKS",
    "Algorithm",
    "Emulation",
    "Implementation",
    "ImplementationError",
    "Knob",
    "counterpart",
    "declared",
    "implementation",
    "implementations",
    "is_exact",
    "knobs",
]
