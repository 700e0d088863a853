"""PyTorch: `F.conv2d`, its windows side by side, and the question's own unfold and multiply."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bridge import torch_windows
from bridge._implementations import user
from bridge._implementations.algorithm import Algorithm, Knob, declared, time_calls
from bridge._implementations.arguments import ArgumentError
from bridge.case import DTYPES, Case
from bridge.errors import ImplementationError
from bridge.numerics import BFLOAT16, TF32, Arithmetic, format_of
from jaxdw import onednn
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry

#: PyTorch 2.9 and newer have a setting per operator for the rounding of float32 operands.
_SAYS_PRECISION = hasattr(torch.backends.mkldnn, "conv")

KNOBS = {
    "compile": Knob("flag", "off", {"off": "no torch.compile", "on": "torch.compile"}, tried=False),
    "deterministic": Knob(
        "flag", "off", {v: f"torch.use_deterministic_algorithms({v == 'on'})" for v in ("off", "on")}
    ),
    "dtype": Knob(
        "precision",
        "same",
        {"same": "compute in the input's own dtype"}
        | {d: f"x.to(torch.{d}), weight.to(torch.{d}), and the result back: y.to(x.dtype)" for d in DTYPES},
    ),
    "fp32_precision": Knob(
        "precision",
        "ieee",
        {
            v: f'torch.backends.mkldnn.conv.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "{v}"'
            for v in (("ieee", "tf32", "bf16") if _SAYS_PRECISION else ("ieee",))
        },
    ),
    "layout": Knob(
        "layout",
        "contiguous",
        {
            "contiguous": "x.contiguous()",
            "channels_last": "x.to(memory_format=torch.channels_last), and the weight",
        },
    ),
    "matmul_precision": Knob(
        "precision",
        "highest",
        {v: f'torch.set_float32_matmul_precision("{v}")' for v in ("highest", "high", "medium")},
    ),
    "mkldnn": Knob("flag", "on", {v: f"torch.backends.mkldnn.enabled = {v == 'on'}" for v in ("on", "off")}),
    "threads": Knob("threads", "all", "torch.set_num_threads({})"),
}

#: The rounding of float32 operands of a matrix product that `matmul_precision` allows.
_MATMUL_INPUTS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_INPUTS = {"tf32": TF32, "bf16": BFLOAT16}

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Geometry], torch.Tensor]


def run(compute: Compute, case: Case, **knobs: str) -> np.ndarray:
    """Return compute(x, weight, bias, geometry)."""
    with _ready(compute, case, **knobs) as (call, _), torch.inference_mode():
        y = call()
        return to_numpy(y.to(getattr(torch, case.dtype.name)).movedim(1, -1)).reshape(case.geometry.output_shape)


def seconds(compute: Compute, case: Case, repetitions: int, **knobs: str) -> list[float]:
    """Return the seconds of each call of compute, with tensors at hand."""
    with _ready(compute, case, **knobs) as (call, _), torch.inference_mode():
        return time_calls(call, repetitions)


def input_gradient(compute: Compute, case: Case, dy: np.ndarray, **knobs: str) -> np.ndarray:
    """Return the gradient of sum(dy y) by x, from autograd."""
    g = case.geometry
    with _ready(compute, case, **knobs) as (call, x):
        x.requires_grad_()
        y = call()
        upstream = to_tensor(np.moveaxis(dy.reshape(math.prod(g.batch), *dy.shape[len(g.batch) :]), -1, 1)).to(y.dtype)
        (dx,) = torch.autograd.grad(y, x, upstream)
    return to_numpy(dx.to(getattr(torch, case.dtype.name)).movedim(1, -1)).reshape(g.x_shape)


@contextlib.contextmanager
def _ready(
    compute: Compute, case: Case, *, compile: str, dtype: str, layout: str, **global_settings: str
) -> Iterator[tuple[Callable[[], torch.Tensor], torch.Tensor]]:
    """Yield a call of compute on tensors in PyTorch's layout and the computation's dtype, under the settings; and x."""
    g = case.geometry
    working = getattr(torch, case.dtype.name if dtype == "same" else dtype)
    flat = case.x.reshape(math.prod(g.batch), *case.x.shape[len(g.batch) :])
    x = to_tensor(np.moveaxis(flat, -1, 1)).to(working)
    weight = to_tensor(np.moveaxis(case.kernel, (-1, -2), (0, 1))).to(working)
    bias = None if case.bias is None else to_tensor(case.bias).to(working)
    if layout == "channels_last":
        if g.rank == 1:
            raise ValueError("`layout` is 'channels_last' in 1-D, expected 'contiguous': PyTorch has no such format")
        form = torch.channels_last if g.rank == 2 else torch.channels_last_3d
        x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    plain: Callable[..., torch.Tensor] = compute
    call = _compiled(compute, g) if compile == "on" else functools.partial(plain, g=g)
    with settings(**global_settings):
        yield lambda: call(x, weight, bias), x


@functools.lru_cache(maxsize=1)
def _compiled(compute: Compute, g: Geometry) -> Callable[..., torch.Tensor]:
    """Return compute for one geometry, for `torch.compile`.

    Dynamo keeps few programs of one piece of code, and runs what is beyond them without compiling: so it keeps one.
    """
    torch.compiler.reset()
    return torch.compile(lambda x, weight, bias: compute(x, weight, bias, g), dynamic=False)


@contextlib.contextmanager
def settings(
    *, deterministic: str, fp32_precision: str, matmul_precision: str, mkldnn: str, threads: str
) -> Iterator[None]:
    """Set PyTorch's global settings for one run, and restore them, after an error too."""
    with contextlib.ExitStack() as stack:
        for get, put, value in (
            (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2 * (deterministic == "on")),
            (lambda: torch.backends.mkldnn.enabled, _enable_mkldnn, mkldnn == "on"),
            (
                torch.get_num_threads,
                torch.set_num_threads,
                torch.get_num_threads() if threads == "all" else int(threads),
            ),
        ):
            stack.enter_context(_setting(get, put, value))
        stack.enter_context(_float32_precision(matmul_precision, fp32_precision))
        yield


