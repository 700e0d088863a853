"""JAX: lax's convolution and jaxdw's methods."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxdw
from bridge._implementations import emulated, fourier, isolated, user
from bridge._implementations.algorithm import Algorithm, Knob, declared, time_calls
from bridge._implementations.arguments import ArgumentError
from bridge.case import DTYPES, Case, options
from bridge.errors import ImplementationError
from bridge.numerics import BFLOAT16, Arithmetic
from bridge.process import printing_to_stderr
from jaxdw import native
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from jaxdw.lowerings.lax_convolutions import lax_grouped
from jaxdw.padding import pad, padded_geometry

#: Named sets of XLA flags that change which instructions or libraries XLA:CPU uses.
XLA = {
    "default": "",
    "O0": "--xla_backend_optimization_level=0",
    "AVX": "--xla_cpu_max_isa=AVX",
    "AVX2": "--xla_cpu_max_isa=AVX2",
    "fast_math": "--xla_cpu_enable_fast_math=true",
    "no_ynnpack": "--xla_cpu_experimental_ynn_fusion_type=",
}

KNOBS = {
    "dtype": Knob(
        "precision",
        "same",
        {"same": "compute in the input's own dtype"}
        | {d: f"x.astype(jnp.{d}), kernel.astype(jnp.{d}), and the result back: y.astype(x.dtype)" for d in DTYPES}
        | {"float64": 'jax.config.update("jax_enable_x64", True), compute in float64, and y.astype(x.dtype)'},
    ),
    "jit": Knob("flag", "on", {"on": "jax.jit", "off": 'jax.config.update("jax_disable_jit", True)'}),
    "precision": Knob(
        "precision",
        "default",
        {v: f'precision="{v}"' for v in ("default", "high", "highest")},
        emulated.values(),
    ),
    "sharding": Knob(
        "flag",
        "none",
        {"none": "no sharding"}
        | {
            axis: f"x on a mesh of devices, its {axis} axis sharded: jax.device_put(x, NamedSharding(mesh, ...))"
            for axis in ("batch", "spatial", "channels")
        },
        tried=False,
    ),
    "xla": Knob("flag", "default", {v: f'XLA_FLAGS="{flags}"' for v, flags in XLA.items()}),
}

Compute = Callable[..., jax.Array]  # of x, kernel, bias or None, geometry, precision


def run(name: str, compute: Compute, case: Case, *, xla: str, **knobs: str) -> np.ndarray:
    """Return compute(x, kernel, bias, geometry, precision); under XLA flags, from a process of its own."""
    if xla != "default":
        return isolated.run(_spelled(name, knobs), case, environment=_flags(xla))
    with _ready(compute, case, **knobs) as call:
        return np.asarray(call().astype(case.dtype))


def seconds(name: str, compute: Compute, case: Case, repetitions: int, *, xla: str, **knobs: str) -> list[float]:
    """Return the seconds of each call of compute, with arrays at hand, until the result is ready."""
    if xla != "default":
        return isolated.seconds(_spelled(name, knobs), case, repetitions, environment=_flags(xla))
    with _ready(compute, case, **knobs) as call:
        return time_calls(lambda: call().block_until_ready(), repetitions)


def _spelled(name: str, knobs: Mapping[str, str]) -> str:
    base, _, said = name.partition("[")
    settings = [*filter(None, [said.removesuffix("]")]), *(f"{knob}={value}" for knob, value in knobs.items())]
    return f"{base}[{','.join(settings)}]"


def _flags(xla: str) -> dict[str, str]:
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {XLA[xla]}".strip()}


def input_gradient(compute: Compute, case: Case, dy: np.ndarray, *, xla: str, **knobs: str) -> np.ndarray:
    """Return the gradient of sum(dy y) by x, from `jax.vjp`."""
    if xla != "default":
        raise ValueError(f"`xla` is {xla!r} for a gradient, expected 'default': flags are set for outputs only")

    with _ready(_Pullback(compute), case, dy, **knobs) as call:
        return np.asarray(call().astype(case.dtype))


@contextlib.contextmanager
def _ready(
    compute: Compute, case: Case, *more: np.ndarray, dtype: str, jit: str, precision: str, sharding: str
) -> Iterator[Callable[[], jax.Array]]:
    """Yield a call of compute on JAX arrays in the computation's dtype: those of the case, and more."""
    working = case.dtype if dtype == "same" else DTYPES[dtype]
    compute, asked = _on(compute, precision, working)
    wide = "float64" in (case.dtype.name, working.name)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        given = (case.x, case.kernel, case.bias, *more)
        arrays = [None if a is None else jnp.asarray(a).astype(working) for a in given]
        if sharding != "none":
            arrays[:3] = _sharded(arrays[:3], case.geometry, sharding)
        with jax.disable_jit(jit == "off"):
            yield lambda: _call(*arrays, compute=compute, geometry=case.geometry, precision=asked)


