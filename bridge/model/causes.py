"""Why a region differs: PyTorch's operators with one setting changed, which then give JAX's result in float64.

A cause is proved and not guessed: the changed operators' exact values and JAX's are the same to within the errors of
float64, while those of the unchanged operators are not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bridge.model import aten
from bridge.model.alignment import NORMALIZATIONS, Alignment, Region, layouts
from bridge.model.operation_names import kind_of_call
from bridge.model.running_error import Bounded
from bridge.model.torch_evaluation import evaluate
from bridge.model.torch_graph import Call, Ref


class Cause(NamedTuple):
    """A short, stable name; the cause in a sentence; what to change; and the operator whose change it is."""

    name: str
    text: str
    fix: str
    call: Call | None = None


#: A change: the calls, the values that they start from, and the cause if that gives JAX's result.
Change = tuple[Sequence[Call], Mapping[int, Bounded], Cause]


def cause_of(alignment: Alignment, region: Region) -> Cause | None:
    """Return the cause of a difference, or None where no change of one setting explains it."""
    if any(e.name.startswith(("random_", "threefry", "shift_right_logical")) for e in region.part.equations):
        return Cause(
            "dropout on",
            "JAX draws random numbers here: dropout is on",
            "run the JAX model in inference: model.eval(), or deterministic=True",
        )
    if region.ours is None or not region.part.equations or not any(map(alignment.is_core, region.calls)):
        return None
    for calls, sources, cause in _changes(alignment, region):
        values = dict(sources)
        try:
            for call in calls:
                if all(n in values for n in call.operands):
                    values |= zip(call.outputs, evaluate(call, values))
        except (aten.UnknownOperator, ValueError, KeyError, IndexError, TypeError):
            continue
        result = values.get(region.tie.number)
        if result is not None and result.value.size == region.ours.value.size and _are_equal(region, result):
            return cause
    return None


def _are_equal(region: Region, result: Bounded) -> bool:
    """Return True where a result of PyTorch is JAX's, in the layout of the region or, of another size, in any."""
    assert region.ours is not None
    fitting = [region.tie.layout]
    if result.shape != region.tie.layout.torch:
        fitting = list(itertools.islice(layouts(result.shape, region.ours.shape), 24))
    function = np.broadcast_to(np.asarray(result.function, np.float64), result.shape)
    for layout in fitting:
        value = layout.to_jax(result.value)
        rough = 2.0**-9 * float(np.abs(value[np.isfinite(value)]).max(initial=0.0))  # greater errors say nothing
        with np.errstate(all="ignore"):
            allowed = np.minimum(layout.to_jax(function) + region.ours.function, rough + 1e-30)
            apart = np.abs(value - region.ours.value) > allowed
        finite = np.isfinite(value) == np.isfinite(region.ours.value)
        if finite.all() and not (apart & np.isfinite(value)).any():
            return True
    return False


def _changes(alignment: Alignment, region: Region) -> Iterator[Change]:
    values = {n: Bounded.exact(alignment.graph.values[n]) for n in region.sources}
    for place, call in enumerate(region.calls):
        for change in _RULES.get(call.name, ()):
            for changed, cause in change(alignment, region, call):
                calls = list(region.calls)
                calls[place] = changed
                yield calls, values, cause._replace(call=call)
    data = [n for n in region.sources if n in alignment.data_of_torch]
    for one, other in itertools.combinations(data, 2):
        if values[one].shape == values[other].shape:
            exchanged = values | {one: values[other], other: values[one]}
            a, b = (_as_argument(alignment, region, n) for n in (one, other))
            yield (
                region.calls,
                exchanged,
                Cause("operands exchanged", f"JAX exchanges {a} and {b} of PyTorch", "exchange them back in JAX"),
            )
    yield from _left_out(alignment, region, values)


