"""The peers in PyTorch: `F.conv2d` in both layouts, `torch.compile`, `F.unfold`, and MobileNetV2.

Only this file of `bridge.bench` imports torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

from bridge.bench.problems import EPSILON, NORM_EPSILON, RATE, Problem, Way
from bridge.bench.reference import Arrays
from bridge.bench.special_layers import SpecialLayer
from bridge.bench.suites import DepthwiseLayer
from jaxdw.models.mobilenet import round_channels

#: A function of a layer's tensors, with one result or several.
Compute = Callable[..., Any]

#: PyTorch's memory formats.
FORMS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def set_threads(threads: int) -> None:
    """Set the number of threads that PyTorch computes with."""
    torch.set_num_threads(threads)


def ways(problem: Problem, names: Sequence[str]) -> list[Way]:
    """Return the ways of these names that the suite has."""
    return [_WAYS[problem.suite][name](problem, name) for name in names if name in _WAYS[problem.suite]]


@functools.cache
def compile_problem() -> str:
    """Return the reason why `torch.compile` cannot compile here, in one line; empty if it can."""
    try:
        torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(8))
    except Exception as error:  # a missing compiler, header or permission raises its own kind
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def copy_way(elements: int, device: str = "cpu") -> Way:
    """Return a copy of float32 into memory at hand."""
    target = torch.zeros(elements, device=device)

    def start(arrays: Arrays) -> Callable[[], Any]:
        source = torch.full((elements,), float(arrays["value"]), device=device)
        return lambda: target.copy_(source)

    return Way("torch", start, wait=lambda _: synchronize(device))


def synchronize(device: str) -> None:
    """Wait for everything that was enqueued on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def convolution(layer: DepthwiseLayer) -> Compute:
    """Return `F.conv2d` with one group per channel."""
    return lambda x, w: F.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.channels)


def _unfold(
    layer: DepthwiseLayer, function: Callable[[torch.Tensor], torch.Tensor] = lambda windows: windows
) -> Compute:
    """Return `F.unfold` and a sum over the taps, as a product of matrices per channel."""

    def compute(x, w):
        n, c, taps = len(x), layer.channels, layer.kernel**2
        windows = F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)
        columns = function(windows.view(n, c, taps, -1))
        rows = (layer.height + 2 * layer.padding - layer.kernel) // layer.stride + 1
        return torch.matmul(w.view(c, 1, taps), columns).view(n, c, rows, -1)

    return compute


def _signed_square(windows: torch.Tensor) -> torch.Tensor:
    return windows * windows.abs()


