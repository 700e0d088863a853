"""jaxdw and its peers in JAX: `lax.conv_general_dilated`, `flax.nnx.Conv`, `lax.conv_general_dilated_patches`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxdw
from bridge.bench.problems import EPSILON, NORM_EPSILON, RATE, Problem, Way
from bridge.bench.reference import Arrays
from bridge.bench.special_layers import SpecialLayer
from bridge.bench.suites import DepthwiseLayer
from bridge.weights import to_flax, to_torch
from jaxdw.auto import choose
from jaxdw.models._mobilenet_v2 import ORIGINALS, mobilenet_v2
from jaxdw.models.blocks import ConvNormAct, relu6

#: The rules that convert PyTorch's weights to Flax's.
NETWORK = "torchvision.mobilenet_v2"

#: A convolution of x and w.
Convolution = Callable[[jax.Array, jax.Array], jax.Array]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_GRADIENTS = ("y", "dx", "dw")


def convolution(layer: DepthwiseLayer, method: str = "auto") -> Convolution:
    """Return jaxdw's convolution."""
    return lambda x, w: jaxdw.depthwise_conv(x, w, strides=layer.stride, padding=layer.padding, method=method)


def windowed(layer: DepthwiseLayer) -> Convolution:
    """Return jaxdw's convolution with a function of every window."""
    return lambda x, w: jaxdw.windowed_conv(signed_square, x, w, strides=layer.stride, padding=layer.padding)


def signed_square(values: jax.Array) -> jax.Array:
    """Return v |v|, the function of the suite "windows"."""
    return values * jnp.abs(values)


def with_gradients(compute: Convolution) -> Callable[..., tuple[jax.Array, ...]]:
    """Return the function that computes y, dx and dw from x, w and dy."""

    def all_three(x, w, dy):
        y, back = jax.vjp(compute, x, w)
        return y, *back(dy)

    return all_three


def grouped(layer: DepthwiseLayer, precision: lax.PrecisionLike = None) -> Convolution:
    """Return `lax.conv_general_dilated` with one group per channel."""
    return lambda x, w: lax.conv_general_dilated(
        x,
        w,
        (layer.stride, layer.stride),
        [(layer.padding, layer.padding)] * 2,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=layer.channels,
        precision=precision,
    )


