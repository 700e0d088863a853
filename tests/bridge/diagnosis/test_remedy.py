"""The lines that the answer gives to copy have the bits of the reference when they are run."""

import ast

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge.numerics import same_bits
from tests.bridge.implementations.test_user import draw

CASES = {
    "the question": {"padding": 1},
    "bias, strides and dilation": {"padding": (2, 1), "strides": (2, 1), "kernel_dilation": (1, 2), "bias": True},
    "asymmetric": {"padding": "SAME", "strides": 2, "shape": (2, 6, 6, 4)},
    "periodic": {"padding": "CIRCULAR", "bias": True},
    "input dilation": {"padding": 1, "input_dilation": 2},
    "1-D": {"padding": 1, "shape": (2, 9, 4), "kernel_size": (3,)},
}


def run(remedy, case):
    """Each statement of the remedy's code that assigns y, run with a function of the windows that changes nothing."""
    if remedy.framework == "jax":
        x, kernel, bias = (None if a is None else jnp.asarray(a) for a in (case.x, case.kernel, case.bias))
        given = {"x": x, "kernel": kernel, "bias": bias}
    else:
        moved = np.moveaxis(case.x, -1, 1), np.moveaxis(case.kernel, (-1, -2), (0, 1))
        x, weight = (torch.from_numpy(np.ascontiguousarray(a)) for a in moved)
        given = {"x": x, "weight": weight, "bias": None if case.bias is None else torch.from_numpy(case.bias)}
    given["fn"] = lambda windows: windows
    assert max(map(len, remedy.code.splitlines())) <= 76  # four columns stand before them
    for statement in ast.parse(remedy.code).body:
        exec(ast.unparse(statement), given)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "y":
            y = np.asarray(given["y"])
            yield y if remedy.framework == "jax" else np.moveaxis(y, 1, -1)


@pytest.mark.parametrize("name", CASES)
def test_lines_to_copy_have_the_bits_of_the_reference(name, seed):
    case = draw(seed, **CASES[name])
    diagnosis = bridge.parity(case, ["torch.conv2d", "jax.grouped", "torch.unfold_matmul"], explain=False)
    wanted = {"torch.unfold_matmul": "torch", "jax.grouped": "jax"}
    differing = [other for other in wanted if other not in diagnosis.identical_to("torch.conv2d")]
    assert {each.framework for each in diagnosis.remedies} <= set(wanted.values())
    assert diagnosis.remedies or not differing
    for remedy in diagnosis.remedies:
        for y in run(remedy, case):
            assert same_bits(y, diagnosis.outputs["torch.conv2d"]).all(), remedy.code


def test_there_is_no_remedy_for_what_is_wrong_or_equal(seed):
    case = draw(seed, (2, 6, 6, 3), padding=1)
    assert bridge.parity(case, ["torch.conv2d", "jax.taps"], explain=False).remedies == ()
    flipped = bridge.parity(case, {"jax.taps": "jax.taps", "mine": lambda x, w: w.mean() * x}, explain=False)
    assert not flipped.verdict.passes and flipped.remedies == ()