@contextlib.contextmanager
def _setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    try:
        if before != value:
            put(value)
        yield
    finally:
        if get() != before:
            put(before)


def _enable_mkldnn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on


@contextlib.contextmanager
def _float32_precision(matmul_precision: str, fp32_precision: str) -> Iterator[None]:
    """Set the rounding of float32 operands. The older setting writes the newer ones too, CUDA's among them."""
    if not _SAYS_PRECISION:
        with _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, matmul_precision):
            yield
        return
    operators = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [operator.fp32_precision for operator in operators]
    matmul = fp32_precision if fp32_precision != "ieee" else _MATMUL_INPUTS[matmul_precision]
    wanted = (fp32_precision, matmul, before[2])
    if [v.replace("none", "ieee") for v in before] == [v.replace("none", "ieee") for v in wanted]:
        yield  # a setting that is inherited ("none") stays so
        return
    for operator in operators:  # else PyTorch may refuse to read the older setting: the two can contradict each other
        operator.fp32_precision = "none"
    older = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(matmul_precision)
        for operator, value in zip(operators, wanted):
            operator.fp32_precision = value
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for operator, value in zip(operators, before):
            operator.fp32_precision = value


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a copy as a contiguous tensor; bfloat16 is copied as bits."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous copy as an array; bfloat16 is copied as bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def padding_for(x: torch.Tensor, g: Geometry) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return x and the padding that is left to PyTorch. Asymmetric padding, and that of an empty x, is done here."""
    if g.symmetric_padding is not None and 0 not in g.spatial:
        return x, g.symmetric_padding
    for axis in range(g.rank):
        source = torch.from_numpy(g.padded_sources(axis).copy())
        inside = source >= 0
        shape = list(x.shape)
        shape[2 + axis] = len(source)
        padded = x.new_zeros(shape)
        padded.movedim(2 + axis, 0)[inside] = x.index_select(2 + axis, source[inside]).movedim(2 + axis, 0)
        x = padded
    return x, (0,) * g.rank


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Call `F.conv1d`, `F.conv2d` or `F.conv3d` with `groups=C`."""
    x, padding = padding_for(x, g)
    function = (F.conv1d, F.conv2d, F.conv3d)[g.rank - 1]
    _check_that_it_returns(x, weight, g.strides, g.kernel_dilation, g.output_spatial)
    return function(x, weight, bias, g.strides, padding, g.kernel_dilation, g.channels)


def _check_that_it_returns(
    x: torch.Tensor, weight: torch.Tensor, strides: Sequence[int], dilation: Sequence[int], outputs: Sequence[int]
) -> None:
    """Raise an error for a depthwise convolution from which PyTorch would not return: `onednn.never_returns`."""
    plain = strides[-1] == 1 and dilation[-1] == 1 and torch.backends.mkldnn.enabled
    if not plain or x.dtype != torch.float16 or x.device.type != "cpu":
        return
    if onednn.never_returns(x.shape[1], weight.shape[-1], outputs[-1]):
        raise ImplementationError(
            f"PyTorch does not return from a depthwise convolution in float16 of {x.shape[1]} channels with "
            f"{weight.shape[-1]} taps along the last axis on this processor (oneDNN with AVX512-FP16); the environment "
            "variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or mkldnn=off, avoids it"
        )


_CONVOLUTIONS = (
    torch.ops.aten.convolution,
    torch.ops.aten.conv1d,
    torch.ops.aten.conv2d,
    torch.ops.aten.conv3d,
)


class _Returns(TorchDispatchMode):
    """Raises an error where a function would call a convolution that does not return."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _CONVOLUTIONS:
            names = [each.name for each in func._schema.arguments]
            given = {each.name: each.default_value for each in func._schema.arguments if each.has_default_value()}
            given |= dict(zip(names, args)) | (kwargs or {})
            x, weight, strides, dilation = (given[name] for name in ("input", "weight", "stride", "dilation"))
            if given["groups"] == x.shape[1] and weight.shape[1] == 1 and not given.get("transposed"):
                span, padding = (weight.shape[-1] - 1) * dilation[-1] + 1, given["padding"]
                ends = {"same": span - 1, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding[-1]
                outputs = (x.shape[-1] + ends - span) // strides[-1] + 1
                _check_that_it_returns(x, weight, strides, dilation, (outputs,))
        return func(*args, **kwargs or {})


def _that_returns(*tensors: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a user's function of these tensors raises where it would not return."""
    half = any(each.dtype == torch.float16 for each in tensors)
    return _Returns() if half and not torch.compiler.is_compiling() else contextlib.nullcontext()


def conv_transpose(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Call `F.conv_transpose1d`, `2d` or `3d` with the flipped kernel: its stride is the input dilation.

    Where it has no arguments for the padding, x is dilated and padded here. Outputs between strides are dropped.
    """
    weight = weight.flip(tuple(range(2, weight.ndim))).reshape(g.channels, g.multiplier, *g.kernel_size)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.rank - 1]
    cut = tuple(span - 1 - low for span, (low, _) in zip(g.spans, g.padding))
    added = tuple(high - low for low, high in g.padding)
    most = map(max, g.input_dilation, g.kernel_dilation)
    plain = g.padding_mode == "zeros" and max(g.strides) == 1 and 0 not in g.spatial
    if plain and min(cut) >= 0 and all(0 <= a < m for a, m in zip(added, most)):
        return function(x, weight, bias, g.input_dilation, cut, added, g.channels, g.kernel_dilation)
    cut = tuple(span - 1 for span in g.spans)
    y = function(_padded(x, g), weight, bias, 1, cut, 0, g.channels, g.kernel_dilation)
    return y[(..., *(slice(None, None, step) for step in g.strides))]


def unfold(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Return the windows as columns `(N, C, taps, L)`, by `F.unfold`; in 3-D, which it lacks, by `Tensor.unfold`."""
    n, channels = x.shape[:2]
    x, padding = padding_for(x, g)
    if g.rank == 3:
        x = F.pad(x, [amount for low in reversed(padding) for amount in (low, low)])
        for axis, (span, dilation, stride) in enumerate(zip(g.spans, g.kernel_dilation, g.strides)):
            x = x.unfold(2 + axis, span, stride)[..., ::dilation]
        return x.reshape(n, channels, -1, g.taps).transpose(2, 3)
    unit = (1,) * (2 - g.rank)
    image = x.reshape(n, channels, *unit, *x.shape[2:])
    columns = F.unfold(
        image,
        unit + g.kernel_size,
        dilation=unit + g.kernel_dilation,
        padding=(0,) * len(unit) + padding,
        stride=unit + g.strides,
    )
    return columns.reshape(n, channels, g.taps, -1)


def unfold_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Loop over channels: unfold, multiply the columns by the weights, fold."""
    outputs = []
    for channel in range(g.channels):
        features = slice(channel * g.multiplier, (channel + 1) * g.multiplier)
        columns = unfold(x[:, channel : channel + 1], g)[:, 0]
        y = torch.matmul(weight[features].reshape(g.multiplier, g.taps), columns)
        if bias is not None:
            y = y + bias[features, None]
        outputs.append(y)
    return _fold(torch.cat(outputs, dim=1), g)


def unfold_einsum(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Unfold all channels at once, then add over the taps by one einsum."""
    y = torch.einsum("nctl,cmt->ncml", unfold(x, g), weight.reshape(g.channels, g.multiplier, g.taps))
    y = y.reshape(len(x), g.features, -1)
    return _fold(y if bias is None else y + bias[:, None], g)


def windows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Form the windows, and call `F.conv` on them side by side: `bridge.torch_windows`."""
    x, padding = padding_for(x, g)
    function = (torch_windows.windowed_conv1d, torch_windows.windowed_conv2d, torch_windows.windowed_conv3d)[g.rank - 1]
    return function(x, weight, bias, g.strides, padding, g.kernel_dilation)


def taps(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Multiply and add shifted inputs in the order of `jax.taps`, from the same start, in operations of their own."""
    return _add_taps(lambda y, window, w: y + window * w, x, weight, bias, g)


def addcmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """Add products of shifted inputs as `taps` does, but in one operation for each tap, which PyTorch may fuse."""
    return _add_taps(torch.addcmul, x, weight, bias, g)


def _add_taps(
    add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    g: Geometry,
) -> torch.Tensor:
    """Add tap after tap by add(sum, window, weight), from the bias where `jax.taps` starts from it."""
    dtype = x.dtype
    accumulator = torch.float32 if dtype.itemsize == 2 else dtype
    x, padding = padding_for(x, g)
    x = F.pad(x, [amount for low in reversed(padding) for amount in (low, low)]).to(accumulator)
    weights = weight.reshape(g.channels, g.multiplier, g.taps, *(1,) * g.rank).to(accumulator)
    start = 0.0 if bias is None else bias.to(accumulator).reshape(g.channels, g.multiplier, *(1,) * g.rank)
    first = bias is not None and bias_comes_first(g)
    y = x.new_zeros((len(x), g.channels, g.multiplier, *g.output_spatial)) + (start if first else 0.0)
    for number, tap in enumerate(itertools.product(*map(range, g.kernel_size))):
        window = x
        for axis, (t, dilation, stride, out) in enumerate(
            zip(tap, g.kernel_dilation, g.strides, g.output_spatial), start=2
        ):
            window = window[
                (slice(None),) * axis + (slice(t * dilation, t * dilation + (out - 1) * stride + 1, stride),)
            ]
        y = add(y, window.unsqueeze(2), weights[:, :, number])
    return (y if first else y + start).reshape(len(x), g.features, *g.output_spatial).to(dtype)


def _fold(y: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Move columns `(N, C*M, L)` to positions, by `F.fold` with a 1x1 kernel; in 3-D, which it lacks, by a reshape."""
    if g.rank == 2:
        return F.fold(y, g.output_spatial, 1)
    return y.reshape(*y.shape[:2], *g.output_spatial)


def _algorithm(
    compute: Compute, bias_is_rounded_twice: bool, family: str, code: str, *, window_copies: int = 0
) -> Algorithm:
    convolves = "convolution" in family

    def arithmetic(
        case: Case, *, dtype: str, fp32_precision: str, matmul_precision: str, **exact_settings: str
    ) -> Arithmetic:
        base = declared(
            case,
            dtype,
            flushes_subnormals=(case.dtype.name if dtype == "same" else dtype) == "bfloat16",  # as oneDNN does
            output_roundings=2 if bias_is_rounded_twice and case.bias is not None else 1,
        )
        rounds_to = fp32_precision
        if not convolves and rounds_to == "ieee":
            rounds_to = _MATMUL_INPUTS[matmul_precision]
        working = case.dtype.name if dtype == "same" else dtype
        if "transposed" in family and working in ("float16", "bfloat16"):
            narrow = format_of(DTYPES[working])  # PyTorch adds the products of a tap, rounded, to the output in memory
            return dataclasses.replace(base, product=narrow, accumulator=narrow)
        if rounds_to == "ieee" or working != "float32" or "taps" in family:
            return base
        # Inputs that were rounded to float32 before are rounded twice: by at most what truncation does.
        return dataclasses.replace(base, input=_INPUTS[rounds_to], input_truncated=base.input is not None)

    return Algorithm(
        functools.partial(run, compute),
        arithmetic,
        family,
        code,
        functools.partial(seconds, compute),
        functools.partial(input_gradient, compute),
        window_copies=window_copies,
    )


ALGORITHMS = {
    "conv2d": _algorithm(
        conv,
        False,
        "convolution",
        "F.conv2d(x, weight, bias, ..., groups=C)",
    ),
    "conv_transpose2d": _algorithm(
        conv_transpose,
        True,
        "transposed convolution",
        "F.conv_transpose2d(x, weight.flip((2, 3)), bias, ..., groups=C)",
    ),
    "windows": _algorithm(
        windows,
        False,
        "convolution of windows",
        "from bridge.torch_windows import windowed_conv2d; windowed_conv2d(x, weight, bias, ..., window_fn=...)",
        window_copies=2,
    ),
    "unfold_matmul": _algorithm(
        unfold_matmul,
        True,
        "channel loop",
        "F.unfold and torch.matmul, channel by channel",
    ),
    "unfold_einsum": _algorithm(
        unfold_einsum,
        True,
        "windows",
        'torch.einsum("nctl,cmt->ncml", F.unfold(x, ...).reshape(N, C, taps, -1), weight.reshape(C, M, taps))',
        window_copies=2,
    ),
    "taps": _algorithm(
        taps,
        False,
        "taps",
        "y = y + x[..., i:i+H, j:j+W] * weight[:, 0, i, j, None, None], tap by tap",
    ),
    "addcmul": _algorithm(
        addcmul,
        False,
        "fused taps",
        "y = torch.addcmul(y, x[..., i:i+H, j:j+W], weight[:, 0, i, j, None, None]), tap by tap from the bias",
    ),
}


def user_algorithm(function: user.UserFunction) -> Algorithm:
    """Return the algorithm of a user's function or `nn.Module`, which is given tensors."""

    def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
        flat = dataclasses.replace(g, batch=(math.prod(g.batch),))
        with _that_returns(x):
            return function.call(ARRAYS, x, weight, bias, flat)

    made = _algorithm(compute, True, function.name, function.name)
    return dataclasses.replace(made, function=function)


def _padded(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    x, amounts = padding_for(x, g)
    return F.pad(x, [amount for low in reversed(amounts) for amount in (low, low)])


def _layer(layer: torch.nn.Module, g: Geometry) -> Callable[..., torch.Tensor]:
    """Return a function that runs a layer with other weights: the parameters of the shapes of weight and bias.

    A bias that the case has not is zero. A kernel of another shape is taken if it alone has that many elements.
    """
    shape = (g.features, 1, *g.kernel_size)
    named = {name: tuple(each.shape) for name, each in layer.named_parameters()}
    kernels = [name for name, each in named.items() if each == shape] or [
        name for name, each in named.items() if len(each) > 1 and math.prod(each) == math.prod(shape)
    ]
    biases = [name for name, each in named.items() if each == (g.features,)]
    if len(kernels) != 1 or len(biases) > 1 or len(named) > len(kernels) + len(biases):
        raise ImplementationError(
            f"{type(layer).__name__} has parameters of shapes {named}, expected one kernel {shape}, and a bias at most"
        )

    def run_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None and not biases:
            raise ArgumentError(f"the case has a bias, and {type(layer).__name__} has none")
        given = {kernels[0]: weight.reshape(named[kernels[0]])}
        given |= {name: weight.new_zeros(g.features) if bias is None else bias for name in biases}
        return torch.func.functional_call(layer, given, (x,))

    return run_layer


def _program(
    call: Callable[..., tuple[torch.Tensor, ...]], *, differentiate: bool, form: str, device: str, jit: bool
) -> user.Program:
    """Return the program of a user's function of tensors: `user.Program`."""
    del jit
    try:
        place = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"`device` is {device!r}, expected one of PyTorch's: {str(error).splitlines()[0]}") from None

    def program(given: Sequence[np.ndarray], dy: np.ndarray | None) -> user.Results:
        # Memory that a function does not write has NaN in it, and not by chance the results of the call before.
        for each in given:
            to_tensor(each).to(place).fill_(math.nan)
        tensors = [_in_memory(to_tensor(each).to(place), form).requires_grad_(differentiate) for each in given]
        with torch.set_grad_enabled(differentiate), _that_returns(*tensors):
            outputs = call(*tensors)
        gradients: Sequence[torch.Tensor | None] = ()
        if dy is not None:
            if not outputs[0].requires_grad:
                raise user.NoGradient("its result does not require a gradient where its arguments do")
            upstream = _in_memory(to_tensor(dy).to(place, outputs[0].dtype), form)
            gradients = torch.autograd.grad(outputs[0], tensors, upstream, allow_unused=True)
        return user.Results(
            [to_numpy(each) for each in outputs],
            [None if each is None else to_numpy(each) for each in gradients],
            [to_numpy(each) for each in tensors],
        )

    return program


def _in_memory(tensor: torch.Tensor, form: str) -> torch.Tensor:
    """Return a tensor that lies in memory in another way: `user.FORMS`."""
    if form == "moved" and tensor.ndim > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if form == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if form == "expanded" and tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
        return tensor.reshape(-1)[0].clone().expand(tensor.shape)
    return tensor


ARRAYS = user.Arrays(
    "torch",
    torch.Tensor,
    "channels_first",
    lambda *moved: torch.movedim(*moved).contiguous(),
    _padded,
    _layer,
    _program,
    torch.movedim,
)


def environment() -> dict[str, str]:
    """Return what may change PyTorch's bits here."""
    return {
        "torch": torch.__version__,
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch threads": str(torch.get_num_threads()),
        "torch mkldnn": "on" if torch.backends.mkldnn.enabled else "off",
        "torch float32 precision, convolution": torch.backends.mkldnn.conv.fp32_precision
        if _SAYS_PRECISION
        else "ieee",
        "torch float32 precision, matmul": torch.backends.mkldnn.matmul.fp32_precision
        if _SAYS_PRECISION
        else torch.get_float32_matmul_precision(),
        "torch deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }
