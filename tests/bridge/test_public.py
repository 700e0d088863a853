"""The public names of `bridge`: each loads no more than it needs, and is the function of its name, not a module."""

import ast
import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest

import bridge
from bridge import requirements
from bridge.numerics import same_bits

FRAMEWORKS = {"jax", "flax", "torch"}


@pytest.mark.parametrize("module", ["bridge", "bridge.numerics", "bridge.accumulation", "bridge.accumulation.gradient"])
def test_no_framework_is_loaded_by(module):
    program = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and not FRAMEWORKS & set(loaded)


def test_a_sum_is_revealed_without_a_framework():
    program = (
        "import sys, numpy; from bridge.accumulation import reveal_sum; "
        "print(reveal_sum(numpy.add.reduce, 4).trees, *sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("(Tree('((0+1)+2)+3'),)") and not FRAMEWORKS & set(printed.split())


def test_every_public_name_is_told_to_type_checkers_too():
    block = next(
        node
        for node in ast.parse(inspect.getsource(bridge)).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    told = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert told == bridge._MODULES | {"testing": "bridge"}
    assert set(told) <= set(dir(bridge))


@pytest.mark.parametrize("name", bridge._MODULES)
def test_a_public_name_is_no_module_of_that_name(name):
    for module in ("bridge.cli", bridge._MODULES[name]):
        importlib.import_module(module)
    assert inspect.ismodule(getattr(bridge, name)) == (name == "testing")


def test_an_order_is_revealed_and_replayed_by_public_names(seed):
    rng = np.random.default_rng(seed)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((1, 6, 6, 2), (3, 3, 1, 2)))
    case, taps = bridge.Case(x, kernel), bridge.implementation("jax.taps")
    assert same_bits(bridge.replay(bridge.reveal(taps, case), case), taps.run(case)).all()


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match="module 'bridge' has no attribute 'parities'"):
        bridge.parities  # noqa: B018


def test_a_base_install_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(requirements.NEEDED, "torch", (99, 0))
    monkeypatch.delitem(vars(bridge), "reveal", raising=False)
    with pytest.raises(ImportError, match=r"bridge.reveal is unavailable: .* need torch 99.0 or newer"):
        bridge.reveal  # noqa: B018