def _as_argument(alignment: Alignment, region: Region, number: int) -> str:
    """Name a tensor by the argument of an operator that takes it, such as "query"."""
    for call in region.calls:
        for name, value in call.arguments.items():
            is_named = isinstance(value, Ref) and name in ("query", "key", "value")
            if is_named and alignment.is_core(call) and alignment.root(value.number) == number:
                return name
    return alignment.described(number)


def _changed(call: Call, **arguments: Any) -> Call:
    return dataclasses.replace(call, arguments={**call.arguments, **arguments})


def _left_out(alignment: Alignment, region: Region, values: Mapping[int, Bounded]) -> Iterator[Change]:
    """Leave one operator out: its result is its operand."""
    for place, call in enumerate(region.calls):
        if call.name in aten.MOVES:
            continue
        size = alignment.graph.values[call.outputs[0]].size
        name = alignment.described(call.outputs[0])
        for operand in call.operands:
            is_data = operand in alignment.data_of_torch or not alignment.is_core(call)
            if is_data and alignment.graph.values[operand].size == size:
                shape = alignment.graph.values[call.outputs[0]].shape
                calls = list(region.calls)
                calls[place] = Call("view", {"self": Ref(operand), "size": list(shape)}, call.outputs[:1], call.module)
                what = {"add": "sum", "mul": "product"}.get(call.name, call.name)
                own = sorted(alignment.names_of_values.get(call.outputs[0], ()))
                if own and not alignment.is_core(call):
                    name = f"{what} of {own[0]}"
                text = f"JAX lacks PyTorch's {name}" + (f", the {what}" if what != call.name else "")
                yield calls, values, Cause(f"{what} missing", text, f"compute {name} in JAX")


Changes = Iterator[tuple[Call, Cause]]


def _literals(alignment: Alignment, region: Region) -> list[float]:
    """Return the small positive constants of the JAX side."""
    found = []
    for n in region.part.inputs:
        if n in alignment.program.constants and n not in alignment.program.parameters:
            array = np.asarray(alignment.program.constants[n])
            if array.size == 1 and array.dtype.kind == "f" and 0 <= float(array.reshape(())) < 0.2:
                found.append(float(array.reshape(())))
    return found


def _epsilon(alignment: Alignment, region: Region, call: Call) -> Changes:
    own = call.get("eps")
    for eps in dict.fromkeys([*_literals(alignment, region), 1e-3, 1e-5, 1e-6, 1e-8, 1e-12, 0.0]):
        if own is None or not math.isclose(eps, own, rel_tol=1e-6):
            short = float(f"{eps:.3g}")
            eps = short if math.isclose(short, eps, rel_tol=1e-6) else eps
            said = f"epsilon is {np.float32(eps)!s} in JAX, and {own:g} in PyTorch"
            yield _changed(call, eps=eps), Cause("epsilon", said, f"epsilon={own:g} in JAX")


def _parameters_left_out(alignment: Alignment, region: Region, call: Call) -> Changes:
    for name in ("bias", "weight"):
        if (
            isinstance(call.get(name), Ref)
            and call.name in (*NORMALIZATIONS, "convolution")
            and not (name == "weight" and call.name == "convolution")
        ):
            word = "bias" if name == "bias" else "scale"
            yield (
                _changed(call, **{name: None}),
                Cause(f"{word} missing", f"JAX leaves the {word} out", f"use_{word}=True in JAX"),
            )


def _bias_left_out(alignment: Alignment, region: Region, call: Call) -> Changes:
    yield (
        Call("mm", {"self": call.get("mat1"), "mat2": call.get("mat2")}, call.outputs, call.module),
        Cause("bias missing", "JAX leaves the bias out", "use_bias=True in JAX"),
    )


