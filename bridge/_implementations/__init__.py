"""Everything that can run a Case, by name: `torch.conv2d`, `jax.taps`, `torch.conv2d[mkldnn=off]`."""

from bridge._implementations.algorithm import Algorithm as Algorithm
from bridge._implementations.algorithm import Emulation as Emulation
from bridge._implementations.algorithm import Knob as Knob
from bridge._implementations.algorithm import declared as declared
from bridge._implementations.registry import FRAMEWORKS as FRAMEWORKS
from bridge._implementations.registry import Implementation as Implementation
from bridge._implementations.registry import counterpart as counterpart
from bridge._implementations.registry import implementation as implementation
from bridge._implementations.registry import implementations as implementations
from bridge._implementations.registry import is_exact as is_exact
from bridge._implementations.registry import knobs as knobs
from bridge.errors import ImplementationError as ImplementationError
