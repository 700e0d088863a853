"""PyTorch's operators of the backward pass in float64 with running errors, as `bridge.model.aten` has those of the
forward pass.

An operator that returns only some of its gradients, by `output_mask`, has only these results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from bridge.model import float64
from bridge.model import running_error as re
from bridge.model.aten import (
    Given,
    UnknownOperator,
    attention_weights,
    convolution,
    matmul,
    reshaped,
    resize_matrices,
    resized,
    softplus,
)
from bridge.model.running_error import Bounded


def _number(value: float) -> Bounded:
    return Bounded.exact(np.float64(value))


def _constant(value: float) -> Bounded:
    return Bounded.constant(np.float64(value))


def _masked(a: Given, *gradients: Callable[[], Bounded]) -> list[Bounded]:
    """Return the gradients that are asked for."""
    return [gradient() for gradient, is_asked in zip(gradients, a["output_mask"]) if is_asked]


def _convolution(a: Given) -> list[Bounded]:
    x, w, dy = a["input"], a["weight"], a["grad_output"]
    rank = len(x.shape) - 2
    stride, padding, dilation = ([*a[k]] * (rank if len(a[k]) == 1 else 1) for k in ("stride", "padding", "dilation"))
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": a["groups"], "weight": w}

    def of_x() -> Bounded:
        if a["transposed"]:
            return convolution({**settings, "input": dy, "transposed": False})
        spans = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(dy.shape[2:], stride, padding, dilation, w.shape[2:])
        ]
        out = [n - span for n, span in zip(x.shape[2:], spans)]
        return convolution({**settings, "input": dy, "transposed": True, "output_padding": out})

    def of_w() -> Bounded:
        small, large = (dy, x) if not a["transposed"] else (x, dy)  # w[s, l] sums small[s] large[l]
        terms = small.shape[0] * math.prod(small.shape[2:])

        def of(large: np.ndarray, small: np.ndarray) -> np.ndarray:
            return float64.kernel_gradient(
                np.moveaxis(large, 1, -1),
                np.moveaxis(small, 1, -1),
                kernel=w.shape[2:],
                strides=stride,
                padding=[(p, p) for p in padding],
                dilation=dilation,
                groups=a["groups"],
            ).transpose(rank + 1, rank, *range(rank))

        return re.bilinear(of, large, small, terms)

    axes = [i for i in range(len(dy.shape)) if i != 1]
    return _masked(a, of_x, of_w, lambda: re.total(dy, axes))


def _of_norm(
    a: Given,
    x: Bounded,
    dy: Bounded,
    m: Bounded,
    root: Bounded,
    w: Bounded | None,
    axes: Sequence[int],
    is_fixed: bool = False,
) -> Bounded:
    """Return the gradient by x of (x - m) root w, where m and root are statistics over axes, or fixed."""
    scaled = dy if w is None else re.mul(dy, w)
    if is_fixed:
        return re.mul(dy, root if w is None else re.mul(root, w))
    keep = [1 if i in axes else n for i, n in enumerate(x.shape)]
    centred = a.get("centred", True)
    hat = re.mul(re.sub(x, m) if centred else x, root)
    inner = re.mul(hat, reshaped(re.mean(re.mul(scaled, hat), axes), keep))
    d = re.sub(scaled, inner)
    if centred:
        d = re.sub(d, reshaped(re.mean(scaled, axes), keep))
    y = re.mul(d, root)
    # or as dy w root - (x - m) root^3 mean(...): four roundings more of each term
    size = (np.abs(scaled.value) + np.abs(inner.value) + np.abs(np.asarray(d.value - scaled.value))) * np.abs(
        root.value
    )
    return Bounded(y.value, np.asarray(y.rounding) + 16 * 2.0**-24 * size, y.function)


def _of_scale(x: Bounded, dy: Bounded, m: Bounded, root: Bounded, axes: Sequence[int], centred: bool = True) -> Bounded:
    """Return sum dy (x - m) root; it may be computed as (sum dy x - m sum dy) root."""
    y = re.total(re.mul(dy, re.mul(re.sub(x, m) if centred else x, root)), axes)
    if not centred:
        return y
    n = math.prod(x.shape[i] for i in axes)
    size = (np.abs(dy.value) * (np.abs(x.value) + np.abs(m.value)) * np.abs(root.value)).sum(tuple(axes))
    return Bounded(y.value, np.asarray(y.rounding) + ((1 + 2.0**-24) ** (n + 4) - 1) * size, y.function)


def _batch_norm(a: Given) -> list[Bounded]:
    x, dy, w = a["input"], a["grad_out"], a.get("weight")
    axes = [i for i in range(len(x.shape)) if i != 1]
    each = [-1 if i == 1 else 1 for i in range(len(x.shape))]
    if a["train"]:
        m, root = reshaped(a["save_mean"], each), reshaped(a["save_invstd"], each)
    else:
        m = reshaped(a["running_mean"], each)
        root = re.function(
            "rsqrt", lambda e: 1 / np.sqrt(e), re.add(reshaped(a["running_var"], each), _number(a["eps"]))
        )
    wide = None if w is None else reshaped(w, each)
    return _masked(
        a,
        lambda: _of_norm(a, x, dy, m, root, wide, axes, not a["train"]),
        lambda: _of_scale(x, dy, m, root, axes),
        lambda: re.total(dy, axes),
    )


def _layer_norm(a: Given) -> list[Bounded]:
    x, dy, rank = a["input"], a["grad_out"], len(a["normalized_shape"])
    axes, outer = list(range(len(x.shape) - rank, len(x.shape))), list(range(len(x.shape) - rank))
    m, root = (reshaped(a[k], [*x.shape[: len(outer)], *[1] * rank]) for k in ("mean", "rstd"))
    return _masked(
        a,
        lambda: _of_norm(a, x, dy, m, root, a.get("weight"), axes),
        lambda: _of_scale(x, dy, m, root, outer),
        lambda: re.total(dy, outer),
    )


def _rms_norm(a: Given) -> list[Bounded]:
    x, dy, rank = a["input"], a["grad_out"], len(a["normalized_shape"])
    axes, outer = list(range(len(x.shape) - rank, len(x.shape))), list(range(len(x.shape) - rank))
    root, zero = reshaped(a["rstd"], [*x.shape[: len(outer)], *[1] * rank]), _number(0.0)
    given = {**a, "centred": False}
    return _masked(
        a,
        lambda: _of_norm(given, x, dy, zero, root, a.get("weight"), axes),
        lambda: _of_scale(x, dy, zero, root, outer, False),
    )


def _group_norm(a: Given) -> list[Bounded]:
    n, c, groups = a["N"], a["C"], a["group"]
    shape = a["input"].shape
    x, dy = (reshaped(a[k], [n, groups, c // groups, -1]) for k in ("input", "grad_out"))
    m, root = (reshaped(a[k], [n, groups, 1, 1]) for k in ("mean", "rstd"))
    w = None if a.get("weight") is None else reshaped(a["weight"], [1, groups, c // groups, 1])
    return _masked(
        a,
        lambda: reshaped(_of_norm(a, x, dy, m, root, w, [2, 3]), shape),
        lambda: reshaped(_of_scale(x, dy, m, root, [0, 3]), [c]),
        lambda: reshaped(re.total(dy, [0, 3]), [c]),
    )


def _chosen(is_kept: Callable[[Given, np.ndarray], np.ndarray], name: str = "self") -> Callable[[Given], Bounded]:
    """Return the gradient of a clamp: dy where the operand is between the ends, else 0."""

    def rule(a: Given) -> Bounded:
        return re.select(Bounded(is_kept(a, a[name].value)), _number(0.0), a["grad_output"])

    return rule


def _gelu(a: Given) -> Bounded:
    x, dy, half = a["self"], a["grad_output"], _number(0.5)
    if a.get("approximate", "none") == "tanh":
        k = _constant(math.sqrt(2 / math.pi))
        t = re.function("tanh", np.tanh, re.mul(k, re.add(x, re.mul(_constant(0.044715), re.power(x, 3)))))
        slope = re.mul(k, re.add(_number(1.0), re.mul(_constant(3 * 0.044715), re.mul(x, x))))
        inner = re.mul(re.sub(_number(1.0), re.mul(t, t)), slope)
        gate = re.add(re.mul(half, re.add(_number(1.0), t)), re.mul(re.mul(half, x), inner))
        return re.mul(dy, gate)
    scaled = re.mul(x, _constant(math.sqrt(0.5)))
    gate = re.mul(half, re.add(_number(1.0), re.function("erf", special.erf, scaled)))
    density = re.mul(
        _constant(1 / math.sqrt(2 * math.pi)), re.function("exp", np.exp, re.mul(_number(-0.5), re.mul(x, x)))
    )
    made = re.mul(dy, re.add(gate, re.mul(x, density)))
    exact = 0.5 * special.erfc(-x.value * math.sqrt(0.5)) + x.value * np.exp(-0.5 * x.value**2) / math.sqrt(2 * math.pi)
    return Bounded(dy.value * exact, made.rounding, made.function)


def _sigmoid(x: Bounded) -> Bounded:
    return re.function("logistic", special.expit, x)


def _silu(a: Given) -> Bounded:
    x, dy, one = a["self"], a["grad_output"], _number(1.0)
    s = _sigmoid(x)
    slope = re.mul(s, re.add(one, re.mul(x, re.sub(one, s))))
    return re.mul(dy, slope)


def _from_sigmoid(a: Given) -> Bounded:
    y, one = a["output"], _number(1.0)
    return re.mul(a["grad_output"], re.mul(y, re.sub(one, y)))


def _from_tanh(a: Given) -> Bounded:
    y = a["output"]
    return re.mul(a["grad_output"], re.sub(_number(1.0), re.mul(y, y)))


def _hard_swish(a: Given) -> Bounded:
    x, dy = a["self"], a["grad_output"]
    middle = re.mul(dy, re.add(re.div(x, _number(3.0)), _number(0.5)))
    which = np.where(x.value <= -3, 0, np.where(x.value < 3, 1, 2))
    return re.select(Bounded(which), Bounded(np.zeros(())), middle, dy)


def _hard_sigmoid(a: Given) -> Bounded:
    x, dy = a["self"].value, a["grad_output"]
    return re.select(Bounded((x > -3) & (x < 3)), _number(0.0), re.div(dy, _number(6.0)))


def _elu(a: Given) -> Bounded:
    x, dy = a["self_or_result"], a["grad_output"]
    if a["is_result"] or a["scale"] != 1 or a["input_scale"] != 1:
        raise UnknownOperator("elu_backward with scales, or from the result")
    low = re.mul(dy, re.mul(_constant(a["alpha"]), re.function("exp", np.exp, x)))
    return re.select(Bounded(x.value > 0), low, dy)


def _leaky(a: Given) -> Bounded:
    down = re.mul(a["grad_output"], _constant(a["negative_slope"]))
    return re.select(Bounded(a["self"].value > 0), down, a["grad_output"])


def _mish(a: Given) -> Bounded:
    x, dy, one = a["self"], a["grad_output"], _number(1.0)
    t = re.function("tanh", np.tanh, softplus(x))
    slope = re.mul(re.mul(x, _sigmoid(x)), re.sub(one, re.mul(t, t)))
    return re.mul(dy, re.add(t, slope))


def _softplus(a: Given) -> Bounded:
    if a.get("beta", 1) != 1 or a.get("threshold", 20) != 20:
        raise UnknownOperator("softplus_backward with a beta or threshold of its own")
    return re.mul(a["grad_output"], _sigmoid(a["self"]))


def _softmax(a: Given) -> Bounded:
    y, dy, axis = a["output"], a["grad_output"], a["dim"] % len(a["output"].shape)
    keep = [1 if i == axis else n for i, n in enumerate(y.shape)]
    both = re.mul(dy, y)
    made = re.mul(re.sub(dy, reshaped(re.total(both, (axis,)), keep)), y)
    # or y dy - y sum(y dy)
    return Bounded(made.value, np.asarray(made.rounding) + 4 * 2.0**-24 * np.abs(both.value), made.function)


def _log_softmax(a: Given) -> Bounded:
    y, dy, axis = a["output"], a["grad_output"], a["dim"] % len(a["output"].shape)
    keep = [1 if i == axis else n for i, n in enumerate(y.shape)]
    return re.sub(dy, re.mul(re.function("exp", np.exp, y), reshaped(re.total(dy, (axis,)), keep)))


def _attention(a: Given) -> list[Bounded]:
    """Return the gradients by query, key and value, by way of the weights of the attention."""
    q, k, v, dy = a["query"], a["key"], a["value"], a["grad_out"]

    def turned(x: Bounded) -> Bounded:
        return x.moved(lambda e: np.swapaxes(e, -1, -2))

    scale = a.get("scale")
    factor = _constant(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    p = attention_weights(a)
    dp = matmul(dy, turned(v))
    inner = re.total(re.mul(dp, p), (-1 % len(p.shape),))
    ds = re.mul(re.mul(p, re.sub(dp, reshaped(inner, [*inner.shape, 1]))), factor)
    # the sum may be that of dy and the rounded output
    extra = 8 * 2.0**-24 * matmul(absolute(dy), turned(absolute(v))).value * p.value * abs(float(factor.value))
    ds = Bounded(ds.value, np.asarray(ds.rounding) + p.shape[-1] * extra, ds.function)
    return [matmul(ds, k), matmul(turned(ds), q), matmul(turned(p), dy)]


def absolute(x: Bounded) -> Bounded:
    return Bounded(np.abs(x.value))


def _added_at(places: np.ndarray, size: int, x: Bounded, terms: int) -> Bounded:
    """Return zeros `(rows, size)` to which `(rows, n)` is added at places `(rows, n)`."""

    def of(e: np.ndarray, _: np.ndarray) -> np.ndarray:
        y = np.zeros((len(e), size))
        np.add.at(y, (np.arange(len(e))[:, None], places), e)
        return y

    return re.bilinear(of, x, Bounded(np.ones(())), terms)


def _max_pool(a: Given) -> Bounded:
    x, dy = a["self"], a["grad_output"]
    rows, size = math.prod(x.shape[:2]), math.prod(x.shape[2:])
    places = a["indices"].value.reshape(rows, -1)
    terms = math.prod([*a["kernel_size"]] * (2 if len(a["kernel_size"]) == 1 else 1))
    return reshaped(_added_at(places, size, reshaped(dy, [rows, -1]), terms), x.shape)


def _embedding(a: Given) -> Bounded:
    dy, places = a["grad_output"], a["indices"].value.ravel()
    if a["scale_grad_by_freq"] or a["padding_idx"] >= 0:
        raise UnknownOperator("embedding_dense_backward with a padding index or scaling")
    width = dy.shape[-1]
    rows = reshaped(dy, [-1, width]).moved(np.transpose)
    terms = int(np.bincount(places).max(initial=1))
    return _added_at(np.broadcast_to(places, (width, places.size)), a["num_weights"], rows, terms).moved(np.transpose)


def _average_pool(a: Given) -> Bounded:
    x, window = a["self"], a["kernel_size"]
    window, stride, padding = ([*n] * (2 if len(n) == 1 else 1) for n in (window, a["stride"] or window, a["padding"]))
    if a["ceil_mode"] or not a["count_include_pad"] or a["divisor_override"]:
        raise UnknownOperator("avg_pool2d_backward with ceil_mode, a divisor or uncounted padding")
    matrices = []
    for n, out, k, s, p in zip(x.shape[2:], a["grad_output"].shape[2:], window, stride, padding):
        matrix = np.zeros((n, out))
        for i in range(out):
            matrix[max(i * s - p, 0) : max(i * s - p + k, 0), i] = 1 / k
        matrices.append(matrix)
    return resized(a["grad_output"], matrices)


def _adaptive_pool(a: Given) -> Bounded:
    matrices = []
    for n, out in zip(a["self"].shape[2:], a["grad_output"].shape[2:]):
        matrix = np.zeros((n, out))
        for i in range(out):
            low, high = i * n // out, -(-(i + 1) * n // out)
            matrix[low:high, i] = 1 / (high - low)
        matrices.append(matrix)
    return resized(a["grad_output"], matrices)


def _resize(mode: str) -> Callable[[Given], Bounded]:
    def rule(a: Given) -> Bounded:
        each = resize_matrices(a, a["input_size"][2:], a["output_size"], mode)
        return resized(a["grad_output"], [matrix.T for matrix in each])

    return rule


def _within(a: Given, cut: tuple[Any, ...]) -> Bounded:
    """Return zeros of the input's size with the gradient at a place."""

    def placed(e: np.ndarray) -> np.ndarray:
        y = np.zeros(a["input_sizes"])
        y[cut] = e
        return y

    return a["grad_output"].moved(placed)