def _sharded(arrays: list[jax.Array | None], g: Geometry, along: str) -> list[jax.Array | None]:
    """Return x, kernel and bias on a mesh of the fewest devices that divide the axis: two or more.

    The axis is the first of the batch, the first spatial one, or the channels of all three arrays.

    Raises:
      ValueError: there is no such axis, there is one device, or no number of devices divides the axis.
    """
    if along == "batch" and not g.batch:
        raise ValueError("`sharding` is 'batch' and x has no batch axis, expected 'spatial' or 'channels'")
    devices = jax.devices()
    if len(devices) < 2:
        more = 'XLA_FLAGS="--xla_force_host_platform_device_count=8" gives a CPU 8 devices'
        raise ValueError(f"`sharding` is {along!r} on one device, expected two or more: {more}")
    axis = {"batch": 0, "spatial": len(g.batch), "channels": len(g.x_shape) - 1}[along]
    size = g.x_shape[axis]
    number = next((n for n in range(2, len(devices) + 1) if size % n == 0), None)
    if number is None:
        expected = f"expected one that a number of devices from 2 to {len(devices)} divides"
        raise ValueError(f"`sharding` is {along!r}, an axis of {size}, {expected}")
    mesh = jax.sharding.Mesh(np.array(devices[:number]), ("shards",))

    def place(array: jax.Array | None, axis: int | None) -> jax.Array | None:
        if array is None:
            return None
        parts = [] if axis is None else [None] * axis + ["shards"]
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts)))

    x, kernel, bias = arrays
    last = along == "channels"
    return [place(x, axis), place(kernel, g.rank + 1 if last else None), place(bias, 0 if last else None)]


def _on(compute: Compute, precision: str, working: np.dtype) -> tuple[Compute, lax.Precision]:
    """Return compute, on the platform that the value emulates if it does, and the precision to call it with."""
    if precision not in KNOBS["precision"].emulated:
        return compute, lax.Precision(precision)
    emulated.check(precision, working)
    there = KNOBS["precision"].emulated[precision]
    return emulated.On(there.platform, compute), lax.Precision(there.value)


def _coarsest(compute: Compute, case: Case, dtype: str, precision: str) -> emulated.Parts | None:
    """Return the coarsest rounding of operands on the platform that the value emulates; None if nothing is rounded."""
    working = case.dtype if dtype == "same" else DTYPES[dtype]
    there, asked = _on(compute, precision, working)
    if not isinstance(there, emulated.On) or 0 in case.geometry.output_shape:
        return None
    given = (case.x, case.kernel, case.bias)
    with jax.enable_x64(True) if working.name == "float64" else contextlib.nullcontext():
        shapes = [None if a is None else jax.ShapeDtypeStruct(a.shape, working) for a in given]
        return there.coarsest(*shapes, case.geometry, asked)