def _other_axes(alignment: Alignment, region: Region, call: Call) -> Changes:
    x = alignment.graph.values[call.get("input").number]
    for axes in (*((axis,) for axis in range(1, x.ndim - 1)), tuple(range(1, x.ndim - 1))):
        yield (
            Call("normalized", {**call.arguments, "axes": axes}, call.outputs, call.module),
            Cause(
                "axis of the norm",
                f"JAX normalizes over the axes {axes} of PyTorch's {x.shape}, and PyTorch over the last",
                "normalize over the channels in JAX: reduction_axes=-1, feature_axes=-1",
            ),
        )
    yield (
        Call("normalized", {**call.arguments, "axes": tuple(range(1, x.ndim))}, call.outputs, call.module),
        Cause(
            "axis of the norm",
            "JAX normalizes over all axes but the batch, and PyTorch over the last",
            "normalize over the channels in JAX: reduction_axes=-1",
        ),
    )
    yield (
        Call("normalized", {**call.arguments, "axes": (x.ndim - 1,), "centred": False}, call.outputs, call.module),
        Cause("mean kept", "JAX does not subtract the mean: it is an RMS norm", "use nnx.LayerNorm in JAX"),
    )
    yield (
        Call("normalized", {**call.arguments, "axes": (x.ndim - 1,), "correction": 1}, call.outputs, call.module),
        Cause("variance", "JAX divides the variance by n - 1, PyTorch by n", "use the biased variance in JAX: ddof=0"),
    )


def _groups(alignment: Alignment, region: Region, call: Call) -> Changes:
    c = alignment.graph.values[call.get("input").number].shape[1]
    own = call.get("group")
    for groups in range(1, c + 1):
        if c % groups == 0 and groups != own:
            yield (
                _changed(call, group=groups),
                Cause("groups of the norm", f"JAX has {groups} groups, and PyTorch {own}", f"num_groups={own} in JAX"),
            )


_KERNELS: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "kernel flipped": (lambda w: np.flip(w, tuple(range(2, w.ndim))), "JAX's kernel is flipped in space"),
    "kernel transposed": (
        lambda w: np.swapaxes(w, -1, -2) if w.ndim == 4 and w.shape[-1] == w.shape[-2] else w[:0],
        "JAX's kernel has height and width exchanged",
    ),
    "channels exchanged": (
        lambda w: np.swapaxes(w, 0, 1) if w.shape[0] == w.shape[1] else w[:0],
        "JAX's kernel has input and output channels exchanged",
    ),
    "channels exchanged and flipped": (
        lambda w: np.flip(np.swapaxes(w, 0, 1), tuple(range(2, w.ndim))) if w.shape[0] == w.shape[1] else w[:0],
        "JAX's kernel has input and output channels exchanged, and is flipped in space",
    ),
}


def _kernels(alignment: Alignment, region: Region, call: Call) -> Changes:
    weight = alignment.graph.values[call.get("weight").number]
    for name, (how, text) in _KERNELS.items():
        if how(weight).shape == weight.shape:
            yield (
                Call("with kernel", {**call.arguments, "how": how}, call.outputs, call.module),
                Cause(name, text, "convert the kernel with bridge.to_flax, and check transpose_kernel"),
            )


def _paddings(alignment: Alignment, region: Region, call: Call) -> Changes:
    x = alignment.graph.values[call.get("input").number]
    rank = x.ndim - 2
    weight = alignment.graph.values[call.get("weight").number]
    kernel = weight.shape[2:]
    stride, padding, dilation = (
        [*call.get(k)] * (rank if len(call.get(k)) == 1 else 1) for k in ("stride", "padding", "dilation")
    )
    if call.get("transposed"):
        return
    own = tuple((p, p) for p in padding)
    spans = [(k - 1) * d for k, d in zip(kernel, dilation)]
    needed = [max((-(-n // s) - 1) * s + span + 1 - n, 0) for n, s, span in zip(x.shape[2:], stride, spans)]
    is_causal = padding == spans and any(each.name == "slice" for each in region.calls)
    kind = ", and cuts the end off, as a causal convolution" if is_causal else ""
    fix = 'padding="CAUSAL" in JAX' if is_causal and rank == 1 else f"padding={own} in JAX"
    options = {
        "SAME": tuple((t // 2, t - t // 2) for t in needed),
        "the padding at the start alone": tuple((t, 0) for t in spans),
        "the padding at the end alone": tuple((0, t) for t in spans),
        "no padding": ((0, 0),) * rank,
    }
    for name, pads in options.items():
        if pads != own:
            yield (
                Call("with padding", {**call.arguments, "pads": pads}, call.outputs, call.module),
                Cause("padding", f"JAX pads by {name}, {pads}, and PyTorch by {own}{kind}", fix),
            )


def _pooling(alignment: Alignment, region: Region, call: Call) -> Changes:
    """Try other paddings of a pooling, and another number by which an average divides."""
    x = alignment.graph.values[call.get("self").number]
    window = [*call.get("kernel_size")] * (2 if len(call.get("kernel_size")) == 1 else 1)
    stride, padding = [*(call.get("stride") or window)], [*(call.get("padding") or [0])]
    stride, padding = (each * (2 if len(each) == 1 else 1) for each in (stride, padding))
    wanted, own = alignment.graph.values[call.outputs[0]].shape[2:], tuple((p, p) for p in padding)
    if call.name == "avg_pool2d" and any(padding) and not call.get("divisor_override"):
        counts = bool(call.get("count_include_pad", True))
        text = "does not count the padding" if counts else "counts the padding"
        yield (
            _changed(call, count_include_pad=not counts),
            Cause("padding counted", f"JAX {text} in the average", f"count_include_pad={counts} in JAX"),
        )
    needed = [max((n - 1) * s + k - size, 0) for n, s, k, size in zip(wanted, stride, window, x.shape[2:])]
    for name, pads in {"SAME": tuple((t // 2, t - t // 2) for t in needed), "no padding": ((0, 0),) * 2}.items():
        if pads != own:
            yield (
                _changed(call, pads=pads),
                Cause("padding", f"JAX pads by {name}, {pads}, and PyTorch by {own}", f"padding={own} in JAX"),
            )


def _pads(alignment: Alignment, region: Region, call: Call) -> Changes:
    """Try other numbers of zeros before and after each axis, as a causal convolution has them before alone."""
    own = tuple(zip(call.get("pad")[::2], call.get("pad")[1::2]))[::-1]  # PyTorch begins with the last axis
    is_causal = any(before for before, _ in own) and not any(after for _, after in own)
    kind = ", before alone, as a causal convolution does" if is_causal else ""
    fix = f"padding {own} as in PyTorch" + (': padding="CAUSAL" in one dimension' if is_causal else "")
    options = {
        "on the other side": tuple((after, before) for before, after in own),
        "by SAME": tuple(((a + b) // 2, (a + b + 1) // 2) for a, b in own),
        "as much on both sides": tuple((max(each), max(each)) for each in own),
        "by nothing": ((0, 0),) * len(own),
    }
    for how, pads in options.items():
        if pads != own:
            yield (
                _changed(call, pad=[n for each in pads[::-1] for n in each]),
                Cause("padding", f"JAX pads {how}, {pads}, and PyTorch by {own}{kind}", fix),
            )


def _strides(alignment: Alignment, region: Region, call: Call) -> Changes:
    kernel = alignment.graph.values[call.get("weight").number].shape[2:]
    own = call.get("dilation")
    for n in (1, 2, 3):
        if set(own) != {n} and not call.get("transposed"):  # with the padding that keeps the size
            yield (
                _changed(call, dilation=[n] * len(kernel), padding=[n * (k - 1) // 2 for k in kernel]),
                Cause(
                    "dilation", f"dilation is {n} in JAX, and {tuple(own)} in PyTorch", f"dilation {tuple(own)} in JAX"
                ),
            )
    for name in ("dilation", "stride"):
        own = call.get(name)
        for n in (1, 2, 3):
            if set(own) != {n} and not call.get("transposed"):
                yield (
                    _changed(call, **{name: [n] * len(own)}),
                    Cause(name, f"{name} is {n} in JAX, and {tuple(own)} in PyTorch", f"{name} {tuple(own)} in JAX"),
                )


def _square_matrix(alignment: Alignment, region: Region, call: Call) -> Changes:
    w = alignment.graph.values[call.get("mat2").number]
    if w.shape[0] == w.shape[1]:
        yield (
            Call("with matrix", {**call.arguments}, call.outputs, call.module),
            Cause("kernel transposed", "JAX's kernel is transposed", "transpose the kernel: PyTorch's is (out, in)"),
        )


def _other_axis(alignment: Alignment, region: Region, call: Call) -> Changes:
    """Try the other axes of a reduction, a softmax or a running sum."""
    x, own = alignment.graph.values[call.get("self").number], call.get("dim")
    one = own[0] if isinstance(own, list) and len(own) == 1 else own
    options: list[Any] = list(range(x.ndim))
    if isinstance(own, list) and len(own) > 1:
        one, options = tuple(sorted(d % x.ndim for d in own)), list(itertools.combinations(range(x.ndim), len(own)))
    for axis in options:
        if axis != (one % x.ndim if isinstance(one, int) else one):
            what = kind_of_call(call)
            of = "all axes" if one is None else f"axis {one}" if isinstance(one, int) else f"axes {one}"
            text = f"JAX takes the {what} over axis {axis} of PyTorch's {x.shape}, and PyTorch over {of}"
            if isinstance(axis, tuple):
                text = text.replace("axis", "axes", 1)
            dim = [axis] if isinstance(own, list) and isinstance(axis, int) else axis
            yield (
                _changed(call, dim=list(dim) if isinstance(dim, tuple) else dim),
                Cause(f"axis of {what}", text, f"take it over {of} of PyTorch's {x.shape}"),
            )


def _attention_scale(alignment: Alignment, region: Region, call: Call) -> Changes:
    d = alignment.graph.values[call.get("query").number].shape[-1]
    own = call.get("scale") or 1 / math.sqrt(d)
    for name, scale in (("1", 1.0), ("1 / d", 1 / d), ("sqrt(d)", math.sqrt(d))):
        yield (
            _changed(call, scale=scale),
            Cause("scale of attention", f"JAX scales by {name}, and PyTorch by {own:.4g}", f"scale {own:.4g} in JAX"),
        )
    for causal in (True, False):
        if bool(call.get("is_causal")) != causal:
            word = "masks the future" if causal else "has no causal mask"
            yield (
                _changed(call, is_causal=causal),
                Cause("mask of attention", f"JAX {word}, other than PyTorch", f"is_causal={not causal} in JAX"),
            )
    for name in ("attn_mask", "attn_bias"):
        if isinstance(call.get(name), Ref):
            yield _changed(call, **{name: None}), Cause("mask of attention", "JAX has no mask", "pass the mask in JAX")


def _factor(alignment: Alignment, region: Region, call: Call) -> Changes:
    """Try other numbers in the place of a number."""
    own = call.get("other")
    if isinstance(own, Ref):
        return
    what = "the number"
    if call.name == "add" and any(
        c.name in ("rsqrt", "sqrt") and call.outputs[0] in c.operands for c in alignment.graph.calls
    ):
        what = "epsilon"
    for value in dict.fromkeys([1.0, *_numbers(alignment, region)]):
        if value != own:
            yield (
                _changed(call, other=value),
                Cause(
                    "epsilon" if what == "epsilon" else "factor",
                    f"{what} is {value:g} in JAX, and {own:g} in PyTorch",
                    f"use {own:g} in JAX",
                ),
            )


def _numbers(alignment: Alignment, region: Region) -> list[float]:
    found = []
    for n in region.part.inputs:
        if n in alignment.program.constants and n not in alignment.program.parameters:
            array = np.asarray(alignment.program.constants[n])
            if array.size == 1 and array.dtype.kind == "f":
                found.append(float(array.reshape(())))
    return found


def _split_otherwise(alignment: Alignment, region: Region, call: Call) -> Changes:
    """Try other orders of the axes into which a view splits one axis, as heads before q, k and v."""
    x, size = alignment.graph.values[call.get("self").number], alignment.graph.values[call.outputs[0]].shape
    start = next((i for i, (a, b) in enumerate(zip(x.shape, size)) if a != b), len(size))
    count = len(size) - x.ndim + 1
    split = size[start : start + count]
    if 1 < count < 5 and start < x.ndim and math.prod(split) == x.shape[start]:
        for order in itertools.permutations(range(count)):
            if [split[i] for i in order] != list(split):
                axes = (*range(start), *(start + i for i in order), *range(start + count, len(size)))
                given = tuple(split[i] for i in order)
                yield (
                    Call("split otherwise", {**call.arguments, "axes": axes, "size": size}, call.outputs, call.module),
                    Cause(
                        "order of axes",
                        f"JAX splits axis {start} of PyTorch's {x.shape} in the order {given}, and PyTorch as {split}",
                        f"reshape it to {split} in JAX",
                    ),
                )


def _order_of_parts(alignment: Alignment, region: Region, call: Call) -> Changes:
    parts = call.get("tensors")
    for order in itertools.permutations(range(len(parts))) if len(parts) < 6 else [tuple(range(len(parts)))[::-1]]:
        if list(order) != sorted(order):
            yield (
                _changed(call, tensors=[parts[i] for i in order]),
                Cause("order of parts", f"JAX joins PyTorch's parts in another order, {order}", "join them in order"),
            )


def _correction(alignment: Alignment, region: Region, call: Call) -> Changes:
    own = call.get("correction", 1)
    for n in (0, 1):
        if n != own:
            yield (
                _changed(call, correction=n),
                Cause("variance", f"JAX divides the variance by n - {n}", f"divide it by n - {own} in JAX"),
            )


def _batch_statistics(alignment: Alignment, region: Region, call: Call) -> Changes:
    if call.get("running_mean") is not None and not call.get("training", False):
        yield (
            Call("native_batch_norm", {**call.arguments, "training": True}, call.outputs, call.module),
            Cause(
                "statistics of the batch",
                "JAX normalizes by the statistics of this batch, and PyTorch by the running ones",
                "run the JAX model in inference: model.eval(), or use_running_average=True",
            ),
        )


_NORM = (_epsilon, _parameters_left_out)
_RULES: Mapping[str, Sequence[Callable[[Alignment, Region, Call], Changes]]] = {
    "native_layer_norm": (*_NORM, _other_axes),
    "_fused_rms_norm": _NORM,
    "native_group_norm": (*_NORM, _groups),
    "native_batch_norm": (*_NORM, _batch_statistics),
    "_native_batch_norm_legit": (*_NORM, _batch_statistics),
    "_native_batch_norm_legit_no_training": (*_NORM, _batch_statistics),
    "convolution": (_parameters_left_out, _kernels, _paddings, _strides),
    "addmm": (_bias_left_out, _square_matrix),
    "mm": (_square_matrix,),
    "constant_pad_nd": (_pads,),
    **dict.fromkeys(("_softmax", "_log_softmax", "mean", "sum", "amax", "argmax", "argmin", "cumsum"), (_other_axis,)),
    "_scaled_dot_product_flash_attention_for_cpu": (_attention_scale,),
    "max_pool2d_with_indices": (_pooling,),
    "avg_pool2d": (_pooling,),
    "cat": (_order_of_parts,),
    "view": (_split_otherwise,),
    "_unsafe_view": (_split_otherwise,),
    "mul": (_factor,),
    "div": (_factor,),
    "add": (_factor,),
    "var": (_correction, _other_axis),
    "var_mean": (_correction, _other_axis),
}