def forward(compute: Compute) -> Callable[[Mapping[str, torch.Tensor]], Callable[[], Any]]:
    """Return a function from tensors x and w, on any device, to the call that computes (y,)."""

    def call(tensors: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        x, w = tensors["x"], tensors["w"]

        def run() -> Any:
            with torch.inference_mode():
                return (compute(x, w),)

        return run

    return call


def with_gradients(compute: Compute) -> Callable[[Mapping[str, torch.Tensor]], Callable[[], Any]]:
    """Return a function from tensors x, w and dy, on any device, to the call that computes (y, dx, dw)."""

    def call(tensors: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        x, w, dy = tensors["x"].requires_grad_(), tensors["w"].requires_grad_(), tensors["dy"]

        def run() -> Any:
            y = compute(x, w)
            return y, *torch.autograd.grad(y, (x, w), dy)

        return run

    return call


def _layer_way(
    make: Callable[[DepthwiseLayer], Compute], form: str = "contiguous", compiled: bool = False
) -> Callable[[Problem, str], Way]:
    def of(problem: Problem, name: str) -> Way:
        assert problem.layer is not None
        compute = make(problem.layer)
        if compiled:
            compute = _compiled(compute)
        call = (with_gradients if problem.suite == "gradients" else forward)(compute)
        return Way(name, lambda arrays: call(_placed(arrays, form)), fetched)

    return of


def fetched(result: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """Return y, or y, dx and dw, as NumPy arrays with channels last."""
    return {
        name: (tensor.permute(2, 3, 1, 0) if name == "dw" else tensor.permute(0, 2, 3, 1)).detach().cpu().numpy()
        for name, tensor in zip(("y", "dx", "dw"), result, strict=False)
    }


def _placed(arrays: Arrays, form: str) -> dict[str, torch.Tensor]:
    """Copy images and weights to PyTorch's axes and a memory format."""
    return {name: in_form(name, torch.from_numpy(np.array(array)), form) for name, array in arrays.items()}


def in_form(name: str, tensor: torch.Tensor, form: str) -> torch.Tensor:
    """Permute images (x, dy, images) and kernels (w) to PyTorch's axes, and lay them out in a memory format."""
    axes = {"x": (0, 3, 1, 2), "dy": (0, 3, 1, 2), "images": (0, 3, 1, 2), "w": (3, 2, 0, 1)}.get(name)
    return tensor if axes is None else tensor.permute(axes).contiguous(memory_format=FORMS[form])


def _compiled(function: Any) -> Any:
    """Compile as one graph, or fail.

    Earlier programs are dropped: PyTorch counts them as versions of the same code, and after eight versions it runs the
    code uncompiled, without a message.
    """
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _block_way(form: str, compiled: bool = False) -> Callable[[Problem, str], Way]:
    def of(problem: Problem, name: str) -> Way:
        layer = problem.layer
        assert layer is not None
        channels = layer.channels
        unit = nn.Sequential(
            nn.Conv2d(channels, channels, layer.kernel, layer.stride, layer.padding, groups=channels, bias=False),
            nn.BatchNorm2d(channels, eps=EPSILON),
            nn.ReLU6(inplace=True),
        ).eval()
        unit = unit.to(memory_format=FORMS[form])
        program = _compiled(unit) if compiled else unit

        def start(arrays: Arrays) -> Callable[[], Any]:
            tensors = _placed(arrays, form)
            keys = {"0.weight": "w", "1.weight": "scale", "1.bias": "bias", "1.running_mean": "mean"}
            keys["1.running_var"] = "var"
            state = {key: tensors[name] for key, name in keys.items()}
            unit.load_state_dict(state, strict=False)  # everything except the count of batches

            def run() -> Any:
                with torch.inference_mode():
                    return (program(tensors["x"]),)

            return run

        return Way(name, start, fetched)

    return of


def _special_way(form: str = "contiguous", by_fft: bool = False) -> Callable[[Problem, str], Way]:
    """Return the way of a special layer; channels last it reads x as JAX has it."""

    def of(problem: Problem, name: str) -> Way:
        layer = problem.special
        assert layer is not None
        compute = _by_transforms(layer) if by_fft else _special(layer)

        def start(arrays: Arrays) -> Callable[[], Any]:
            tensors = _special_placed(arrays, layer, form)

            def run() -> Any:
                with torch.inference_mode():
                    return compute(**tensors)

            return run

        return Way(name, start, lambda result: _special_fetched(result, layer))

    return of


def _special_placed(arrays: Arrays, layer: SpecialLayer, form: str) -> dict[str, torch.Tensor]:
    """Copy the inputs to PyTorch's axes; the state of a step has room for the next input in front."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    if layer.kind != "step":
        x = tensors["x"].movedim(-1, 1)
        tensors["x"] = x.contiguous() if form == "contiguous" else x
    else:
        room = torch.zeros(layer.batch, layer.channels, layer.kernel)
        room[..., 1:] = tensors["state"].movedim(-1, 1)
        tensors["state"] = room
    weights = tensors["w"].movedim((-1, -2), (0, 1)).contiguous()
    last = form == "channels_last" and weights.ndim == 4
    tensors["w"] = weights.contiguous(memory_format=FORMS[form]) if last else weights
    return tensors


def _special_fetched(result: Any, layer: SpecialLayer) -> dict[str, np.ndarray]:
    if layer.kind == "step":
        y, state = result
        return {"y": y.numpy(), "state": state[..., 1:].movedim(1, -1).numpy()}
    return {"y": result.movedim(1, -1).numpy()}


def _special(layer: SpecialLayer) -> Compute:
    channels, taps = layer.channels, layer.kernel
    if layer.kind == "transposed":
        return lambda x, w: F.conv_transpose2d(x, w, None, layer.stride, layer.padding, layer.output_padding, channels)
    if layer.kind == "image":
        return lambda x, w: F.conv2d(x, w, padding=taps // 2, groups=channels)
    if layer.kind == "long":
        return lambda x, w: F.conv1d(F.pad(x, (taps - 1, 0)), w, groups=channels)
    if layer.kind == "causal":  # as Mamba's own code without its CUDA kernels
        return lambda x, w, b: F.silu(F.conv1d(x, w, b, padding=taps - 1, groups=channels)[..., : layer.size[0]])

    def step(x, w, b, state):  # likewise
        state.copy_(torch.roll(state, -1, -1))
        state[..., -1] = x
        return F.silu(torch.sum(state * w[:, 0], -1) + b), state

    return step


def _by_transforms(layer: SpecialLayer) -> Compute:
    """Return the convolution by `torch.fft`, as Hyena's own code has it."""
    axes = tuple(range(-len(layer.size), 0))
    before = layer.kernel - 1 if layer.kind == "long" else layer.kernel // 2
    lengths = [2 * n if layer.kind == "long" else n + layer.kernel for n in layer.size]
    lengths = [n + n % 2 for n in lengths]
    first = layer.kernel - 1 - before
    kept = (..., *(slice(first, first + n) for n in layer.size))

    def compute(x, w):
        spectrum = torch.fft.rfftn(x, lengths, axes) * torch.fft.rfftn(w[:, 0].flip(axes), lengths, axes)
        return torch.fft.irfftn(spectrum, lengths, axes)[kept]

    return compute


def _convnext_block(layer: DepthwiseLayer) -> Compute:
    def compute(x, w, bias, scale, shift, w1, b1, w2, b2, gamma):
        y = F.conv2d(x, w, bias, padding=layer.padding, groups=layer.channels).permute(0, 2, 3, 1)
        y = F.layer_norm(y, (layer.channels,), scale, shift, NORM_EPSILON)
        y = F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)
        return x + (gamma * y).permute(0, 3, 1, 2)

    return compute


def _convnext_call(program: Compute, arrays: Arrays, form: str) -> Callable[[], Any]:
    """Return the call that computes a block of ConvNeXt: y and the gradients by x and every parameter, by name."""
    tensors = _placed(arrays, form)
    tensors |= {name: tensors[name].t().contiguous() for name in ("w1", "w2")}  # as `nn.Linear` has them
    dy = tensors.pop("dy")
    inputs = [tensor.requires_grad_() for tensor in tensors.values()]

    def run() -> Any:
        y = program(*inputs)
        gradients = torch.autograd.grad(y, inputs, dy)
        return {"y": y} | {f"d{name}": gradient for name, gradient in zip(tensors, gradients)}

    return run


def _convnext_results(result: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return all as NumPy arrays with the axes of the problem."""
    axes = {"y": (0, 2, 3, 1), "dx": (0, 2, 3, 1), "dw": (2, 3, 1, 0), "dw1": (1, 0), "dw2": (1, 0)}
    return {name: tensor.detach().permute(axes.get(name, (0,))).numpy() for name, tensor in result.items()}


def convnext_truth(layer: DepthwiseLayer, arrays: Arrays) -> dict[str, np.ndarray]:
    """Compute a block of ConvNeXt and its gradients in the arrays' dtype."""
    return _convnext_results(_convnext_call(_convnext_block(layer), arrays, "contiguous")())


def _convnext_way(form: str, compiled: bool = False) -> Callable[[Problem, str], Way]:
    def of(problem: Problem, name: str) -> Way:
        assert problem.layer is not None
        block = _convnext_block(problem.layer)
        program = _compiled(block) if compiled else block
        return Way(name, lambda arrays: _convnext_call(program, arrays, form), _convnext_results)

    return of


class MobileNetV2(nn.Module):
    """Sandler et al., 2018, with torchvision's structure and names of parameters; no dropout, to be repeatable."""

    #: Expansion, channels, repetitions and first stride of each stage: table 2 of the paper.
    TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int, width: float = 1.0):
        super().__init__()
        channels, last = round_channels(32 * width), round_channels(1280 * max(1.0, width))
        features = [_unit(3, channels, 3, 2)]
        for expansion, out, repetitions, first_stride in self.TABLE:
            for stride in (first_stride, *(1,) * (repetitions - 1)):
                features.append(_InvertedResidual(channels, channels := round_channels(out * width), stride, expansion))
        self.features = nn.Sequential(*features, _unit(channels, last, 1, 1))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        self.conv = nn.Sequential(
            *([_unit(channels, wide, 1, 1)] if expansion > 1 else []),
            _unit(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out, eps=EPSILON),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _unit(channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=EPSILON),
        nn.ReLU6(inplace=True),
    )


def network_weights(classes: int, width: float, seed: int) -> dict[str, np.ndarray]:
    """Draw a state_dict of `MobileNetV2` at random.

    Kernels and the matrix are normal with variance 2 / fan-in, so that different images keep different activations
    after ReLU. Scales and variances are around 1, biases and means around 0 but not zero: a zero would hide mistakes.
    """
    rng = np.random.default_rng(seed)
    ranges = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}
    weights = {}
    for name, tensor in MobileNetV2(classes, width).state_dict().items():
        shape, kind = tuple(tensor.shape), name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            weights[name] = np.zeros((), np.int64)
        elif len(shape) == 1:
            weights[name] = rng.uniform(*ranges[kind], shape).astype(np.float32)
        else:
            deviation = math.sqrt(2 / math.prod(shape[1:]))
            weights[name] = (deviation * rng.standard_normal(shape)).astype(np.float32)
    return weights


def truth(weights: Arrays, width: float, arrays: Arrays) -> dict[str, np.ndarray]:
    """Compute the network in float64: the logits, or for a step of training the loss and the new state."""
    wide = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in weights.items()}
    given = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    model = _network(wide, width, torch.float64)
    return _network_results(_network_call(model, model, given, "contiguous")())


