"""Operators of PyTorch that were recorded, in float64 with running errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge.model import aten, aten_gradients
from bridge.model.running_error import Bounded
from bridge.model.torch_graph import Call, Ref

_RULES = {**aten.RULES, **aten_gradients.RULES}


@np.errstate(all="ignore")  # masks are infinite, and a trial may put one into a product
def evaluate(call: Call, operands: Mapping[int, Bounded]) -> list[Bounded]:
    """Return the results of a call; the first ones at least.

    Raises:
      UnknownOperator: nothing is known of it, or of these arguments.
    """
    if call.name not in _RULES:
        raise aten.UnknownOperator(call.name)
    result = _RULES[call.name]({name: _given(value, operands) for name, value in call.arguments.items()})
    return result if isinstance(result, list) else [result]


def is_known(name: str) -> bool:
    """Return True for an operator that has a bound."""
    return name in _RULES


def _given(value: Any, operands: Mapping[int, Bounded]) -> Any:
    if isinstance(value, Ref):
        return operands[value.number]
    if isinstance(value, (list, tuple)):
        return [_given(each, operands) for each in value]
    return value
