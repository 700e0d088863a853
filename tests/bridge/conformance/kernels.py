"""Kernels with one planted fault each, and kernels without; no test is here."""

import dataclasses
import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import lax

import jaxdw


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kernel with a planted fault.

    Attributes:
      kernel: the kernel; kind: what it should compute.
      check: the check that must fail.
      said: a pattern of the failure's sentence.
    """

    kernel: Callable
    kind: str
    check: str
    said: str


FAULTS: dict[str, Fault] = {}
CLEAN: dict[str, tuple[Callable, str, dict]] = {}


def fault(kind, check, said=""):
    def register(kernel):
        FAULTS[kernel.__name__] = Fault(kernel, kind, check, said)
        return kernel

    return register


def clean(kind, **options):
    def register(kernel):
        CLEAN[kernel.__name__] = (kernel, kind, options)
        return kernel

    return register


@clean("depthwise")
def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])


@clean("causal")
def conv1d_padded(x, weight, bias=None):
    return F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=x.shape[1])


@clean("causal")
def conv1d_cut(x, weight, bias=None):
    return F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[1])[..., : x.shape[-1]]


@clean("transpose", accumulator="same")
def conv_transpose2d(x, weight, bias=None, stride=1, padding=0, output_padding=0, dilation=1):
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, x.shape[1], dilation)


@clean("depthwise")
def lax_conv(x, kernel, bias=None, strides=(1, 1), padding=((0, 0), (0, 0)), rhs_dilation=(1, 1)):
    names = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, kernel, strides, padding, None, rhs_dilation, names, feature_group_count=x.shape[-1]
    )
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


CLEAN["depthwise_conv"] = (jaxdw.depthwise_conv, "depthwise", {})
CLEAN["causal_conv1d"] = (jaxdw.causal_conv1d, "causal", {})
CLEAN["depthwise_conv_transpose"] = (jaxdw.depthwise_conv_transpose, "transpose", {})
CLEAN["Conv2d"] = (torch.nn.Conv2d, "depthwise", {})


@clean("causal")
def causal_conv1d_fn(x, weight, bias=None, initial_states=None, return_final_states=False, activation=None):
    """As the library of that name: x (batch, dim, length), weight (dim, width)."""
    size = weight.shape[-1] - 1
    before = x.new_zeros(*x.shape[:2], size) if initial_states is None else initial_states
    inputs = torch.cat([before, x], dim=-1)
    y = F.conv1d(inputs, weight[:, None], bias, groups=x.shape[1])
    y = F.silu(y) if activation == "silu" else y
    return (y, inputs[..., inputs.shape[-1] - size :]) if return_final_states else y


@clean("depthwise")
def numpy_loop(x, kernel, bias=None, stride=1, padding=0):
    """NumPy, as a runtime without gradients."""
    strides, pads = (np.broadcast_to(each, 2) for each in (stride, padding))
    x = np.pad(x, ((0, 0), *((p, p) for p in pads), (0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape, strides))
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]), np.float64)
    for i, j in np.ndindex(kernel.shape[:2]):
        window = x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1]
        y += window[:, :, :: strides[1]].astype(np.float64) * kernel[i, j, 0].astype(np.float64)
    return (y if bias is None else y + bias).astype(x.dtype)


# Faults of geometry.


@fault("depthwise", "geometry", "CONVENTION.*kernel flipped")
def flipped(x, weight, bias=None, stride=1, padding=0):
    return conv2d(x, weight.flip(2, 3), bias, stride, padding)


@fault("causal", "geometry", "CONVENTION.*causal padding")
def padded_on_the_wrong_side(x, weight, bias=None):
    return F.conv1d(F.pad(x, (0, weight.shape[-1] - 1)), weight, bias, groups=x.shape[1])


@fault("causal", "geometry", "CONVENTION.*kernel flipped")
def reversed_in_time(x, weight, bias=None):
    return conv1d_padded(x, weight.flip(-1), bias)


@fault("causal", "geometry", "CONVENTION")
def reads_the_future(x, weight, bias=None):
    return F.conv1d(F.pad(x, (weight.shape[-1] - 2, 1)), weight, bias, groups=x.shape[1])


@fault("depthwise", "geometry", "CONVENTION|BUG")
def ignores_the_dilation(x, weight, bias=None, stride=1, padding=0, dilation=1):
    y = conv2d(x, weight, bias, stride, padding, dilation)
    return conv2d(x, weight, bias, stride, padding)[:, :, : y.shape[2], : y.shape[3]]


@fault("depthwise", "geometry", "")
def channels_in_another_order(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    multiplier = len(weight) // x.shape[1]
    return y.unflatten(1, (x.shape[1], multiplier)).transpose(1, 2).flatten(1, 2)


@fault("depthwise", "geometry", "bias missing")
def without_bias(x, weight, bias=None, stride=1, padding=0):
    return conv2d(x, weight, None, stride, padding)


@fault("depthwise", "geometry", "left at zero|zero|missing|cropped")
def drops_the_last_row(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    return torch.cat([y[:, :, :-1], torch.zeros_like(y[:, :, -1:])], dim=2)


@fault("depthwise", "geometry", "")
def first_sample_for_all(x, weight, bias=None, stride=1, padding=0):
    return conv2d(x[:1].expand_as(x), weight, bias, stride, padding)


@fault("transpose", "geometry", "CONVENTION.*kernel flipped")
def transposed_with_a_flipped_kernel(x, weight, bias=None, stride=1, padding=0, output_padding=0):
    return conv_transpose2d(x, weight.flip(2, 3), bias, stride, padding, output_padding)


@fault("transpose", "geometry", "")
def output_padding_is_left_zero(x, weight, bias=None, stride=1, padding=0, output_padding=0):
    y = conv_transpose2d(x, weight, bias, stride, padding)
    added = output_padding if isinstance(output_padding, tuple) else (output_padding,) * 2
    return F.pad(y, (0, added[1], 0, added[0]))


@fault("transpose", "geometry", "")
def output_padding_in_front(x, weight, bias=None, stride=1, padding=0, output_padding=0):
    y = conv_transpose2d(x, weight, None, stride, padding, output_padding)
    added = output_padding if isinstance(output_padding, tuple) else (output_padding,) * 2
    y = y.roll(added, (2, 3))
    return y if bias is None else y + bias[:, None, None]


@fault("causal", "geometry", "CONVENTION.*SiLU")
def activated(x, weight, bias=None):
    return F.silu(conv1d_padded(x, weight, bias))


# Faults of sizes.


@fault("depthwise", "edge_sizes", "")
def wrong_for_odd_channels(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    return torch.cat([y[:, :-1], 2 * y[:, -1:]], dim=1) if x.shape[1] % 2 else y


@fault("causal", "edge_sizes", "")
def wrong_for_one_position(x, weight, bias=None):
    return conv1d_padded(x, weight, bias) + float(x.shape[-1] == 1)


@fault("depthwise", "edge_sizes", "raised IndexError")
def fails_on_an_empty_batch(x, weight, bias=None, stride=1, padding=0):
    torch.arange(len(x)).tolist()[0]
    return conv2d(x, weight, bias, stride, padding)


@fault("depthwise", "edge_sizes", "")
def counts_rows_in_16_bits(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    return torch.cat([y[:32767], torch.zeros_like(y[32767:])])


@fault("causal", "edge_sizes", "")
def forgets_the_border_of_a_block(x, weight, bias=None):
    y = conv1d_padded(x, weight, bias)
    if x.shape[-1] <= 128:
        return y
    return torch.cat([y[..., :128], conv1d_padded(x[..., 128:], weight, bias)], dim=-1)


# Faults of numbers.


@fault("depthwise", "dtypes", "")
def half_precision_is_summed_in_half_precision(x, weight, bias=None, stride=1, padding=0):
    strides, pads = ((each,) * 2 if isinstance(each, int) else each for each in (stride, padding))
    x = F.pad(x, (pads[1], pads[1], pads[0], pads[0]))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], weight.shape[2:], strides))
    y = x.new_zeros(len(x), len(weight), rows, columns)
    for i, j in np.ndindex(*weight.shape[2:]):
        window = x[:, :, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1]
        y = (
            y
            + window[..., :: strides[1]].repeat_interleave(len(weight) // x.shape[1], 1)
            * weight[:, 0, i, j, None, None]
        )
    return y if bias is None else y + bias[:, None, None]


@fault("depthwise", "dtypes", "PRECISION")
def inputs_are_rounded_to_bfloat16(x, weight, bias=None, stride=1, padding=0):
    rounded = (each.bfloat16().to(each.dtype) for each in (x, weight))
    return conv2d(*rounded, bias, stride, padding)


@fault("depthwise", "nonfinite", "NONFINITE")
def swallows_nan(x, weight, bias=None, stride=1, padding=0):
    return conv2d(x.nan_to_num(), weight, bias, stride, padding)


@fault("causal", "nonfinite", "NONFINITE")
def multiplies_by_zero_what_it_does_not_read(x, weight, bias=None):
    return conv1d_padded(x, weight, bias) + 0 * x.sum(-1, keepdim=True)


# Faults of gradients.


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, bias, edit):
        context.save_for_backward(x, weight)
        context.edit, context.has_bias = edit, bias is not None
        return conv1d_padded(x, weight, bias)

    @staticmethod
    def backward(context, dy):
        x, weight = context.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = conv1d_padded(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        dbias = dy.sum((0, 2)) if context.has_bias else None
        return *context.edit(x, dy, dx, dweight, dbias), None


def with_gradients(edit):
    def kernel(x, weight, bias=None):
        return _WithGradients.apply(x, weight, bias, edit)

    return kernel


def _register(name, said, edit):
    kernel = with_gradients(edit)
    kernel.__name__ = name
    FAULTS[name] = Fault(kernel, "causal", "gradients", said)


def _without_borders(x, dy, dx, dweight, dbias):
    size = dweight.shape[-1]
    inner = [
        (x.detach()[..., : x.shape[-1] - size + 1 + tap][..., tap:] * dy[..., size - 1 :]).sum((0, 2))
        for tap in range(size)
    ]
    return dx, torch.stack(inner, -1)[:, None] if x.shape[-1] >= size else torch.zeros_like(dweight), dbias


def _of_contiguous(x, dy, dx, dweight, dbias):
    return dx, dweight, None if dbias is None else dbias * (1 if dy.is_contiguous() else 2)


_register("kernel_gradient_misses_the_borders", "", _without_borders)
_register("gradient_of_the_bias_is_missing", "no gradient by bias", lambda x, dy, dx, dw, db: (dx, dw, None))
_register("gradient_of_x_is_reversed", "", lambda x, dy, dx, dw, db: (dx.flip(-1), dw, db))
_register("gradient_of_the_kernel_is_a_mean", "", lambda x, dy, dx, dw, db: (dx, dw / len(x), db))
_register("gradient_needs_a_contiguous_dy", "gradient by the output of stride 0", _of_contiguous)


# Faults of states.


def _state_fault(name, said, edit_state=lambda s: s, edit_result=lambda s, before: s):
    def kernel(x, weight, bias=None, initial_states=None, return_final_states=False):
        size = weight.shape[-1] - 1
        before = x.new_zeros(*x.shape[:2], size) if initial_states is None else initial_states
        y = causal_conv1d_fn(x, weight, bias, edit_state(before))
        _, right = causal_conv1d_fn(x, weight, bias, before, True)
        return (y, edit_result(right, torch.cat([before, x], -1))) if return_final_states else y

    kernel.__name__ = name
    FAULTS[name] = Fault(kernel, "causal", "streaming", said)


def _late(state):
    return F.pad(state, (1, 0))[..., :-1]


_state_fault(
    "state_is_returned_in_reverse_order",
    "CONVENTION.*returns the state in reverse",
    edit_result=lambda s, _: s.flip(-1),
)
_state_fault(
    "state_lacks_the_last_input",
    "CONVENTION.*lacks the last",
    edit_result=lambda s, all_: F.pad(all_, (1, 0))[..., -1 - s.shape[-1] : -1],
)
_state_fault(
    "state_is_read_in_reverse_order", "CONVENTION.*reads the state in reverse", edit_state=lambda s: s.flip(-1)
)
_state_fault("state_is_read_one_late", "CONVENTION.*one position too late", edit_state=_late)
_state_fault("state_is_ignored", "CONVENTION.*takes zeros", edit_state=torch.zeros_like)
_state_fault(
    "state_is_not_updated", "CONVENTION.*that it was given", edit_result=lambda s, all_: all_[..., : s.shape[-1]]
)


@fault("causal", "activation", "CONVENTION.*bias after the activation")
def bias_after_the_activation(x, weight, bias=None, activation=None):
    if activation is None:
        return conv1d_padded(x, weight, bias)
    y = F.silu(conv1d_padded(x, weight))
    return y if bias is None else y + bias[:, None]


@fault("causal", "activation", "CONVENTION.*no activation")
def activation_is_ignored(x, weight, bias=None, activation=None):
    return conv1d_padded(x, weight, bias)


# Faults of memory.


@fault("depthwise", "races", "not deterministic")
def adds_in_a_random_order(x, kernel, bias=None, stride=1, padding=0):
    taps = list(np.ndindex(kernel.shape[:2]))
    random.shuffle(taps)
    return _add(x, kernel, bias, stride, padding, taps)


def _add(x, kernel, bias, stride, padding, taps):
    strides, pads = (np.broadcast_to(each, 2) for each in (stride, padding))
    x = np.pad(x, ((0, 0), *((p, p) for p in pads), (0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape, strides))
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]), x.dtype)
    for i, j in taps:
        window = x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1]
        y = y + window[:, :, :: strides[1]] * kernel[i, j, 0]
    return y if bias is None else y + bias


@fault("depthwise", "races", "not deterministic")
def leaves_memory_unwritten(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    if random.random() < 0.7 and y.shape[-1] > 39:  # the thread that writes the last row comes too late
        y[:, :, -1] = torch.empty_like(y[:, :, -1])
        y[0, 0, -1, 0] = random.random()
    return y


@fault("depthwise", "inputs_unchanged", "x changed in place")
def changes_x(x, weight, bias=None, stride=1, padding=0):
    y = conv2d(x, weight, bias, stride, padding)
    x.mul_(2)
    return y


@fault("depthwise", "memory_layouts", "")
def assumes_contiguous_memory(x, weight, bias=None, stride=1, padding=0):
    flat = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return conv2d(flat, weight, bias, stride, padding)


@fault("depthwise", "invariance", "")
def depends_on_the_batch(x, weight, bias=None, stride=1, padding=0):
    return conv2d(x, weight, bias, stride, padding) * (1.0 if len(x) == 1 else 1.001)


@jax.custom_vjp
def _wrong_vjp(x, kernel):
    return jaxdw.causal_conv1d(x, kernel)


_wrong_vjp.defvjp(
    lambda x, kernel: (jaxdw.causal_conv1d(x, kernel), (x, kernel)),
    lambda kept, dy: (jaxdw.causal_conv1d(dy, kept[1]), jax.vjp(jaxdw.causal_conv1d, *kept)[1](dy)[1]),
)


@fault("causal", "gradients", "")
def gradient_of_x_looks_back(x, kernel):
    return _wrong_vjp(x, kernel)