def _network(weights: Arrays, width: float, dtype: torch.dtype = torch.float32) -> MobileNetV2:
    model = MobileNetV2(len(weights["classifier.1.bias"]), width).to(dtype)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model


def _network_call(model: MobileNetV2, program: Any, arrays: Arrays, form: str) -> Callable[[], Any]:
    """Return the call for inference; if there are labels, for a step of training by SGD, as PyTorch users write it."""
    tensors = _placed(arrays, form)
    if "labels" not in arrays:
        model.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return program(tensors["images"])

        return infer

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(program(tensors["images"]), tensors["labels"])
        loss.backward()
        optimizer.step()
        return loss, model

    return step


def _network_results(result: Any) -> dict[str, np.ndarray]:
    if isinstance(result, torch.Tensor):
        tensors = {"logits": result}
    else:
        loss, model = result
        tensors = {"loss": loss, **model.state_dict()}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def _network_way(form: str, compiled: bool = False) -> Callable[[Problem, str], Way]:
    def of(problem: Problem, name: str) -> Way:
        model = _network(problem.weights, problem.width).to(memory_format=FORMS[form])
        program = _compiled(model) if compiled else model

        def start(arrays: Arrays) -> Callable[[], Any]:
            model.load_state_dict({name: torch.from_numpy(array) for name, array in problem.weights.items()})
            return _network_call(model, program, arrays, form)

        return Way(name, start, _network_results)

    return of


