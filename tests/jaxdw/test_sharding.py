"""`jaxdw.sharding`: on eight virtual CPU devices, and compiled for 16 TPU chips without having them."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdw.sharding
from tests.collectives import collectives

ROOT = Path(__file__).parents[2]


def test_everything_that_needs_eight_devices(seed, full):
    """In a process of its own: XLA makes the virtual devices when it starts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--seed", str(seed)]
    command += ["--full"] * full + [str(Path(__file__).with_name("eight_devices.py"))]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@functools.cache
def v5e():
    """The 16 chips of a v5e 4x4, which are not here: enough to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jaxdw[tpu]'")
    from jax.experimental import topologies

    known = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, os.environ.get(name, value))
        return np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)


def compiled_for(devices, gradient=False, dtype=np.float32, **options):
    """x (4, 32, 32, 256) over 2 x 2 x 2 x 2 devices: blocks of (2, 16, 16, 128)."""
    mesh = Mesh(devices.reshape(2, 2, 2, 2), ("data", "x", "y", "c"), axis_types=(AxisType.Auto,) * 4)
    spec = P("data", "x", "y", "c")

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arrays = array((4, 32, 32, 256), spec), array((3, 3, 1, 256), P()), array((256,), P())
    conv = functools.partial(jaxdw.sharding.depthwise_conv, spec=spec, mesh=mesh, **options)

    def gradients(*arrays):
        y, pullback = jax.vjp(conv, *arrays)
        return pullback(y)

    return jax.jit(gradients if gradient else conv).lower(*arrays).compile()


@pytest.mark.parametrize(
    "options, width, rows, columns",
    [
        ({}, 4, 2, 2),
        ({"dtype": ml_dtypes.bfloat16}, 2, 2, 2),
        ({"strides": 2}, 4, 1, 1),
        ({"strides": 2, "padding": 1}, 4, 1, 1),
        ({"kernel_dilation": 3}, 4, 6, 6),
        ({"padding": "CIRCULAR"}, 4, 2, 2),
        ({"padding": "REFLECT"}, 4, 2, 2),
    ],
)
def test_on_16_v5e_chips_halos_are_moved_and_nothing_else(options, width, rows, columns):
    """Rows of 16 positions, then columns of 16 and the rows that came; both of two images and 128 channels."""
    found = collectives(compiled_for(v5e(), **options))
    assert {kind for kind, _ in found} == {"collective-permute"}
    assert sum(size for _, size in found) == 2 * 128 * (rows * 16 + columns * (16 + rows)) * width


def test_on_16_v5e_chips_the_gradients_of_the_parameters_are_summed_once():
    found = collectives(compiled_for(v5e(), gradient=True))
    assert {kind for kind, _ in found} == {"collective-permute", "all-reduce"}
    assert sum(size for kind, size in found if kind == "collective-permute") == 2 * 2 * 128 * (2 * 16 + 2 * 18) * 4
    assert sum(size for kind, size in found if kind == "all-reduce") <= (9 * 128 + 128) * 4
