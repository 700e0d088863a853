"""Compare depthwise convolutions of PyTorch and JAX, and prove what their difference is."""

# ruff: noqa: E402
import os
import sys


def _left_current_folder() -> bool:
    """Take the current folder off the path of the command, before anything is imported that it could replace.

    `python -m bridge` puts it first, and so may an empty part of PYTHONPATH, or a dot. Return whether it was there. A
    program that imports `bridge` keeps its path.
    """
    command = os.path.splitext(os.path.basename(sys.argv[0]))[0] if sys.argv else ""
    as_module = command == "-m" and sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == __name__
    if not as_module and command not in ("jaxdw", "jaxdw-script"):
        return False
    before = list(sys.path)
    if as_module and not sys.flags.safe_path:
        del sys.path[0]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(given) > 1 or given[0]:
        here = os.path.abspath(os.curdir)
        unasked = here not in given and any(os.path.normpath(entry) == os.curdir for entry in given)
        sys.path[:] = [entry for entry in sys.path if not unasked or os.path.abspath(entry) != here]
    return sys.path != before


_left = _left_current_folder()

import importlib
from typing import TYPE_CHECKING, Any

from bridge.process import find_packages
from bridge.requirements import unmet

if _left:  # from where these two packages may have been found
    find_packages()

#: The public names, by the module that each is imported from when it is first used: most modules load a framework.
_PUBLIC = {
    "bridge._census.census": ("census",),
    "bridge._conformance.suite": ("conformance",),
    "bridge._invariance.table": ("invariance",),
    "bridge.accumulation": ("replay", "reveal"),
    "bridge.case": ("Case",),
    "bridge.diagnosis": ("Comparison", "Diagnosis", "Verdict", "compare", "parity"),
    "bridge._implementations": ("Implementation", "implementation", "implementations"),
    "bridge.model": ("model_parity",),
    "bridge.testing": ("testing",),
    "bridge.weights": ("Rule", "load_weights", "to_flax", "to_torch"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

if TYPE_CHECKING:  # the same names for type checkers and editors
    from bridge import testing as testing
    from bridge._census.census import census as census
    from bridge._conformance.suite import conformance as conformance
    from bridge._implementations import Implementation as Implementation
    from bridge._implementations import implementation as implementation
    from bridge._implementations import implementations as implementations
    from bridge._invariance.table import invariance as invariance
    from bridge.accumulation import replay as replay
    from bridge.accumulation import reveal as reveal
    from bridge.case import Case as Case
    from bridge.diagnosis import Comparison as Comparison
    from bridge.diagnosis import Diagnosis as Diagnosis
    from bridge.diagnosis import Verdict as Verdict
    from bridge.diagnosis import compare as compare
    from bridge.diagnosis import parity as parity
    from bridge.model import model_parity as model_parity
    from bridge.weights import Rule as Rule
    from bridge.weights import load_weights as load_weights
    from bridge.weights import to_flax as to_flax
    from bridge.weights import to_torch as to_torch


def __getattr__(name: str) -> Any:
    """Import a public name; on a base install say what it needs."""
    if name not in _MODULES:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    if lacking := unmet():
        raise ImportError(f"bridge.{name} is unavailable: {lacking}")
    module = importlib.import_module(_MODULES[name])
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