def _flax(layer: DepthwiseLayer) -> Convolution:
    conv = nnx.eval_shape(
        lambda: nnx.Conv(
            layer.channels,
            layer.channels,
            (layer.kernel, layer.kernel),
            layer.stride,
            padding=layer.padding,
            feature_group_count=layer.channels,
            use_bias=False,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(conv)
    return lambda x, w: nnx.merge(graph, jax.tree.map(lambda _: w, state))(x)


def _patches(
    layer: DepthwiseLayer, function: Callable[[jax.Array], jax.Array] = lambda windows: windows
) -> Convolution:
    def compute(x, w):
        windows = lax.conv_general_dilated_patches(
            x,
            (layer.kernel, layer.kernel),
            (layer.stride, layer.stride),
            [(layer.padding, layer.padding)] * 2,
            dimension_numbers=_DIMENSIONS,
        )
        windows = function(windows.reshape(*windows.shape[:-1], layer.channels, layer.kernel**2))
        return jnp.einsum("nhwct,tc->nhwc", windows, w.reshape(-1, layer.channels))

    return compute


def _block(layer: DepthwiseLayer, method: str) -> Callable[..., jax.Array]:
    """Return `ConvNormAct` of `jaxdw.models` in eval mode, as a function of its parameters and statistics by name."""
    conventions = dataclasses.replace(ORIGINALS["torchvision"], method=method, bn_epsilon=EPSILON)
    unit = nnx.eval_shape(
        lambda: ConvNormAct(
            layer.channels,
            layer.channels,
            conventions,
            kernel=layer.kernel,
            stride=layer.stride,
            depthwise=True,
            activation=relu6,
            rngs=nnx.Rngs(0),
        )
    )
    unit.eval()
    graph, state = nnx.split(unit)

    def compute(x, w, **parameters):
        given = {"kernel": w, **parameters}
        filled = [(path, variable.replace(given[path[-1]])) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(filled))(x)

    return compute


def _convnext(problem: Problem, name: str, method: str) -> Way:
    """Return the way of a block of ConvNeXt and its gradients by x and every parameter."""
    assert problem.layer is not None
    padding = problem.layer.padding

    def compute(x, w, bias, scale, shift, w1, b1, w2, b2, gamma):
        scale, shift, b1, b2, gamma = (each[None, None, None] for each in (scale, shift, b1, b2, gamma))
        y = jaxdw.depthwise_conv(x, w, bias, padding=padding, method=method)
        distance = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.square(distance).mean(axis=-1, keepdims=True)
        y = distance * lax.rsqrt(variance + NORM_EPSILON) * scale + shift
        wide = jax.nn.gelu(jnp.tensordot(y, w1, 1) + b1, approximate=False)
        return x + gamma * (jnp.tensordot(wide, w2, 1) + b2)

    def all_gradients(dy, **arrays):
        y, back = jax.vjp(lambda arrays: compute(**arrays), arrays)
        return {"y": y} | {f"d{name}": gradient for name, gradient in back(dy)[0].items()}

    program = jax.jit(all_gradients)

    def start(arrays: Arrays) -> Callable[[], Any]:
        placed = {key: jnp.array(array, copy=True) for key, array in arrays.items()}
        return lambda: jax.block_until_ready(program(**placed))

    return Way(name, start, lambda result: {key: np.asarray(array) for key, array in result.items()})


def _way(name: str, program: Callable[..., Any], results: tuple[str, ...]) -> Way:
    """Return the way of a compiled function of a problem's arrays, given by name; its results are named `results`."""

    def start(arrays: Arrays) -> Callable[[], Any]:
        placed = {key: jnp.array(array, copy=True) for key, array in arrays.items()}
        return lambda: _waited(program(**placed))

    def fetch(result: Any) -> dict[str, np.ndarray]:
        return dict(zip(results, map(np.asarray, jax.tree.leaves(result)), strict=True))

    return Way(name, start, fetch)


def _waited(result: Any) -> Any:
    """Wait for a result. `jax.block_until_ready` takes some microseconds more, which would show on small layers."""
    for array in result if isinstance(result, tuple) else (result,):
        array.block_until_ready()
    return result


def _layer_way(make: Callable[[DepthwiseLayer], Callable[..., Any]]) -> Callable[[Problem, str], Way]:
    return lambda problem, name: _way(name, _program(problem, make), _results(problem))


def method_way(problem: Problem, method: str) -> Way:
    """Return jaxdw's way by one of its methods, for a problem of "layers" or "gradients"."""
    return _layer_way(functools.partial(convolution, method=method))(problem, method)


def auto_method(problem: Problem) -> str:
    """Return the method that "auto" stands for, for a problem of "layers" or "gradients"."""
    assert problem.layer is not None
    (batch, *_) = problem.inputs[0]["x"].shape
    return choose(problem.layer.geometry(batch))


def way_and_memory(problem: Problem) -> tuple[Way, dict[str, int]]:
    """Return jaxdw's way for a problem of "layers" or "gradients", and the bytes that its program needs."""
    program = _program(problem, convolution).lower(**problem.inputs[0]).compile()
    memory = program.memory_analysis()
    needed = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    return _way("jaxdw", program, _results(problem)), needed


def _program(problem: Problem, make: Callable[[DepthwiseLayer], Callable[..., Any]]) -> Any:
    assert problem.layer is not None
    compute = make(problem.layer)
    return jax.jit(with_gradients(compute) if problem.suite == "gradients" else compute)


def _results(problem: Problem) -> tuple[str, ...]:
    return _GRADIENTS if problem.suite == "gradients" else ("y",)


def _special_way(method: str) -> Callable[[Problem, str], Way]:
    """Return the way of a special layer by jaxdw's method, or by `lax.conv_general_dilated` for "lax"."""

    def of(problem: Problem, name: str) -> Way:
        layer = problem.special
        assert layer is not None
        compute = _special_lax(layer) if method == "lax" else _special(layer, method)
        return _way(name, jax.jit(compute), layer.results)

    return of


def _special(layer: SpecialLayer, method: str) -> Callable[..., Any]:
    if layer.kind == "transposed":
        return lambda x, w: jaxdw.depthwise_conv_transpose(
            x, w, strides=layer.stride, padding=layer.padding, output_padding=layer.output_padding, method=method
        )
    if layer.kind == "image":
        return lambda x, w: jaxdw.depthwise_conv(x, w, padding=layer.kernel // 2, method=method)
    if layer.kind == "step":
        return lambda x, w, b, state: jaxdw.causal_conv1d_step(x, state, w, b, activation="silu", method=method)
    activation = "silu" if layer.kind == "causal" else None
    return lambda x, w, b=None: jaxdw.causal_conv1d(x, w, b, activation=activation, method=method)


def _special_lax(layer: SpecialLayer) -> Callable[..., Any]:
    channels, taps = layer.channels, layer.kernel
    grouped = functools.partial(lax.conv_general_dilated, feature_group_count=channels)
    if layer.kind == "transposed":
        low = taps - 1 - layer.padding
        pads = [(low, low + layer.output_padding)] * 2
        dilation = (layer.stride,) * 2
        return lambda x, w: grouped(
            x, w[::-1, ::-1], (1, 1), pads, lhs_dilation=dilation, dimension_numbers=_DIMENSIONS
        )

    def finished(y, b):
        return jax.nn.silu(y + jnp.broadcast_to(b, y.shape))

    along = functools.partial(grouped, window_strides=(1,), dimension_numbers=("NWC", "WIO", "NWC"))
    if layer.kind == "step":

        def step(x, w, b, state):
            inputs = jnp.concatenate([state, x[:, None]], axis=1)
            return finished(along(inputs, w, padding="VALID")[:, 0], b), inputs[:, 1:]

        return step
    return lambda x, w, b: finished(along(x, w, padding=[(taps - 1, 0)]), b)


def _network_way(method: str) -> Callable[[Problem, str], Way]:
    """Return MobileNetV2 of `jaxdw.models`; if there are labels, one step of training with a donated state."""

    def of(problem: Problem, name: str) -> Way:
        classes, training = len(problem.weights["classifier.1.bias"]), "labels" in problem.inputs[0]
        model = nnx.eval_shape(
            lambda: mobilenet_v2(classes, width=problem.width, dropout=0.0, method=method, rngs=nnx.Rngs(0))
        )
        nnx.update(model, to_flax(problem.weights, model, NETWORK).weights)
        if not training:
            model.eval()
            graph, state = nnx.split(model)
            infer = jax.jit(lambda state, images: nnx.merge(graph, state)(images))

            def start(arrays: Arrays) -> Callable[[], Any]:
                images = jnp.array(arrays["images"], copy=True)
                return lambda: infer(state, images).block_until_ready()

            return Way(name, start, lambda logits: {"logits": np.asarray(logits)})

        graph, *drawn = nnx.split(model, nnx.Param, ...)
        step = jax.jit(functools.partial(_step, graph), donate_argnums=0)

        def start_training(arrays: Arrays) -> Callable[[], Any]:
            images, labels = (jnp.array(arrays[key], copy=True) for key in ("images", "labels"))
            state = jax.tree.map(lambda array: jnp.array(array, copy=True), drawn)

            def run() -> Any:
                nonlocal state
                loss, state = step(state, images, labels)
                return jax.block_until_ready((loss, state))

            return run

        def fetch(result: Any) -> dict[str, np.ndarray]:
            loss, state = result
            return {"loss": np.asarray(loss), **to_torch(nnx.merge(graph, *state), NETWORK).weights}

        return Way(name, start_training, fetch)

    return of


def _step(graph: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    """Return the loss, and the parameters and statistics after a step of SGD."""
    parameters, statistics = state

    def loss_of(parameters):
        model = nnx.merge(graph, parameters, statistics, copy=True)
        of_each = jax.nn.log_softmax(model(images))
        loss = -jnp.take_along_axis(of_each, labels[:, None], axis=-1).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    return loss, [jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients), statistics]


def ways(problem: Problem, names: Sequence[str]) -> list[Way]:
    """Return the ways of these names that the suite has."""
    return [_WAYS[problem.suite][name](problem, name) for name in names if name in _WAYS[problem.suite]]


def copy_way(elements: int, *, waits: bool = True) -> Way:
    """Return x + 1 for float32 x: the nearest to a copy that XLA does not leave out."""
    program = jax.jit(lambda x: x + 1)

    def start(arrays: Arrays) -> Callable[[], Any]:
        source = jnp.full((elements,), arrays["value"])
        return (lambda: program(source).block_until_ready()) if waits else (lambda: program(source))

    return Way("jax", start, wait=jax.block_until_ready)


_Makers = Mapping[str, Callable[[Problem, str], Way]]


_CONVOLUTIONS: _Makers = {
    "jaxdw": _layer_way(convolution),
    "lax.grouped": _layer_way(grouped),
    "nnx.Conv": _layer_way(_flax),
    "lax.patches": _layer_way(_patches),
}

_WAYS: Mapping[str, _Makers] = {
    "layers": _CONVOLUTIONS,
    "gradients": _CONVOLUTIONS,
    "windows": {
        "jaxdw": _layer_way(windowed),
        "lax.patches": _layer_way(lambda layer: _patches(layer, signed_square)),
    },
    "blocks": {
        "jaxdw": _layer_way(lambda layer: _block(layer, "auto")),
        "lax.grouped": _layer_way(lambda layer: _block(layer, "grouped")),
    },
    "convnext": {
        "jaxdw": functools.partial(_convnext, method="auto"),
        "lax.grouped": functools.partial(_convnext, method="grouped"),
    },
    "models": {"jaxdw": _network_way("auto"), "lax.grouped": _network_way("grouped")},
    "transposed": {"jaxdw": _special_way("auto"), "lax.grouped": _special_way("lax")},
    "causal": {"jaxdw": _special_way("auto"), "lax.grouped": _special_way("lax")},
    "large": {"jaxdw": _special_way("auto"), "fft": _special_way("fft")},
}
