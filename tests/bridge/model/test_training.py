"""Gradients of a whole network, and ten steps of training, in both frameworks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bridge import Verdict
from bridge.model import model_parity
from bridge.report.model import summary
from jaxdw import native
from tests.bridge.model import training_digest
from tests.references import torchvision

ROOT = Path(__file__).parents[3]

needs_kernels = pytest.mark.skipif(not native.is_available(), reason=native.status())

#: SHA-256 of what `training_digest` trains. It changes only where docs/arithmetic.md does.
DIGEST = "300498e65528a322d8529df50e5910ae56e669fe83f57bf4af6b163e5fd8c33b"


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    torchvision()
    spec = importlib.util.spec_from_file_location("training_parity", ROOT / "examples" / "training_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_gradient_is_rounding_but_where_a_kernel_is_wrong(example, seed, full):
    if not full:
        pytest.skip("the example that runs in full compares the same gradients, without a mistake: full runs only")
    theirs, ours, manifest = example.pair(seed)
    kernel = ours.blocks[2].depthwise.conv.kernel
    kernel[...] = kernel[...][::-1, ::-1]
    images, _ = next(example.batches(seed, 1, count=2, size=32))
    found = model_parity(theirs, ours, images, manifest, gradients=True, training=True)
    assert not found.left and not found.not_compared, summary(found)
    paths = (".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param)))
    kernels = [f"gradient of {path}" for path in paths if path.endswith(".kernel")]
    assert len(kernels) == 53 and set(kernels) <= {layer.name for layer in found.layers}
    wrong = {layer.name: layer for layer in found.layers if layer.is_wrong}
    layer = "blocks.2.depthwise.conv"  # the gradient by its kernel does not depend on the kernel
    assert list(wrong) == [layer, f"gradient through {layer}"], summary(found)
    assert wrong[layer].verdict is Verdict.CONVENTION and "flipped" in wrong[layer].cause


def test_training_diverges_as_rounding_does(example, seed, full):
    """A mistake would give the same difference in float64 as in float32; rounding gives 2^-29 of that.

    The threshold, for the first step, is the middle of the two on a scale of powers; later steps amplify both.
    """
    if not full:
        pytest.skip("two compilations of a step of training: full runs only")
    difference = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
            theirs, ours, _ = example.pair(seed, dtype)
            steps = list(example.train(theirs, ours, example.batches(seed, 10, dtype)))
        assert len(steps) == 10 and np.isfinite(steps).all()
        difference[dtype] = steps[0][2]
    assert difference["float64"] < difference["float32"] * 2**-14.5


@needs_kernels
def test_training_has_the_same_bits_in_both_frameworks_with_the_arithmetic_of_jaxdw(example, seed):
    """Every parameter, momentum and running statistic, after each step; XLA itself adds and multiplies nothing."""
    theirs, ours, _ = example.pair(seed, arithmetic="jaxdw")
    for loss, our_loss, _, different, arrays in example.train(
        theirs, ours, example.batches(seed, 3, count=2, size=32), "jaxdw"
    ):
        assert loss == our_loss and different == 0 and arrays == 420
    images, labels = next(example.batches(seed, 1, count=2, size=32))
    momenta = jax.tree.map(jnp.zeros_like, example.nnx.state(ours, example.nnx.Param))
    program = example.step.lower(ours, momenta, jnp.asarray(images), jnp.asarray(labels)).compile().as_text()
    operations = set(re.findall(r"= f32\[[\d,]*\]\S* ([\w-]+)\(", program))
    assert "custom-call" in operations
    assert not operations & {"add", "subtract", "multiply", "divide", "reduce", "dot", "exponential", "power", "rsqrt"}


@needs_kernels
def test_training_has_the_bits_that_the_repository_keeps():
    """On the widest instruction set here, and in scalar code in another process."""
    assert training_digest.digest() == DIGEST
    command = [sys.executable, "-W", "ignore", "-m", "tests.bridge.model.training_digest"]
    environment = {**os.environ, "JAXDW_ISA": "scalar", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert run.stdout.split()[-1] == DIGEST
