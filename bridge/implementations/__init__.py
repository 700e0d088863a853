"""Everything that can run a Case, by name: `torch.conv2d`, `jax.taps`, `torch.conv2d[mkldnn=off]`."""

from bridge.errors import ImplementationError as ImplementationError
from bridge.implementations.algorithm import Algorithm as Algorithm
from bridge.implementations.algorithm import Emulation as Emulation
from bridge.implementations.algorithm import Knob as Knob
from bridge.implementations.algorithm import declared as declared
from bridge.implementations.registry import FRAMEWORKS as FRAMEWORKS
from bridge.implementations.registry import Implementation as Implementation
from bridge.implementations.registry import counterpart as counterpart
from bridge.implementations.registry import implementation as implementation
from bridge.implementations.registry import implementations as implementations
from bridge.implementations.registry import is_exact as is_exact
from bridge.implementations.registry import knobs as knobs
