"""What equations of JAX and operators of PyTorch are called in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.model.alignment import Alignment
from bridge.model.jaxprs import Equation
from bridge.model.torch_graph import Call

#: What PyTorch's operators are called.
KINDS: Mapping[str, str] = {
    "convolution": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "matrix product",
    "baddbmm": "matrix product",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "_native_batch_norm_legit_no_training": "batch norm",
    "native_layer_norm": "layer norm",
    "native_group_norm": "group norm",
    "_fused_rms_norm": "rms norm",
    "hardswish": "hard swish",
    "hardsigmoid": "hard sigmoid",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "mul": "multiply",
    "threshold": "relu",
    "embedding_dense": "embedding",
    "max_pool2d_with_indices": "max pool",
    "avg_pool2d": "average pool",
    "_adaptive_avg_pool2d": "average pool",
    "upsample_nearest2d": "resize (nearest)",
    "upsample_bilinear2d": "resize (bilinear)",
}

#: What JAX's primitives are called.
_PRIMITIVES = {
    "mul": "multiply",
    "reduce_sum": "sum",
    "reduce_max": "maximum",
    "reduce_min": "minimum",
    "select_n": "where",
    "select_and_scatter_add": "max pool gradient",
    "scatter-add": "sum at indices",
}

#: More operations than these are told by their number.
_TOLD = 3


def kind_of_call(call: Call) -> str:
    if call.name == "gelu" and call.get("approximate") == "tanh":
        return "gelu (tanh)"
    if call.name == "convolution" and call.get("transposed"):
        return "transposed convolution"
    if "_backward" in call.name:
        forward = call.name.partition("_backward")[0]
        return f"{KINDS.get(forward, forward)} gradient"
    return KINDS.get(call.name, call.name)


def kind_of_convolution(alignment: Alignment, call: Call) -> str:
    weight = alignment.graph.values[call.get("weight").number].shape
    if call.get("transposed"):
        return "transposed convolution"
    if call.get("groups") > 1 and weight[1] == 1:
        return "depthwise"
    return "pointwise" if set(weight[2:]) == {1} else "convolution"


def kind_of_ours(equations: Sequence[Equation]) -> str:
    """Return what equations compute, by the functions that they are in and by their primitives."""
    names = [e.name for e in equations]
    some = set(names)
    kinds = []
    calls = list(dict.fromkeys(e.call for e in equations if e.call))
    if {"reduce_max", "exp", "reduce_sum"} <= some:
        kinds.append("softmax")
    elif some & {"rsqrt", "sqrt"} and "reduce_sum" in some:
        over_batch = any(e.name == "reduce_sum" and 0 in e.params["axes"] for e in equations)
        kinds.append("batch norm of this batch" if over_batch else "layer norm" if "sub" in some else "rms norm")
    elif some & {"rsqrt", "sqrt"}:
        kinds.append("batch norm")
    elif {"reduce_sum", "div"} <= some:
        kinds.append("mean")
    for primitive, kind in (
        ("conv_general_dilated", "convolution"),
        ("depthwise_conv", "depthwise"),
        ("dot_general", "matrix product"),
        ("product", "matrix product"),
        ("reduce_window_max", "max pool"),
        ("reduce_window_sum", "window sum"),
    ):
        if primitive in some:
            kinds.append(kind)
    if not kinds and calls:
        return joined(calls)
    return " and ".join(kinds) if kinds else joined([_PRIMITIVES.get(n, n) for n in dict.fromkeys(names)])


def joined(kinds: Sequence[str]) -> str:
    """Return several operations in words: all, or how many there are.

    >>> joined(["sub", "div"]), joined(["linear", "relu", "linear", "add"])
    ('sub and then div', '4 operations from linear to add')
    """
    if len(kinds) > _TOLD:
        return f"{len(kinds)} operations from {kinds[0]} to {kinds[-1]}"
    return " and then ".join(kinds)
