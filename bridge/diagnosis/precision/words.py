"""The finding of a rounding in words: its name, its cause and its fix."""

from __future__ import annotations

import dataclasses

import numpy as np

from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.precision.rounded import Rounded
from bridge.diagnosis.target import WORDS
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import FLOAT16, TF32


def finding(output: Output, hypothesis: Rounded) -> Finding:
    """Return the finding that the hypothesis explains y."""
    target, name = output.target, hypothesis.format.name
    split = target.factors if hypothesis.products > 1 else ()
    operands = split or [each for each in hypothesis.operands if each != "bias" or target.has_bias]
    words = " and ".join(WORDS[operand] for operand in operands)
    parts, causes = [], []
    if split:
        parts.append("inputs")
        causes.append(f"{words} split into two bfloat16 parts, three products for each one")
    elif operands:
        parts.append("inputs")
        causes.append(f"{words} {'truncated' if hypothesis.truncated else 'rounded'} to {_formats(output, hypothesis)}")
    if hypothesis.windows:
        parts.append("windows")
        causes.append(f"each window's contribution rounded to {_formats(output, hypothesis)}")
    if hypothesis.output:
        parts.append("output")
        how = "truncated" if hypothesis.truncated and not operands else "rounded"
        before = f"the sum rounded to {name} before the bias is added, and again after"
        causes.append(before if hypothesis.before_bias else f"the result {how} to {name}")
    elif hypothesis.accumulator:
        parts.append("accumulator")
        after = f", and a {output.y.dtype.name} bias added after" if hypothesis.before_bias else ""
        causes.append(f"the products accumulated in {name}{after}")
    elif hypothesis.before_bias:
        parts.append("sum")
        causes.append(f"the sum rounded to {name} before the bias is added in {output.y.dtype.name}")
    was, rest = "was", f"the rest is within the bound of {output.arithmetic.accumulator.name}"
    if hypothesis.accumulator and not hypothesis.output:  # only consistent with y, not proved
        was = "is as"
        rest = "the difference is within the bound of that and looks random: no tap and no input correlates with it"
    return Finding(
        Verdict.PRECISION,
        f"{hypothesis.name} {' and '.join(parts)}",
        f"{output.name} {was} computed with {', and '.join(causes)}; {rest}",
        _fix(output, hypothesis),
        "; ".join(f"inputs: {', '.join(operands)}" if part == "inputs" else part for part in parts),
    )


def _formats(output: Output, hypothesis: Rounded) -> str:
    """Return the format's name, or both TF32 and float16: they differ only where values are small or large."""
    if hypothesis.parts == 2:
        return f"two parts of {hypothesis.format.name}"
    if hypothesis.format is not TF32 or hypothesis.windows or output.emulated is not None:
        return hypothesis.format.name
    half = dataclasses.replace(hypothesis, format=FLOAT16)
    given = {name: output.target.operand(name) for name in hypothesis.operands}
    same = all(np.array_equal(half.round(name, a), hypothesis.round(name, a)) for name, a in given.items())
    return "tf32 (or float16: these values do not distinguish them)" if same else "tf32"


def _fix(output: Output, hypothesis: Rounded) -> str:
    if hypothesis.accumulator and not hypothesis.output:
        return f"accumulate {output.name} in float32 or wider: JAX: preferred_element_type=jnp.float32"
    if hypothesis.output or hypothesis.before_bias:
        dtype = output.target.case.dtype.name
        return f"compute {output.name} with dtype={dtype} throughout, without autocast or a cast of its result"
    if hypothesis.products > 1:
        return (
            f'{output.name} in JAX: precision="highest" (three passes are "high"); '
            'in PyTorch: torch.set_float32_matmul_precision("highest")'
        )
    if hypothesis.format is TF32:
        torch_fix = (
            "torch.backends.cudnn.allow_tf32 = False, and for matmul torch.backends.cuda.matmul.allow_tf32 = False"
        )
    else:
        torch_fix = 'torch.set_float32_matmul_precision("highest"), and no autocast'
    return f'{output.name} in JAX: precision="highest"; in PyTorch: {torch_fix}'
