"""Parameters and settings of a layer in both frameworks: equal in every bit, or the first that differs is named.

A wrong parameter may change a result by less than rounding may, and a wrong momentum changes none in inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.model.operations import Operation
from bridge.numerics import same_bits, ulp_distance


@dataclasses.dataclass(frozen=True, eq=False)
class LayerParameters:
    """A layer of the Flax model, in PyTorch's names and layout.

    Attributes:
      arrays: "weight", "bias", "running_mean", "running_var".
      epsilon: of a normalization; momentum: the weight of the new statistics, as PyTorch has it; else None.
    """

    arrays: Mapping[str, np.ndarray]
    epsilon: float | None = None
    momentum: float | None = None


def with_parameters(
    found: Comparison, layer: LayerParameters, operation: Operation, done: Sequence[Operation]
) -> Comparison:
    """Return BUG or CONVENTION where parameters or settings differ and the results do not show it; else `found`.

    Args:
      found: the comparison of the results, which passes.
      layer: JAX's.
      operation: PyTorch's.
      done: all operations of PyTorch, to find whose parameters these are.
    """
    for name, ours in layer.arrays.items():
        theirs = operation.parameters.get(name)
        if theirs is None or theirs.size != ours.size:
            continue
        ours = ours.reshape(theirs.shape)
        cause = of_other_bits(name, ours, theirs)
        if not cause:
            continue
        owners = [
            each.layer
            for each in done
            if each.layer != operation.layer
            and (other := each.parameters.get(name)) is not None
            and other.shape == ours.shape
            and same_bits(other, ours).all()
        ]
        if owners:
            cause = f"JAX has the {name} of {owners[0]} here"
        return dataclasses.replace(
            found, verdict=Verdict.BUG, name="parameters", cause=cause, fix=f"convert {name} of {operation.layer} again"
        )
    theirs_eps, theirs_momentum = operation.settings.get("eps"), operation.settings.get("momentum")
    if layer.epsilon is not None and theirs_eps is not None and layer.epsilon != theirs_eps:
        return dataclasses.replace(
            found,
            verdict=Verdict.CONVENTION,
            name="epsilon",
            cause=f"epsilon is {layer.epsilon:.10g} in JAX and {theirs_eps:.10g} in PyTorch",
            fix=f"epsilon={theirs_eps:.10g} in JAX",
        )
    if layer.momentum is None or theirs_momentum is None:
        return found
    return with_momentum(found, layer.momentum, theirs_momentum)


def of_other_bits(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say where a parameter differs from PyTorch's, both in PyTorch's layout; nothing where no bit does."""
    differs = ~same_bits(ours, theirs)
    if not differs.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    ulp = int(ulp_distance(ours[differs], theirs[differs]).max())
    return (
        f"{name} has other bits in {np.count_nonzero(differs)} of {differs.size} elements, by at most {ulp} ULP; "
        f"the first is {at} in PyTorch's layout: {ours[at]!s} in JAX, {theirs[at]!s} in PyTorch"
    )


def with_momentum(found: Comparison, ours: float, theirs: float) -> Comparison:
    """Return CONVENTION where the weights of the new statistics differ; else `found`."""
    if _is_near(ours, theirs):
        return found
    turned = _is_near(1 - ours, theirs)
    return dataclasses.replace(
        found,
        verdict=Verdict.CONVENTION,
        name="momentum",
        cause=f"in training JAX gives new statistics the weight {ours:.6g}, PyTorch {theirs:.6g}"
        + ("; Flax's momentum is the weight of the old ones, 1 minus PyTorch's" if turned else ""),
        fix=f"momentum={1 - theirs:.6g} in JAX",
    )


def _is_near(a: float, b: float) -> bool:
    """Return whether two numbers are the same in float32, as both frameworks use them, but for 1 - m rounded twice."""
    return abs(np.float32(a) - np.float32(b)) <= np.spacing(np.float32(1)) / 2
