"""PyTorch and JAX depthwise convolutions compared: what the difference is, proved."""

from bridge.requirements import unmet

if not unmet():
    from bridge import testing as testing
    from bridge.case import Case as Case
    from bridge.census import census as census
    from bridge.diagnosis import Comparison as Comparison
    from bridge.diagnosis import Diagnosis as Diagnosis
    from bridge.diagnosis import Verdict as Verdict
    from bridge.diagnosis import compare as compare
    from bridge.diagnosis import parity as parity
    from bridge.implementations import Implementation as Implementation
    from bridge.implementations import implementation as implementation
    from bridge.implementations import implementations as implementations
    from bridge.weights import Rule as Rule
    from bridge.weights import load_weights as load_weights
    from bridge.weights import to_flax as to_flax
    from bridge.weights import to_torch as to_torch
else:  # a base install: the command still runs, and says what it lacks

    def __getattr__(name: str) -> object:
        raise ImportError(f"bridge.{name} cannot be had: {unmet()}")