@functools.partial(jax.jit, static_argnames=("compute", "geometry", "precision"))
def _call(*arrays, compute, geometry, precision):
    return compute(*arrays, geometry, precision)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """Maps x, kernel, bias and dy to the gradient by x. As a constant, dy would be folded into the program."""

    compute: Compute

    def __call__(self, x, kernel, bias, dy, geometry, precision):
        y, pullback = jax.vjp(lambda x: self.compute(x, kernel, bias, geometry, precision), x)
        return pullback(dy.astype(y.dtype))[0]


def grouped(x, kernel, bias, geometry, precision):
    """Call `lax.conv_general_dilated` in the arrays' own dtype as `flax.nnx.Conv` does, and add the bias after it."""
    return lax_grouped(x, kernel, bias, geometry, (precision, precision))


def unfold_matmul(x, kernel, bias, geometry, precision):
    """Loop over channels: windows times weights, as `torch.unfold_matmul` does; the bias is added after."""
    windows = jaxdw.unfold(x, geometry.kernel_size, **options(geometry))
    windows = windows.reshape(math.prod(geometry.batch), -1, geometry.taps, geometry.channels)
    weights = kernel.reshape(geometry.taps, geometry.channels, geometry.multiplier)

    def channel(operands):
        columns, weight = operands
        return jnp.matmul(weight, columns, precision=precision)

    y = lax.map(channel, (windows.transpose(3, 0, 2, 1), weights.transpose(1, 2, 0)))  # (C, N, M, L)
    y = y.transpose(1, 3, 0, 2).reshape(geometry.output_shape)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def windows(x, kernel, bias, geometry, precision):
    """Convolve windows as they are: side by side as an image, where the sum starts from the bias, as `taps` does."""
    if bias is None or not bias_comes_first(geometry):
        return jaxdw.windowed_conv(lambda each: each, x, kernel, bias, **options(geometry))
    unfolded = jaxdw.unfold(x, geometry.kernel_size, **options(geometry))
    image = side_by_side(unfolded, geometry)
    return jaxdw.depthwise_conv(
        image, kernel, bias, strides=geometry.kernel_size, padding="VALID", method="taps", precision=precision
    )


def side_by_side(unfolded, geometry):
    """Return windows of one or two axes `(*batch, *output_spatial, *kernel_size, C)` as an image of one axis less."""
    at = len(geometry.batch)
    image = unfolded.swapaxes(at + 1, at + 2) if geometry.rank == 2 else unfolded
    sizes = (n * k for n, k in zip(geometry.output_spatial, geometry.kernel_size))
    return image.reshape(*geometry.batch, *sizes, geometry.channels)


def method(name):
    """Return jaxdw's method of that name as a function of arrays, geometry and precision."""

    def compute(x, kernel, bias, geometry, precision):
        return jaxdw.depthwise_conv(x, kernel, bias, method=name, precision=precision, **options(geometry))

    return compute


def transpose(x, kernel, bias, geometry, precision):
    """Call `jaxdw.depthwise_conv_transpose` with the flipped kernel; outputs between strides are dropped."""
    g = geometry
    if g.padding_mode != "zeros":
        x, g = pad(x, g), padded_geometry(g)
    first = len(g.batch)
    y = jaxdw.depthwise_conv_transpose(
        x,
        jnp.flip(kernel, tuple(range(g.rank))),
        bias,
        strides=g.input_dilation,
        padding=[(span - 1 - low, span - 1 - high) for span, (low, high) in zip(g.spans, g.padding)],
        kernel_dilation=g.kernel_dilation,
        precision=precision,
        method="taps",
    )
    return y[(slice(None),) * first + tuple(slice(None, None, step) for step in g.strides)]