_Makers = Mapping[str, Callable[[Problem, str], Way]]


_CONVOLUTIONS: _Makers = {
    "torch": _layer_way(convolution),
    "torch.channels_last": _layer_way(convolution, "channels_last"),
    "torch.compile": _layer_way(convolution, "channels_last", compiled=True),
    "torch.unfold": _layer_way(_unfold),
}

_SPECIAL: _Makers = {
    "torch": _special_way(),
    "torch.channels_last": _special_way("channels_last"),
    "torch.fft": _special_way(by_fft=True),
}

_WAYS: Mapping[str, _Makers] = {
    "layers": _CONVOLUTIONS,
    "gradients": _CONVOLUTIONS,
    "windows": {
        "torch.unfold": _layer_way(lambda layer: _unfold(layer, _signed_square)),
        "torch.compile": _layer_way(lambda layer: _unfold(layer, _signed_square), compiled=True),
    },
    "blocks": {
        "torch": _block_way("contiguous"),
        "torch.channels_last": _block_way("channels_last"),
        "torch.compile": _block_way("channels_last", compiled=True),
    },
    "convnext": {
        "torch": _convnext_way("contiguous"),
        "torch.channels_last": _convnext_way("channels_last"),
        "torch.compile": _convnext_way("channels_last", compiled=True),
    },
    "models": {
        "torch": _network_way("contiguous"),
        "torch.channels_last": _network_way("channels_last"),
        "torch.compile": _network_way("channels_last", compiled=True),
    },
    "transposed": _SPECIAL,
    "causal": _SPECIAL,
    "large": _SPECIAL,
}
