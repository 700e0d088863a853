"""Clean the names in a checkpoint: drop wrappers' prefixes, and tell averages of weights from the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

#: The counter that `torch.optim.swa_utils.AveragedModel` keeps beside the averaged model.
_AVERAGED = "n_averaged"

#: Parts that wrappers put anywhere into names: `torch.compile`, activation checkpointing, FSDP.
_INSIDE = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"}

#: Prefixes that wrappers put before every name: `DataParallel` and `AveragedModel`; PEFT; Opacus; DeepSpeed.
_BEFORE = ("module.", "base_model.model.", "_module.", "_forward_module.")

_EMA = re.compile(r"(^|[._])(ema|swa|averaged?)($|[._])", re.IGNORECASE)


def is_average(name: str) -> bool:
    """Return True where a part of a checkpoint is named after an average over training steps.

    >>> [is_average(name) for name in ("state_dict_ema", "model_ema", "ema.shadow", "schema", "state_dict")]
    [True, True, True, False, False]
    """
    return _EMA.search(name) is not None


def plain_names(tensors: Mapping[str, Value], prefix: str | None = None) -> dict[str, Value]:
    """Return tensors under the names that the bare model gives them.

    `_orig_mod.` (`torch.compile`), `_checkpoint_wrapped_module.` and `_fsdp_wrapped_module.` are dropped wherever they
    stand, `module.` (`DataParallel`, `AveragedModel`) and `base_model.model.` (PEFT) where every name starts with it.
    With a `prefix`, only the names that start with it are kept, without it.

    Raises:
      ValueError: two names become one; no name has the prefix; or there are weights and an average of them, and no
        prefix chooses.

    >>> plain_names({"module._orig_mod.conv.weight": 1, "module._orig_mod.conv.bias": 2})
    {'conv.weight': 1, 'conv.bias': 2}
    >>> plain_names({"model.conv.weight": 1, "head.weight": 2}, prefix="model.")
    {'conv.weight': 1}
    """
    if prefix is not None:
        chosen = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        if not chosen:
            raise ValueError(f"`prefix` is {prefix!r}, and no name starts with it; there are {_some(tensors)}")
    else:
        _refuse_averages(tensors)
        chosen = {name: name for name in tensors}
    return unwrapped(tensors, chosen)


def unwrapped(tensors: Mapping[str, Value], chosen: Mapping[str, str] | None = None) -> dict[str, Value]:
    """Return tensors by name without the parts that wrappers add; `chosen` has other names to start from.

    Raises:
      ValueError: two names become one.
    """
    names = {name: name for name in tensors} if chosen is None else chosen
    plain = {name: without_wrappers(short) for name, short in names.items()}
    while heads := [head for head in _BEFORE if plain and all(short.startswith(head) for short in plain.values())]:
        plain = {name: short.removeprefix(heads[0]) for name, short in plain.items()}
    by_plain: dict[str, list[str]] = {}
    for name, short in plain.items():
        by_plain.setdefault(short, []).append(name)
    if twice := {short: names for short, names in by_plain.items() if len(names) > 1}:
        raise ValueError(
            "duplicate keys once wrappers' prefixes are taken off: "
            + "; ".join(f"{' and '.join(names)} are both {short!r}" for short, names in twice.items())
        )
    return {short: tensors[name] for name, short in plain.items()}


def without_wrappers(name: str) -> str:
    """Return a name without the parts that wrappers put inside it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def _refuse_averages(tensors: Mapping[str, object]) -> None:
    if _AVERAGED in tensors:
        raise ValueError(
            f"the key {_AVERAGED!r} shows that these are weights averaged over training steps (`AveragedModel`); "
            'choose them with `prefix="module."`'
        )
    heads = {name.split(".")[0] for name in tensors}
    if averages := sorted(head for head in heads if is_average(head)):
        others = sorted(heads - set(averages))
        prefixes = " or ".join(f"`prefix={name + '.'!r}`" for name in averages)
        raise ValueError(
            f"weights averaged over training steps are among the keys; choose them with {prefixes}"
            + (f", or the others ({', '.join(others)}) with their prefix" if others else "")
        )


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")
