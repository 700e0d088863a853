"""PyTorch's operators in float64 with running errors, as `bridge.model.primitives` has them for JAX.

An operator that computes several steps has the errors of the customary forms of its formula; where forms differ, of the
one that errs most. Layouts are PyTorch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from bridge.model import float64
from bridge.model import running_error as re
from bridge.model.running_error import Bounded

#: Operators that keep all elements of their operand, each once.
KEEPING = {
    "view",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "clone",
    "_to_copy",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh",
    "_reshape_alias",
    "unflatten",
    "flatten",
    "movedim",
    "dropout",
    "native_dropout",
}

#: Operators whose elements depend on all along some axes, or in a window.
REDUCTIONS = {
    "mean",
    "sum",
    "amax",
    "amin",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "max_pool2d_with_indices",
}

#: Operators that divide by what they summed or by the number of elements, or subtract it, as their last step.
SEVERAL_STEPS = {"mean", "avg_pool2d", "_adaptive_avg_pool2d", "var", "_softmax", "_safe_softmax", "_log_softmax"}

#: Operators that move some elements, or several operands' elements.
MOVES = KEEPING | {
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "chunk",
    "unbind",
    "cat",
    "stack",
    "constant_pad_nd",
    "copy",
    "written",
    "repeat",
    "narrow",
    "embedding",
    "pad",
    "as_strided",
    "flip",
    "roll",
}

#: Products of matrices; their results have no axis of channels.
MATRIX_PRODUCTS = {"addmm", "baddbmm", "bmm", "mm"}

#: Operators whose sums of products take a layer's weight.
CONTRACTIONS = MATRIX_PRODUCTS | {
    "convolution",
    "convolution_backward",
    "mkldnn_convolution",
    "_convolution",
    "linear",
}

#: Operators whose elements depend on one element of each operand.
ELEMENTWISE = {
    "relu",
    "hardtanh",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardswish",
    "hardsigmoid",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "exp",
    "erf",
    "mish",
    "softplus",
    "elu",
    "leaky_relu",
    "add",
    "sub",
    "mul",
    "div",
    "rsub",
    "neg",
    "pow",
    "sqrt",
    "rsqrt",
    "square",
    "abs",
    "reciprocal",
    "log",
    "maximum",
    "minimum",
    "where",
    "threshold",
    "log_sigmoid",
    "sin",
    "cos",
}


class UnknownOperator(ValueError):
    """An operator that has no bound."""


def _number(value: Any) -> Bounded:
    return value if isinstance(value, Bounded) else Bounded.exact(np.float64(value))


Given = Mapping[str, Any]


def reshaped(x: Bounded, size: Sequence[int]) -> Bounded:
    return x.moved(lambda a: a.reshape([int(n) for n in size]))


def _squeeze(a: Given) -> Bounded:
    x = a["self"]
    dims = a.get("dim")
    axes = range(len(x.shape)) if dims is None else ([dims] if isinstance(dims, int) else dims)
    drop = {d % len(x.shape) for d in axes if x.shape[d] == 1}
    return reshaped(x, [n for i, n in enumerate(x.shape) if i not in drop])


def _unsqueeze(a: Given) -> Bounded:
    return a["self"].moved(lambda e: np.expand_dims(e, a["dim"]))


def _expand(a: Given) -> Bounded:
    x, size = a["self"], list(a["size"])
    size = [(x.shape[i - (len(size) - len(x.shape))] if n == -1 else n) for i, n in enumerate(size)]
    return x.moved(lambda e: np.broadcast_to(e, size))


def _slice(a: Given) -> Bounded:
    x, dim = a["self"], a.get("dim", 0)
    end = a.get("end")
    cut = [slice(None)] * len(x.shape)
    cut[dim] = slice(a.get("start"), None if end is None or end > 2**40 else end, a.get("step", 1))
    return x.moved(lambda e: e[tuple(cut)])


def _strided(a: Given) -> Bounded:
    """Return other strides of axes of one element, which PyTorch gives the means that it keeps."""
    x, size = a["self"], a["size"]
    if [n for n in size if n != 1] != [n for n in x.shape if n != 1]:
        raise UnknownOperator("as_strided to another shape")
    return reshaped(x, size)


def _select(a: Given) -> Bounded:
    return a["self"].moved(lambda e: np.take(e, a["index"], axis=a["dim"]))


def _split(a: Given) -> list[Bounded]:
    x, dim = a["self"], a.get("dim", 0)
    size = a.get("split_size", a.get("split_sizes"))
    sizes = size if isinstance(size, list) else [size] * math.ceil(x.shape[dim] / size)
    ends = np.cumsum(sizes)[:-1]

    def part(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda e: np.split(e, ends, axis=dim)[k]

    return [x.moved(part(k)) for k in range(len(sizes))]


def _unbind(a: Given) -> list[Bounded]:
    x, dim = a["self"], a.get("dim", 0)
    return [x.moved(functools.partial(np.take, indices=k, axis=dim)) for k in range(x.shape[dim])]


def _filled(x: Bounded) -> tuple[np.ndarray, ...]:
    return x.value, *(np.broadcast_to(np.asarray(e, np.float64), x.shape) for e in (x.rounding, x.function))


def _joined(join: Callable[..., np.ndarray]) -> Callable[[Given], Bounded]:
    def rule(a: Given) -> Bounded:
        parts = [each for each in a["tensors"] if len(each.shape) != 1 or each.shape[0]]
        return Bounded(*(join(each, a.get("dim", 0)) for each in zip(*map(_filled, parts))))

    return rule


def _pad(a: Given) -> Bounded:
    x, pad, value = a["self"], a["pad"], a.get("value", 0.0)
    widths = [(0, 0)] * (len(x.shape) - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    added = [(max(a, 0), max(b, 0)) for a, b in widths]
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape))
    y, *errors = (each[cut] for each in _filled(x))
    return Bounded(np.pad(y, added, constant_values=value), *(np.pad(e, added) for e in errors))


def _embedding(a: Given) -> Bounded:
    return a["weight"].moved(lambda e: e[a["indices"].value])


def convolution(a: Given) -> Bounded:
    x, w, bias = a["input"], a["weight"], a.get("bias")
    rank = len(x.shape) - 2
    stride, padding, dilation = ([*a[k]] * (rank if len(a[k]) == 1 else 1) for k in ("stride", "padding", "dilation"))
    groups = a["groups"]
    if "how" in a:
        w = w.moved(a["how"])
    if a["transposed"]:
        out = a["output_padding"]
        out = [*out] * (rank if len(out) == 1 else 1)
        kernel = w.shape[2:]
        pads = [(d * (k - 1) - p, d * (k - 1) - p + o) for d, k, p, o in zip(dilation, kernel, padding, out)]
        # (I, O/g, *k) -> flipped (*k, I/g, O)
        per = w.shape[0] // groups

        def kernel_of(b: np.ndarray) -> np.ndarray:
            b = np.flip(b, tuple(range(2, 2 + rank))).reshape(groups, per, *b.shape[1:])
            b = np.moveaxis(b, (0, 1, 2), (-2, -3, -1))
            return b.reshape(*kernel, per, -1)

        settings: dict[str, Any] = {
            "strides": [1] * rank,
            "padding": pads,
            "dilation": dilation,
            "input_dilation": stride,
        }
        terms = math.prod(kernel) * per
    else:

        def kernel_of(b: np.ndarray) -> np.ndarray:
            return b.transpose(*range(2, b.ndim), 1, 0)

        settings = {"strides": stride, "padding": a.get("pads", [(p, p) for p in padding]), "dilation": dilation}
        terms = math.prod(w.shape[1:])

    def of(e: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = float64.convolution(np.moveaxis(e, 1, -1), kernel_of(b), groups=groups, **settings)
        return np.moveaxis(y, -1, 1)

    y = re.bilinear(of, x, w, terms + 1)
    if bias is None:
        return y
    return re.add(y, bias.moved(lambda e: e.reshape(-1, *[1] * rank)))


def matmul(x: Bounded, w: Bounded) -> Bounded:
    return re.bilinear(np.matmul, x, w, x.shape[-1])


def _addmm(a: Given) -> Bounded:
    y = matmul(a["mat1"], a["mat2"])
    if a.get("alpha", 1) != 1:
        y = re.mul(y, _number(a["alpha"]))
    return re.add(y, a["self"]) if a.get("beta", 1) == 1 else re.add(y, re.mul(a["self"], _number(a["beta"])))


def _baddbmm(a: Given) -> Bounded:
    y = matmul(a["batch1"], a["batch2"])
    if a.get("alpha", 1) != 1:
        y = re.mul(y, Bounded.constant(np.float64(a["alpha"])))
    return re.add(y, a["self"]) if a.get("beta", 1) == 1 else re.add(y, re.mul(a["self"], _number(a["beta"])))


def _linear(a: Given) -> Bounded:
    y = re.bilinear(lambda e, b: e @ b.T, a["input"], a["weight"], a["input"].shape[-1])
    return y if a.get("bias") is None else re.add(y, a["bias"])


def normalized(
    x: Bounded,
    axes: Sequence[int],
    eps: float,
    scale: Bounded | None,
    bias: Bounded | None,
    *,
    centred: bool = True,
    correction: int = 0,
) -> list[Bounded]:
    """Return (x - m) / sqrt(v + eps) * scale + bias, m and 1 / sqrt(v + eps); without `centred`, m = 0, v = E[x^2]."""
    axes = tuple(a % len(x.shape) for a in axes)
    keep = [1 if i in axes else n for i, n in enumerate(x.shape)]
    m = re.mean(x, axes)
    d = re.sub(x, reshaped(m, keep)) if centred else x
    n = math.prod(x.shape[i] for i in axes)
    v = re.div(re.total(re.mul(d, d), axes), _number(float(n - correction)))
    root = re.function("rsqrt", lambda e: 1 / np.sqrt(e), re.add(v, _number(eps)))
    a = reshaped(root, keep) if scale is None else re.mul(reshaped(root, keep), scale)
    shift = Bounded(np.zeros(())) if bias is None else bias
    y = _scaled_and_shifted(x, reshaped(m, keep) if centred else Bounded(np.zeros(())), a, shift)
    return [y, m, root]


def _layer_norm(a: Given) -> list[Bounded]:
    x, rank = a["input"], len(a["normalized_shape"])
    axes = range(len(x.shape) - rank, len(x.shape))
    y, m, root = normalized(x, axes, a["eps"], a.get("weight"), a.get("bias"))
    keep = [*x.shape[: len(x.shape) - rank], *[1] * rank]
    return [y, reshaped(m, keep), reshaped(root, keep)]


def _normalized(a: Given) -> list[Bounded]:
    x = a["input"]
    axes = tuple(i % len(x.shape) for i in a["axes"])
    y, *_ = normalized(x, axes, a["eps"], None, None, centred=a.get("centred", True), correction=a.get("correction", 0))
    for name, of in (("weight", re.mul), ("bias", re.add)):
        if a.get(name) is not None:
            y = of(y, a[name])
    return [y]


def _rms_norm(a: Given) -> list[Bounded]:
    x, rank = a["input"], len(a["normalized_shape"])
    axes = range(len(x.shape) - rank, len(x.shape))
    eps = 2.0**-23 if a.get("eps") is None else a["eps"]
    return normalized(x, axes, eps, a.get("weight"), None, centred=False)[:1]


def _group_norm(a: Given) -> list[Bounded]:
    x, groups = a["input"], a["group"]
    n, c = x.shape[:2]
    grouped = reshaped(x, (n, groups, -1))
    y, m, root = normalized(grouped, (2,), a["eps"], None, None)
    y = reshaped(y, x.shape)
    each = (c, *[1] * (len(x.shape) - 2))
    if a.get("weight") is not None:
        y = re.mul(y, reshaped(a["weight"], each))
    if a.get("bias") is not None:
        y = re.add(y, reshaped(a["bias"], each))
    return [y, m, root]


def _batch_norm(a: Given) -> list[Bounded]:
    x = a["input"]
    if a.get("training", False) or a.get("running_mean") is None:
        axes = [i for i in range(len(x.shape)) if i != 1]
        each = (-1, *[1] * (len(x.shape) - 2))
        w, b = (None if a.get(k) is None else reshaped(a[k], each) for k in ("weight", "bias"))
        return normalized(x, axes, a["eps"], w, b)
    empty = Bounded(np.zeros(0))
    each = (-1, *[1] * (len(x.shape) - 2))
    mean, var = reshaped(a["running_mean"], each), reshaped(a["running_var"], each)
    root = re.function("rsqrt", lambda e: 1 / np.sqrt(e), re.add(var, _number(a["eps"])))
    scale = root if a.get("weight") is None else re.mul(root, reshaped(a["weight"], each))
    bias = Bounded(np.zeros(())) if a.get("bias") is None else reshaped(a["bias"], each)
    return [_scaled_and_shifted(x, mean, scale, bias), empty, empty]


def _scaled_and_shifted(x: Bounded, mean: Bounded, scale: Bounded, bias: Bounded) -> Bounded:
    """Return (x - m) a + b, which may be computed as x a + (b - m a): three roundings of each term more."""
    y = re.add(re.mul(re.sub(x, mean), scale), bias)
    sizes = np.abs(x.value) + np.abs(mean.value)
    terms = sizes * np.abs(scale.value) + np.abs(bias.value)
    other = (sizes + np.asarray(mean.rounding)) * np.asarray(scale.rounding) + np.abs(scale.value) * mean.rounding
    return Bounded(
        y.value,
        np.maximum(y.rounding, other + 4 * 2.0**-24 * terms + 2.0**-120 * (1 + np.abs(scale.value))),
        y.function,
    )


def softmax(x: Bounded, axis: int) -> Bounded:
    axis %= len(x.shape)
    keep = [1 if i == axis else n for i, n in enumerate(x.shape)]
    e = re.function("exp", np.exp, re.sub(x, reshaped(re.greatest(x, (axis,)), keep)))
    return re.div(e, reshaped(re.total(e, (axis,)), keep))


def _log_softmax(a: Given) -> Bounded:
    x = a["self"]
    axis = a["dim"] % len(x.shape)
    keep = [1 if i == axis else n for i, n in enumerate(x.shape)]
    d = re.sub(x, reshaped(re.greatest(x, (axis,)), keep))
    e = re.function("exp", np.exp, d)
    return re.sub(d, reshaped(re.function("log", np.log, re.total(e, (axis,))), keep))


def attention_weights(a: Given) -> Bounded:
    """Return the softmax of the scaled and masked products of query and key."""
    q, k = a["query"], a["key"]
    scale = a.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = matmul(q, k.moved(lambda e: np.swapaxes(e, -1, -2)))
    s = re.mul(s, Bounded.constant(np.float64(scale)))
    s = Bounded(
        s.value, s.rounding + 2 * 2.0**-24 * np.abs(s.value), s.function
    )  # or both factors are scaled by a root
    mask = a.get("attn_mask", a.get("attn_bias"))
    if mask is not None:
        s = re.add(s, mask) if mask.value.dtype == np.float64 else re.select(mask, Bounded(np.asarray(-np.inf)), s)
    if a.get("is_causal"):
        s = re.select(Bounded(np.tri(*s.shape[-2:], dtype=bool)), Bounded(np.full((), -np.inf)), s)
    return softmax(s, -1)


def _attention(a: Given) -> list[Bounded]:
    y = matmul(attention_weights(a), a["value"])
    return [y, Bounded(np.zeros(y.shape[:-1]))]  # the second is for the backward pass, which is computed without it


def _mean(a: Given) -> Bounded:
    x = a["self"]
    dims = a.get("dim")
    axes = tuple(range(len(x.shape))) if not dims else tuple(d % len(x.shape) for d in dims)
    y = re.mean(x, axes)
    return reshaped(y, [1 if i in axes else n for i, n in enumerate(x.shape)]) if a.get("keepdim") else y


def _total(a: Given) -> Bounded:
    x = a["self"]
    dims = a.get("dim")
    axes = tuple(range(len(x.shape))) if not dims else tuple(d % len(x.shape) for d in dims)
    y = re.total(x, axes)
    return reshaped(y, [1 if i in axes else n for i, n in enumerate(x.shape)]) if a.get("keepdim") else y


def _variance(a: Given) -> list[Bounded]:
    x = a["self"]
    dims = a.get("dim")
    axes = tuple(range(len(x.shape))) if not dims else tuple(d % len(x.shape) for d in dims)
    keep = [1 if i in axes else n for i, n in enumerate(x.shape)]
    n = math.prod(x.shape[i] for i in axes)
    correction = a.get("correction", 1)
    m = re.mean(x, axes)
    d = re.sub(x, reshaped(m, keep))
    v = re.div(re.total(re.mul(d, d), axes), _number(max(n - (1 if correction is None else correction), 0)))
    return [reshaped(each, keep) if a.get("keepdim") else each for each in (v, m)]


def _two(values: Sequence[int]) -> list[int]:
    return [*values] * (2 if len(values) == 1 else 1)


def _max_pool(a: Given) -> list[Bounded]:
    x = a["self"]
    rank = len(x.shape) - 2
    window = [*a["kernel_size"]] * (rank if len(a["kernel_size"]) == 1 else 1)
    stride = [*(a.get("stride") or window)]
    stride = stride * (rank if len(stride) == 1 else 1)
    padding, dilation = (
        [*a.get(k, [d])] * (rank if len(a.get(k, [d])) == 1 else 1) for k, d in (("padding", 0), ("dilation", 1))
    )
    if a.get("ceil_mode"):
        raise UnknownOperator("max_pool2d with ceil_mode")
    pads = [(0, 0), (0, 0), *a.get("pads", [(p, p) for p in padding])]

    def of(e: np.ndarray, start: float) -> np.ndarray:
        return float64.windows_reduced(e, np.maximum, start, [1, 1, *window], [1, 1, *stride], pads, [1, 1, *dilation])

    errors = [of(np.broadcast_to(e, x.shape), 0.0) if np.any(e) else 0.0 for e in (x.rounding, x.function)]
    return [Bounded(of(x.value, -np.inf), *errors)]


def _avg_pool(a: Given) -> Bounded:
    x = a["self"]
    rank = len(x.shape) - 2
    window = [*a["kernel_size"]] * (rank if len(a["kernel_size"]) == 1 else 1)
    stride = [*(a.get("stride") or window)]
    stride = stride * (rank if len(stride) == 1 else 1)
    padding = [*a.get("padding", [0])]
    padding = padding * (rank if len(padding) == 1 else 1)
    if a.get("ceil_mode"):
        raise UnknownOperator("avg_pool2d with ceil_mode")

    def of(e: np.ndarray) -> np.ndarray:
        pads = [(0, 0), (0, 0), *a.get("pads", [(p, p) for p in padding])]
        ones = [1, 1]
        return float64.windows_reduced(e, np.add, 0.0, [1, 1, *window], [1, 1, *stride], pads, [*ones, *ones])

    y = re.bilinear(lambda e, _: of(e), x, Bounded(np.ones(())), math.prod(window))
    divisor: Any = a.get("divisor_override") or math.prod(window)
    if not a.get("count_include_pad", True) and not a.get("divisor_override"):
        divisor = of(np.ones(x.shape))
    return re.div(y, Bounded(np.asarray(divisor, np.float64)))


def _adaptive_pool(a: Given) -> Bounded:
    x, size = a["self"], a["output_size"]
    matrices = []
    for n, out in zip(x.shape[2:], size):
        matrix = np.zeros((out, n))
        for i in range(out):
            low, high = i * n // out, -(-(i + 1) * n // out)
            matrix[i, low:high] = 1 / (high - low)
        matrices.append(matrix)
    return resized(x, matrices)


def _adaptive_max_pool(a: Given) -> list[Bounded]:
    x = a["self"]
    for axis, out in enumerate(a["output_size"], 2):
        n = x.shape[axis]
        cuts = [slice(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
        parts = [
            re.greatest(x.moved(lambda e, cut=cut, axis=axis: np.take(e, range(cut.start, cut.stop), axis)), (axis,))
            for cut in cuts
        ]
        x = Bounded(*(np.stack(each, axis) for each in zip(*map(_filled, parts))))
    return [x]


def resized(x: Bounded, matrices: Sequence[np.ndarray]) -> Bounded:
    """Multiply each spatial axis by a matrix, whose entries the frameworks round."""
    for axis, matrix in enumerate(matrices):
        terms = int((matrix != 0).sum(1).max(initial=1))
        rounded = Bounded(matrix, 8 * 2.0**-24 * (matrix != 0) if terms > 1 else 0.0, 0.0)

        def of(e: np.ndarray, b: np.ndarray, axis: int = axis) -> np.ndarray:
            return np.moveaxis(np.moveaxis(e, axis + 2, -1) @ b.T, -1, axis + 2)

        x = re.bilinear(of, x, rounded, terms)
    return x


def _resize(mode: str) -> Callable[[Given], Bounded]:
    def rule(a: Given) -> Bounded:
        return resized(a["self"], resize_matrices(a, a["self"].shape[2:], a.get("output_size"), mode))

    return rule


def resize_matrices(a: Given, given: Sequence[int], sizes: Sequence[int] | None, mode: str) -> list[np.ndarray]:
    """Return the matrix `(out, n)` of each spatial axis."""
    factors = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
    factors = [None if f is None else float(f) for f in factors]
    sizes = sizes or [int(n * f) for n, f in zip(given, factors)]
    align = bool(a.get("align_corners"))
    return [float64.interpolation(n, out, mode, f, align) for n, out, f in zip(given, sizes, factors)]


def _gelu(a: Given) -> Bounded:
    x = a["self"]
    if a.get("approximate", "none") == "tanh":
        k = Bounded.constant(np.float64(math.sqrt(2 / math.pi)))
        inner = re.mul(k, re.add(x, re.mul(_number(0.044715), re.power(x, 3))))
        gate = re.add(_number(1.0), re.function("tanh", np.tanh, inner))
        return re.mul(re.mul(_number(0.5), x), gate)
    scaled = re.mul(x, Bounded.constant(np.float64(math.sqrt(0.5))))
    # 1 + erf(t) for t << 0 is erfc(-t): the value is that, the error that of the sum
    y = 0.5 * x.value * special.erfc(-x.value * math.sqrt(0.5))
    gate = re.add(_number(1.0), re.function("erf", special.erf, scaled))
    made = re.mul(re.mul(_number(0.5), x), gate)
    return Bounded(y, made.rounding, made.function)


def _sigmoid(x: Bounded) -> Bounded:
    return re.function("logistic", special.expit, x)


def _relu6(x: Bounded) -> Bounded:
    return re.extreme(np.minimum, re.extreme(np.maximum, x, _number(0.0)), _number(6.0))


def _hard_sigmoid(x: Bounded) -> Bounded:
    return re.div(_relu6(re.add(x, _number(3.0))), _number(6.0))


def _clamp(a: Given) -> Bounded:
    x = a["self"]
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    if low is not None:
        x = re.extreme(np.maximum, x, _number(low))
    return x if high is None else re.extreme(np.minimum, x, _number(high))


def _hardtanh(a: Given) -> Bounded:
    return _clamp({"self": a["self"], "min": a.get("min_val", -1.0), "max": a.get("max_val", 1.0)})


def _two_operands(of: Callable[[Bounded, Bounded], Bounded]) -> Callable[[Given], Bounded]:
    def rule(a: Given) -> Bounded:
        x, z = _number(a["self"]), _number(a["other"])
        if a.get("alpha", 1) != 1:
            z = re.mul(z, _number(a["alpha"]))
        if a.get("rounding_mode"):
            raise UnknownOperator("div with a rounding mode")
        return of(x, z)

    return rule


def _power(a: Given) -> Bounded:
    x, z = a["self"], a["exponent"]
    if isinstance(x, Bounded) and not isinstance(z, Bounded):
        if z == int(z) and abs(z) < 16:
            return re.power(x, int(z))
        return re.function("pow", lambda e: np.power(e, z), x)
    raise UnknownOperator("pow of two tensors")


def _where(a: Given) -> Bounded:
    return re.select(a["condition"], _number(a["other"]), _number(a["self"]))


def _masked_fill(a: Given) -> Bounded:
    return re.select(a["mask"], a["self"], _number(a["value"]))


def _softplus(a: Given) -> Bounded:
    if a.get("beta", 1) != 1 or a.get("threshold", 20) != 20:
        raise UnknownOperator("softplus with a beta or threshold of its own")
    return softplus(a["self"])


def softplus(x: Bounded) -> Bounded:
    """Return log(1 + exp(x)), which PyTorch takes for x above 20: the difference is below exp(-20)."""
    y = np.logaddexp(x.value, 0.0)
    big = np.where(x.value > 20, np.exp(-np.abs(x.value)), 0.0)
    return Bounded(
        y,
        np.asarray(x.rounding) + 24 * 2.0**-24 * (np.abs(y)) + big + 2.0**-126,
        np.asarray(x.function) + big + 2.0**-48 * y,
    )


def _unary(name: str, of: Callable[[np.ndarray], np.ndarray]) -> Callable[[Given], Bounded]:
    return lambda a: re.function(name, of, a["self"])


def _leaky(a: Given) -> Bounded:
    x = a["self"]
    down = re.mul(x, Bounded.constant(np.float64(a.get("negative_slope", 0.01))))
    return re.select(Bounded(x.value > 0), down, x)


def _elu(a: Given) -> Bounded:
    x = a["self"]
    if a.get("scale", 1) != 1 or a.get("input_scale", 1) != 1:
        raise UnknownOperator("elu with scales")
    low = re.extreme(np.minimum, x, _number(0.0))
    down = re.mul(_number(a.get("alpha", 1.0)), re.function("expm1", np.expm1, low))
    # or exp(x) - 1, whose error is that of exp near zero
    down = Bounded(down.value, np.asarray(down.rounding) + 8 * 2.0**-24, down.function)
    return re.select(Bounded(x.value > 0), down, x)


def _flip(a: Given) -> Bounded:
    return a["self"].moved(lambda e: np.flip(e, tuple(a["dims"])))


def _keep(a: Given) -> Bounded:
    return a["self"] if "self" in a else a["input"]


def _copy(a: Given) -> Bounded:
    return a["src"].moved(lambda e: np.broadcast_to(e, a["self"].shape))


def _compared(of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Given], Bounded]:
    return lambda a: re.compare(of, _number(a["self"]), _number(a["other"]))


def _logical(of: Callable[..., np.ndarray]) -> Callable[[Given], Bounded]:
    return lambda a: re.logic(of, *(_number(a[k]) for k in ("self", "other") if k in a))


def _place(of: Callable[..., np.ndarray]) -> Callable[[Given], Bounded]:
    def rule(a: Given) -> Bounded:
        y = of(a["self"].value, axis=a.get("dim"))
        return Bounded(np.expand_dims(y, a["dim"]) if a.get("keepdim") else y)

    return rule


RULES: Mapping[str, Callable[[Given], Any]] = {
    "view": lambda a: reshaped(a["self"], a["size"]),
    "_unsafe_view": lambda a: reshaped(a["self"], a["size"]),
    "reshape": lambda a: reshaped(a["self"], a["shape"]),
    "_reshape_alias": lambda a: reshaped(a["self"], a["size"]),
    "permute": lambda a: a["self"].moved(lambda e: e.transpose(a["dims"])),
    "transpose": lambda a: a["self"].moved(lambda e: np.swapaxes(e, a["dim0"], a["dim1"])),
    "t": lambda a: a["self"].moved(np.transpose),
    "unsqueeze": _unsqueeze,
    "as_strided": _strided,
    "squeeze": _squeeze,
    "expand": _expand,
    "clone": _keep,
    "_to_copy": _keep,
    "contiguous": _keep,
    "alias": _keep,
    "detach": _keep,
    "lift_fresh": _keep,
    "dropout": _keep,
    "copy": _copy,
    "roll": lambda a: a["self"].moved(lambda e: np.roll(e, a["shifts"], tuple(a["dims"]))),
    "flip": _flip,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "unsafe_split": _split,
    "unbind": _unbind,
    "cat": _joined(np.concatenate),
    "stack": _joined(np.stack),
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "split otherwise": lambda a: a["self"].moved(
        lambda e: e.reshape([a["size"][i] for i in a["axes"]]).transpose(np.argsort(a["axes"]))
    ),
    "convolution": convolution,
    "addmm": _addmm,
    "with kernel": convolution,  # these four are PyTorch's with one setting that it does not have
    "with padding": convolution,
    "with matrix": lambda a: (
        _addmm({**a, "mat2": a["mat2"].moved(np.transpose)})
        if "mat1" in a
        else matmul(a["self"], a["mat2"].moved(np.transpose))
    ),
    "normalized": _normalized,
    "mm": lambda a: matmul(a["self"], a["mat2"]),
    "bmm": lambda a: matmul(a["self"], a["mat2"]),
    "baddbmm": _baddbmm,
    "linear": _linear,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_softmax": lambda a: softmax(a["self"], a["dim"]),
    "_safe_softmax": lambda a: softmax(a["self"], a["dim"]),
    "_log_softmax": _log_softmax,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math": _attention,
    "scaled_dot_product_attention": _attention,
    "mean": _mean,
    "sum": _total,
    "var": _variance,
    "var_mean": _variance,
    "amax": lambda a: re.greatest(a["self"], a["dim"]),
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "upsample_nearest2d": _resize("nearest"),
    "upsample_bilinear2d": _resize("bilinear"),
    "relu": lambda a: re.extreme(np.maximum, a["self"], _number(0.0)),
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardsigmoid": lambda a: _hard_sigmoid(a["self"]),
    "hardswish": lambda a: re.mul(a["self"], _hard_sigmoid(a["self"])),
    "gelu": _gelu,
    "silu": lambda a: re.mul(a["self"], _sigmoid(a["self"])),
    "sigmoid": lambda a: _sigmoid(a["self"]),
    "mish": lambda a: re.mul(a["self"], re.function("tanh", np.tanh, softplus(a["self"]))),
    "softplus": _softplus,
    "leaky_relu": _leaky,
    "elu": _elu,
    "tanh": _unary("tanh", np.tanh),
    "exp": _unary("exp", np.exp),
    "log": _unary("log", np.log),
    "erf": _unary("erf", special.erf),
    "sqrt": _unary("sqrt", np.sqrt),
    "rsqrt": _unary("rsqrt", lambda e: 1 / np.sqrt(e)),
    "sin": _unary("sin", np.sin),
    "cos": _unary("cos", np.cos),
    "neg": lambda a: re.neg(a["self"]),
    "abs": lambda a: re.absolute(a["self"]),
    "reciprocal": lambda a: re.div(_number(1.0), a["self"]),
    "add": _two_operands(re.add),
    "sub": _two_operands(re.sub),
    "rsub": _two_operands(lambda x, z: re.sub(z, x)),
    "mul": _two_operands(re.mul),
    "div": _two_operands(re.div),
    "maximum": _two_operands(lambda x, z: re.extreme(np.maximum, x, z)),
    "minimum": _two_operands(lambda x, z: re.extreme(np.minimum, x, z)),
    "pow": _power,
    "where": _where,
    "masked_fill": _masked_fill,
    "eq": _compared(np.equal),
    "ne": _compared(np.not_equal),
    "lt": _compared(np.less),
    "le": _compared(np.less_equal),
    "gt": _compared(np.greater),
    "ge": _compared(np.greater_equal),
    "bitwise_not": _logical(np.invert),
    "bitwise_and": _logical(np.bitwise_and),
    "bitwise_or": _logical(np.bitwise_or),
    "logical_not": _logical(np.logical_not),
    "logical_and": _logical(np.logical_and),
    "logical_or": _logical(np.logical_or),
    "argmax": _place(np.argmax),
    "argmin": _place(np.argmin),
    "cumsum": lambda a: re.cumulative(a["self"], a["dim"], False),
}