def _slice(a: Given) -> Bounded:
    end = None if a["end"] > 2**40 else a["end"]
    cut = [slice(None)] * len(a["input_sizes"])
    cut[a["dim"]] = slice(a["start"], end, a["step"])
    return _within(a, tuple(cut))


def _select(a: Given) -> Bounded:
    cut: list[Any] = [slice(None)] * len(a["input_sizes"])
    cut[a["dim"]] = a["index"]
    return _within(a, tuple(cut))


RULES: Mapping[str, Callable[[Given], Any]] = {
    "convolution_backward": _convolution,
    "native_batch_norm_backward": _batch_norm,
    "native_layer_norm_backward": _layer_norm,
    "native_group_norm_backward": _group_norm,
    "_fused_rms_norm_backward": _rms_norm,
    "threshold_backward": _chosen(lambda a, x: x > a["threshold"]),
    "hardtanh_backward": _chosen(lambda a, x: (x > a["min_val"]) & (x < a["max_val"])),
    "gelu_backward": _gelu,
    "silu_backward": _silu,
    "sigmoid_backward": _from_sigmoid,
    "tanh_backward": _from_tanh,
    "hardswish_backward": _hard_swish,
    "hardsigmoid_backward": _hard_sigmoid,
    "elu_backward": _elu,
    "leaky_relu_backward": _leaky,
    "mish_backward": _mish,
    "softplus_backward": _softplus,
    "_softmax_backward_data": _softmax,
    "_log_softmax_backward_data": _log_softmax,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention,
    "max_pool2d_with_indices_backward": _max_pool,
    "avg_pool2d_backward": _average_pool,
    "_adaptive_avg_pool2d_backward": _adaptive_pool,
    "upsample_nearest2d_backward": _resize("nearest"),
    "upsample_bilinear2d_backward": _resize("bilinear"),
    "embedding_dense_backward": _embedding,
    "slice_backward": _slice,
    "select_backward": _select,
}
