"""Import libraries of PyTorch models, even where torchvision's compiled operators do not load."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from bridge.errors import first_line
from bridge.process import import_named

T = TypeVar("T")

#: Operators for which torchvision registers shape rules on import, whether or not its compiled library is there.
_DECLARED = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}

#: A declaration lives as long as its Library.
_libraries: list[Any] = []


def import_library(name: str) -> ModuleType:
    """Import torchvision, timm or transformers, or a module of theirs.

    timm and transformers import torchvision where it is installed, so it comes first.
    """
    with contextlib.suppress(ImportError):  # it is missing, which matters only to those that need it
        with_torchvision(lambda: importlib.import_module("torchvision"))
    return importlib.import_module(name)


def users_module(argument: str, name: str) -> ModuleType:
    """Import the module of a user's `package.module:function`.

    Args:
      argument: what the user calls the name.
      name: as the user gave it.

    Raises:
      ValueError: it cannot be imported; the message says why.
    """
    source = name.partition(":")[0]
    try:
        return with_torchvision(lambda: import_named(source))
    except (Exception, SystemExit) as error:
        raise ValueError(f"`{argument}` is {name!r}, and {source!r} cannot be imported: {first_line(error)}") from error


def with_torchvision(load: Callable[[], T]) -> T:
    """Return `load()`, which may import torchvision beside a PyTorch for which it was not built.

    A torchvision for CUDA beside a PyTorch for CPUs, which many users have, cannot load its compiled operators. Then
    its import fails, since it registers shape rules for two of them. Networks call neither: the two are declared, one
    line says so, and `load` is called again. Any other error is raised.
    """
    try:
        return load()
    except RuntimeError as error:
        missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
        if missing is None or missing[1] not in _DECLARED or _loads():
            raise
    _declare()
    return load()


def _loads() -> bool:
    """Return True if torchvision's compiled library is loaded, as torchvision itself says."""
    extension = sys.modules.get("torchvision.extension")
    return extension is None or extension._has_ops()


def _declare() -> None:
    import torch

    for name, schema in _DECLARED.items():
        if not hasattr(torch.ops.torchvision, name):
            _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            _libraries[-1].define(schema)
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # imported in part
    logging.getLogger("bridge").warning(
        "torchvision %s cannot load its compiled operators beside PyTorch %s; they are declared only, as networks of "
        "convolutions call none",
        importlib.metadata.version("torchvision"),
        torch.__version__,
    )
