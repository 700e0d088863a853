"""Transposed convolutions in the checker: the case, PyTorch's bits, and the mistakes that it names."""

import json
import re

import numpy as np
import pytest

import bridge
import jaxdw
from bridge import Case
from tests.bridge.cli.command import jaxdw as command

GEOMETRY = {"strides": 2, "padding": 1, "output_padding": 1}


def arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = ((1, 6, 5, 3), (3, 3, 1, 3), (3,))
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def test_jaxdw_has_the_bits_of_pytorch_and_the_rest_is_explained(seed):
    case = Case.transposed(*arrays(seed), **GEOMETRY)
    names = ["torch.conv_transpose2d", "jax.transpose", "jax.grouped", "torch.conv2d"]
    diagnosis = bridge.parity(case, names, explain=True)
    assert diagnosis.verdict.passes
    assert diagnosis.between("torch.conv_transpose2d", "jax.transpose").verdict == "IDENTICAL"
    order = bridge.reveal(bridge.implementation("torch.conv_transpose2d"), case)
    assert order.revealed == 1
    assert np.array_equal(bridge.replay(order, case), diagnosis.outputs["torch.conv_transpose2d"])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"transpose_kernel": False}, "kernel flipped along every axis"),
        ({"padding": "SAME", "output_padding": 0}, r"computed with padding=\(\(2, 1\), \(2, 1\)\)"),
    ],
)
def test_mistakes_of_the_convention_are_named(wrong, said, seed):
    x, kernel, bias = arrays(seed)
    case = Case.transposed(x, kernel, bias, **GEOMETRY)
    right = bridge.implementation("torch.conv_transpose2d").run(case)
    mistaken = np.asarray(jaxdw.depthwise_conv_transpose(x, kernel, bias, **{**GEOMETRY, **wrong}))
    found = bridge.compare(mistaken, right, case)
    assert found.verdict == "CONVENTION" and re.search(said, found.cause)


def test_a_missing_output_padding_is_an_error_that_says_what_is_missing(seed):
    x, kernel, bias = arrays(seed)
    case = Case.transposed(x, kernel, bias, **GEOMETRY)
    right = bridge.implementation("torch.conv_transpose2d").run(case)
    short = np.asarray(jaxdw.depthwise_conv_transpose(x, kernel, bias, strides=2, padding=1))
    with pytest.raises(ValueError, match="1 fewer along axis 1 and 1 fewer along axis 2; padding=1 gives this shape"):
        bridge.compare(short, right, case)
    with pytest.raises(ValueError, match="`padding` is 'CIRCULAR', expected 'SAME', 'VALID', an int"):
        Case.transposed(x, kernel, padding="CIRCULAR")


def test_the_command_takes_pytorchs_arguments_and_files(seed, tmp_path):
    x, *_ = arrays(seed)
    wide = np.random.default_rng(seed).standard_normal((3, 2, 3, 3), np.float32)  # PyTorch's (C, M, *k)
    np.save(tmp_path / "x.npy", np.moveaxis(x, -1, 1))
    np.save(tmp_path / "w.npy", wide)
    files = ("--input", tmp_path / "x.npy", "--kernel", tmp_path / "w.npy", "--layout", "channels_first")
    numbers = ("--strides", "2", "--padding", "1", "--output-padding", "1")
    names = ("--implementations", "torch.conv_transpose2d,jax.transpose", "--no-explain")
    code, _, _ = command("parity", "--transposed", *files, *numbers, *names, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["case"]["input_dilation"] == [2, 2] and report["case"]["output"] == [1, 12, 10, 6]
    code, _, error = command("parity", *files, *numbers)
    assert code == 2 and "`--output-padding` is '1' without `--transposed`, expected both or none" in error