def _algorithm(
    name: str,
    compute: Compute,
    roundings: int,
    family: str,
    code: str,
    *,
    tried: bool = True,
    window_copies: int = 0,
) -> Algorithm:
    def arithmetic(case: Case, *, dtype: str, precision: str, **exact_settings: str) -> Arithmetic:
        own = declared(
            case,
            dtype,
            flushes_subnormals=True,
            output_roundings=roundings if case.bias is not None else 1,
        )
        parts = _coarsest(compute, case, dtype, precision)
        # three parts of bfloat16 have the digits of float32: that is no lower precision
        return own if parts is None or parts.number < 3 else dataclasses.replace(own, input=BFLOAT16, passes=6)

    def input_bits(case: Case, *, dtype: str, precision: str, **exact_settings: str) -> int | None:
        parts = _coarsest(compute, case, dtype, precision)
        return None if parts is None else parts.bits

    return Algorithm(
        functools.partial(run, name, compute),
        arithmetic,
        family,
        code,
        functools.partial(seconds, name, compute),
        functools.partial(input_gradient, compute),
        input_bits,
        tried,
        window_copies,
    )


def _of_jaxdw(name: str, roundings: int, family: str = "taps", **options: Any) -> Algorithm:
    code = f'jaxdw.depthwise_conv(x, kernel, bias, ..., method="{name}")'
    return _algorithm(f"jax.{name}", method(name), roundings, family, code, **options)


def _by_fourier() -> Algorithm:
    """Return the method "fft". Its error does not follow the terms of an element alone."""
    made = _of_jaxdw("fft", 1, "Fourier transforms", tried=False)

    def arithmetic(case: Case, *, dtype: str, sharding: str, **others: str) -> Arithmetic:
        own = made.arithmetic(case, dtype=dtype, sharding=sharding, **others)
        working = case if dtype == "same" else case.replace(**_in_dtype(case, DTYPES[dtype]))
        if 0 in case.geometry.x_shape + case.geometry.output_shape:
            return own
        return dataclasses.replace(
            own, normwise=fourier.normwise(working, own.accumulator, in_parts=sharding == "spatial")
        )

    return dataclasses.replace(made, arithmetic=arithmetic)


def _in_dtype(case: Case, dtype: np.dtype) -> dict[str, np.ndarray | None]:
    return {name: None if (a := getattr(case, name)) is None else a.astype(dtype) for name in ("x", "kernel", "bias")}


ALGORITHMS = {
    "grouped": _algorithm(
        "jax.grouped",
        grouped,
        2,
        "convolution",
        "lax.conv_general_dilated(x, kernel, ..., feature_group_count=C)",
    ),
    "patches": _of_jaxdw("patches", 1, "windows", window_copies=2),
    "unfold_matmul": _algorithm(
        "jax.unfold_matmul",
        unfold_matmul,
        2,
        "channel loop",
        "jaxdw.unfold and jnp.matmul, channel by channel",
        window_copies=2,
    ),
    "taps": _of_jaxdw("taps", 1),
    "rows": _of_jaxdw("rows", 2),
    "transpose": _algorithm(
        "jax.transpose",
        transpose,
        2,
        "transposed convolution",
        "jaxdw.depthwise_conv_transpose(x, kernel[::-1, ::-1], bias, ...)",
    ),
    "windows": _algorithm(
        "jax.windows",
        windows,
        2,
        "convolution of windows",
        "jaxdw.windowed_conv(fn, x, kernel, bias, ...)",
        window_copies=2,
    ),
    "pallas": _of_jaxdw("pallas", 1, tried=False),
    "fft": _by_fourier(),
}


def user_algorithm(function: user.UserFunction) -> Algorithm:
    """Return the algorithm of a user's function or Flax module, which is given arrays."""
    made = _algorithm(function.spelled, user_compute(function), 2, function.name, function.name)
    return dataclasses.replace(made, function=function)


def user_compute(function: user.UserFunction) -> Compute:
    """Return a user's function or Flax module as a function of arrays, geometry and precision."""

    def compute(x, kernel, bias, geometry, precision):
        del precision  # the function's own business
        flat = dataclasses.replace(geometry, batch=(math.prod(geometry.batch),))
        with printing_to_stderr():
            y = function.call(ARRAYS, x.reshape(flat.x_shape), kernel, bias, flat)
        return y.reshape(geometry.output_shape)

    return compute


