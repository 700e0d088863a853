"""The common part of the Flax modules: the checks of their fields, the kernel's shape, and the convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen
from jax import lax

from jaxdw import _arrays, causal
from jaxdw import epilogue as epilogues
from jaxdw.call import Call
from jaxdw.conv import depthwise_conv
from jaxdw.conv_transpose import depthwise_conv_transpose, padding_to_size
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Padding, spatial_tuple
from jaxdw.methods import check_method
from jaxdw.windows import contract, unfold, windowed_conv

#: Methods that accept a `window_fn`; the others never form windows.
WITH_WINDOWS = ("auto", "patches")


#: Converts inputs, kernel and bias to one dtype.
Promote = Callable[..., Sequence[jax.Array | None]]


class BaseLayer(Protocol):
    """The fields that all modules have."""

    features: int
    kernel_size: Any
    channel_multiplier: int
    mask: jax.Array | np.ndarray | None
    method: str


class Layer(BaseLayer, Protocol):
    """The fields of the modules `DepthwiseConv`."""

    strides: int | Sequence[int] | None
    padding: Padding
    input_dilation: int | Sequence[int] | None
    kernel_dilation: int | Sequence[int] | None
    precision: lax.PrecisionLike
    preferred_element_type: Any
    window_fn: Callable[[jax.Array], jax.Array] | None
    depthwise_conv: Callable[..., jax.Array]


class TransposeLayer(BaseLayer, Protocol):
    """The fields of the modules `DepthwiseConvTranspose`."""

    strides: int | Sequence[int] | None
    padding: Padding
    output_padding: int | Sequence[int]
    kernel_dilation: int | Sequence[int] | None
    transpose_kernel: bool
    precision: lax.PrecisionLike
    preferred_element_type: Any


class CausalLayer(BaseLayer, Protocol):
    """The fields of the modules `CausalConv1d`."""

    activation: str | None


def kernel_shape(layer: BaseLayer, kernel_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Check the fields that all layers have, and return `(*kernel_size, 1, C*M)`."""
    for name in ("features", "channel_multiplier"):
        value = getattr(layer, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, expected a positive int")
    kernel_size = kernel_size or spatial_tuple("kernel_size", layer.kernel_size)
    shape = (*kernel_size, 1, layer.features * layer.channel_multiplier)
    if layer.mask is not None and getattr(layer.mask, "shape", None) != shape:
        given = f"has shape {layer.mask.shape}" if hasattr(layer.mask, "shape") else f"is a {type(layer.mask).__name__}"
        raise ValueError(f"`mask` {given}, expected an array of shape {shape}, as the kernel")
    check_method(layer.method)
    return shape


def checked_kernel_shape(layer: Layer) -> tuple[int, ...]:
    """Check every field that can be checked without an input, and return `(*kernel_size, 1, C*M)`."""
    shape = kernel_shape(layer)
    if not callable(layer.depthwise_conv):
        raise TypeError(
            f"`depthwise_conv` is {layer.depthwise_conv!r}, expected a function with the arguments of "
            "`jaxdw.depthwise_conv`"
        )
    if layer.window_fn is not None:
        if layer.depthwise_conv is not depthwise_conv:
            raise ValueError(
                f"`depthwise_conv` is {layer.depthwise_conv!r} with a `window_fn`, expected `jaxdw.depthwise_conv`: "
                "windows are contracted with the kernel, and no convolution is called"
            )
        if not callable(layer.window_fn):
            raise TypeError(f"`window_fn` is {layer.window_fn!r}, expected a function of windows or None")
        if layer.method not in WITH_WINDOWS:
            raise ValueError(
                f"`method` is {layer.method!r} with a `window_fn`, expected one of {', '.join(WITH_WINDOWS)}: "
                f"{layer.method!r} never forms the windows that the function works on"
            )
    return shape


def convolve(
    layer: Layer,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    promote: Promote,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Return the layer's output for its parameters."""
    inputs, kernel, bias = _promoted(layer, inputs, kernel, bias, promote)
    geometry: dict[str, Any] = {
        "strides": layer.strides,
        "padding": layer.padding,
        "input_dilation": layer.input_dilation,
        "kernel_dilation": layer.kernel_dilation,
    }
    arithmetic: dict[str, Any] = {
        "precision": layer.precision,
        "preferred_element_type": layer.preferred_element_type,
    }
    if layer.window_fn is None:
        if epilogue is not None:  # a function of the user's need not know it
            arithmetic["epilogue"] = epilogue
        return layer.depthwise_conv(inputs, kernel, bias, method=layer.method, **geometry, **arithmetic)
    if epilogue is not None:  # on the sums that the windows give
        call = Call.of(inputs, kernel, bias, **geometry, **arithmetic)
        epilogue = epilogues.checked(epilogue, call)
        if epilogue is not None:
            arithmetic["preferred_element_type"] = call.wide
            y = _of_windows(layer, inputs, kernel, bias, geometry, arithmetic)
            return epilogue.apply(y, call.geometry.rank, call.result)
    return _of_windows(layer, inputs, kernel, bias, geometry, arithmetic)


def transpose(
    layer: TransposeLayer,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    promote: Promote,
    epilogue: Epilogue | None,
    output_size: Sequence[int] | None,
) -> jax.Array:
    """Return the output of a transposed layer for its parameters, of `output_size` where it is given."""
    inputs, kernel, bias = _promoted(layer, inputs, kernel, bias, promote)
    output_padding = layer.output_padding
    if output_size is not None:
        output_padding = padding_to_size(
            output_size, inputs.shape, kernel.shape[:-2], layer.strides, layer.padding, layer.kernel_dilation
        )
    return depthwise_conv_transpose(
        inputs,
        kernel,
        bias,
        strides=layer.strides,
        padding=layer.padding,
        output_padding=output_padding,
        kernel_dilation=layer.kernel_dilation,
        transpose_kernel=layer.transpose_kernel,
        method=layer.method,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        epilogue=epilogue,
    )


def causal_conv(
    layer: CausalLayer,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    promote: Promote,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
    return_state: bool,
) -> Any:
    """Return what `jaxdw.causal_conv1d` returns for the layer's parameters."""
    inputs, kernel, bias = _promoted(layer, inputs, kernel, bias, promote)
    return causal.causal_conv1d(
        inputs,
        kernel,
        bias,
        state=None if state is None else _arrays.as_array("state", state).astype(inputs.dtype),
        segment_ids=segment_ids,
        activation=layer.activation,
        return_state=return_state,
        method=layer.method,
    )


def causal_step(
    layer: CausalLayer,
    inputs: jax.Array,
    state: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    promote: Promote,
) -> tuple[jax.Array, jax.Array]:
    """Return what `jaxdw.causal_conv1d_step` returns for the layer's parameters."""
    inputs, kernel, bias = _promoted(layer, inputs, kernel, bias, promote)
    state = _arrays.as_array("state", state).astype(inputs.dtype)
    return causal.causal_conv1d_step(inputs, state, kernel, bias, activation=layer.activation, method=layer.method)


def checked_taps(kernel_size: Any) -> tuple[int]:
    """Return `(K,)` of a kernel along time, given as an int or as a tuple of one int."""
    sizes = spatial_tuple("kernel_size", (kernel_size,) if isinstance(kernel_size, (int, np.integer)) else kernel_size)
    if len(sizes) != 1:
        raise ValueError(f"`kernel_size` is {kernel_size!r}, expected one int: a causal convolution is along time")
    return sizes


def check_activation(activation: Any) -> None:
    if activation is not None:
        _arrays.check_choice("activation", activation, causal.ACTIVATIONS)


def _promoted(
    layer: BaseLayer, inputs: Any, kernel: jax.Array, bias: jax.Array | None, promote: Promote
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the checked inputs, the masked kernel, and the bias, in one dtype."""
    inputs = _arrays.as_array("inputs", inputs)
    if inputs.ndim == 0 or inputs.shape[-1] != layer.features:
        raise ValueError(
            f"`inputs` has shape {inputs.shape}, expected {layer.features} channels (`features`) on the last axis"
        )
    if layer.mask is not None:
        kernel = kernel * layer.mask
    inputs, kernel, bias = promote(inputs, kernel, bias)
    return inputs, kernel, bias


def _of_windows(
    layer: Layer,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: dict[str, Any],
    arithmetic: dict[str, Any],
) -> jax.Array:
    assert layer.window_fn is not None
    # In Linen the function may create and change variables and draw from streams; tracing it twice would disturb them.
    if layer.method == "patches" or isinstance(layer, linen.Module):
        extraction = "patches" if layer.method == "patches" else "slices"
        windows = unfold(inputs, kernel.shape[:-2], method=extraction, **geometry)
        return contract(windowed_conv.applied("window_fn", layer.window_fn, windows), kernel, bias, **arithmetic)
    return windowed_conv.run(Call.of(inputs, kernel, bias, **geometry, **arithmetic), layer.window_fn, "window_fn")