def _layer(layer: Any, g: Geometry) -> Compute:
    """Return a function that runs a Flax module with other weights: the parameters of the shapes of kernel and bias.

    A bias that the case has not is zero.
    """
    is_nnx = not hasattr(layer, "apply")
    if is_nnx:
        from flax import nnx

        graph, state, rest = nnx.split(layer, nnx.Param, ...)
    else:
        state = layer.init(jax.random.key(0), jnp.zeros(g.x_shape))
    leaves, tree = jax.tree.flatten(state)
    shapes = [tuple(leaf.shape) for leaf in leaves]
    kernels = [at for at, shape in enumerate(shapes) if shape == g.kernel_shape] or [
        at
        for at, shape in enumerate(shapes)
        if len(shape) > 1 and shape[-1] == g.features and math.prod(shape) == math.prod(g.kernel_shape)
    ]
    biases = [at for at, shape in enumerate(shapes) if shape == (g.features,)]
    if len(kernels) != 1 or len(biases) > 1 or len(shapes) > len(kernels) + len(biases):
        raise ImplementationError(
            f"{type(layer).__name__} has parameters of shapes {shapes}, expected one kernel {g.kernel_shape}, and a "
            "bias at most"
        )

    def run_layer(x, kernel, bias=None):
        if bias is not None and not biases:
            raise ArgumentError(f"the case has a bias, and {type(layer).__name__} has none")
        given = {kernels[0]: kernel.reshape(shapes[kernels[0]])}
        given |= {at: jnp.zeros(g.features, x.dtype) if bias is None else bias for at in biases}
        new = jax.tree.unflatten(tree, [given[at] for at in range(len(leaves))])
        return nnx.merge(graph, new, rest)(x) if is_nnx else layer.apply(new, x)

    return run_layer


def _keys() -> dict[str, Any]:
    """Return the random numbers that the class of an NNX module asks for."""
    from flax import nnx

    return {"rngs": nnx.Rngs(0)}


def _program(
    call: Callable[..., tuple[jax.Array, ...]], *, differentiate: bool, form: str, device: str, jit: bool
) -> user.Program:
    """Return the program of a user's function of JAX arrays: `user.Program`. They have no other form in memory."""
    del form

    def pull_back(dy, *arrays):
        def split(*arrays):
            y, *others = call(*arrays)
            return y, others

        y, pullback, others = jax.vjp(split, *arrays, has_aux=True)
        return (y, *others), pullback(dy.astype(y.dtype))

    chosen = pull_back if differentiate else call
    compiled = jax.jit(chosen) if jit else chosen

    def program(given: Sequence[np.ndarray], dy: np.ndarray | None) -> user.Results:
        wide = any(each.dtype.name == "float64" for each in given)
        place = jax.default_device(jax.devices(device)[0]) if device else contextlib.nullcontext()
        with jax.enable_x64(True) if wide else contextlib.nullcontext(), place, jax.disable_jit(not jit):
            arrays = list(map(jnp.asarray, given))
            if dy is None:
                outputs, gradients = compiled(*arrays), ()
            else:
                outputs, gradients = compiled(jnp.asarray(dy), *arrays)
            return user.Results(list(map(np.asarray, outputs)), list(map(np.asarray, gradients)), list(given))

    return program


ARRAYS = user.Arrays("jax", jax.Array, "channels_last", jnp.moveaxis, pad, _layer, _program, jnp.moveaxis, _keys)


def environment() -> dict[str, str]:
    """Return what may change JAX's bits here."""
    return {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "jaxdw": jaxdw.__version__,
        "jaxdw on CPU": native.status(),
        "jax backend": jax.default_backend(),
        "jax devices": ", ".join(str(d) for d in jax.devices()),
        "jax default matmul precision": str(jax.config.jax_default_matmul_precision),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
