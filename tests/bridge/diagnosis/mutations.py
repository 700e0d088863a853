"""Planted causes: each computes in float32 what a mistaken implementation would, and names what must be found."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from bridge import Case
from bridge.numerics import BFLOAT16, FLOAT16, TF32, Arithmetic, cast, error_bound, exact, round_to, truncate_to


class Redraw(Exception):
    """The mutation does nothing on this geometry, or cannot be told from another by anyone."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A planted cause.

    Attributes:
      plant: takes a generator, returns `(actual, case)`; raises Redraw.
      verdict: what must be found.
      names: the names that are right. More than one where the same numbers have several causes.
    """

    plant: Callable
    verdict: str
    names: tuple[str, ...]


MUTATIONS: dict[str, Mutation] = {}


def mutation(verdict, *names):
    def register(plant):
        MUTATIONS[plant.__name__] = Mutation(plant, verdict, names)
        return plant

    return register


def in_order(case, accumulate=lambda s: s):
    """The convolution in raster order, multiply then add, in the case's dtype; `accumulate` rounds every result."""
    g = case.geometry
    y = np.zeros((*g.batch, *g.output_spatial, g.channels, g.multiplier), case.dtype)
    for x, w, _ in case.tap_terms():
        y = accumulate(y + accumulate(x * w))
    y = y.reshape(g.output_shape)
    return y if case.bias is None else accumulate(y + case.bias)


def backwards(case):
    """The convolution in reverse raster order, from the bias: another conventional sum."""
    g = case.geometry
    y = np.zeros((*g.batch, *g.output_spatial, g.channels, g.multiplier), case.dtype)
    if case.bias is not None:
        y = y + case.bias.reshape(g.channels, g.multiplier)
    for x, w, _ in list(case.tap_terms())[::-1]:
        y = y + x * w
    return y.reshape(g.output_shape)


def geometry(rng, *, rank=None, least=1, multiplier=None, bias=None, square=False, **fixed):
    """A random float32 case with at least 60 outputs: 1 to 3 axes, kernels 1 to 5, every option."""
    while True:
        n = rank or int(rng.choice([1, 2, 2, 2, 3]))
        size = {1: 24, 2: 10, 3: 5}[n]
        kernel = tuple(int(k) for k in rng.integers(least, {1: 8, 2: 6, 3: 4}[n], n))
        dilation = tuple(int(d) for d in rng.integers(1, 3, n))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
        spatial = tuple(int(rng.integers(max(span, 3), span + size)) for span in spans)
        if square:
            kernel, dilation = (kernel[0],) * n, (dilation[0],) * n
            spatial = (max(spatial),) * n
        pads = [(int(p), int(p)) for p in rng.integers(0, 3, n)]
        options = {
            "strides": tuple(int(s) for s in rng.integers(1, 4, n)),
            "padding": ["SAME", "VALID", tuple(pads)][int(rng.choice([0, 1, 2, 2]))],
            "kernel_dilation": dilation,
        }
        options |= fixed
        m = multiplier or int(rng.choice([1, 1, 2, 3]))
        channels = int(rng.integers(2, 9))
        with_bias = bool(rng.integers(2)) if bias is None else bias

        def normal(*shape):
            return rng.standard_normal(shape, np.float32)

        case = Case(
            normal(int(rng.integers(1, 4)), *spatial, channels),
            normal(*kernel, 1, channels * m),
            normal(channels * m) if with_bias else None,
            **options,
        )
        positions = int(np.prod(case.geometry.output_shape[:-1]))
        if 4 * (case.geometry.taps + 2) <= positions <= 3000 and min(case.geometry.output_spatial) >= 2:
            return case


def computed(other, case):
    """Return the output of `other` with the case that was meant; redraw if the output suits both."""
    if other.geometry.output_shape != case.geometry.output_shape:
        raise Redraw
    y = in_order(other)
    seen(y, case)
    return y, case


def seen(y, case, arithmetic=None):
    """Redraw where y is a conventional result of the case all the same."""
    total = exact(case)
    declared = arithmetic or Arithmetic.of(
        case.dtype, flushes_subnormals=True, output_roundings=2 if case.bias is not None else 1
    )
    if (np.abs(y.astype(np.float64) - total.reference) <= error_bound(declared, total) + total.reference_error).all():
        raise Redraw


def rounded(a, fmt, rounding=round_to):
    return None if a is None else cast(rounding(a.astype(np.float64), fmt), a.dtype)


# Kernel


@mutation("CONVENTION", "kernel flipped")
def kernel_flipped_on_every_axis(rng):
    case = geometry(rng, least=2)
    return computed(case.replace(kernel=np.flip(case.kernel, tuple(range(case.geometry.rank)))), case)


@mutation("CONVENTION", "kernel flipped")
def kernel_flipped_on_one_axis(rng):
    case = geometry(rng, least=2)
    return computed(case.replace(kernel=np.flip(case.kernel, int(rng.integers(case.geometry.rank)))), case)


@mutation("CONVENTION", "kernel transposed")
def kernel_transposed(rng):
    case = geometry(rng, least=2, rank=2, square=True)
    return computed(case.replace(kernel=np.swapaxes(case.kernel, 0, 1)), case)


@mutation("CONVENTION", "kernel layout")
def kernel_oihw_reshaped(rng):
    case = geometry(rng, least=2)
    back = np.moveaxis(case.kernel, (-1, -2), (0, 1))
    return computed(case.replace(kernel=np.ascontiguousarray(back).reshape(case.kernel.shape)), case)


@mutation("CONVENTION", "kernel channels permuted", "channel order", "outputs permuted")
def kernel_channels_permuted(rng):
    # within one input channel, and with no bias, it permutes the outputs
    case = geometry(rng)
    return computed(case.replace(kernel=case.kernel[..., rng.permutation(case.geometry.features)]), case)


# Padding. At a fixed output size only the padding in front matters, so these overlap.

PADDING = (
    "padding off by one",
    "SAME against symmetric padding",
    "padding low and high swapped",
    "padding swapped between axes",
    "row or column shifted",
    "padding missing",
    "padding",
    "causal padding",
)


@mutation("CONVENTION", "SAME against symmetric padding")
def same_for_symmetric(rng):
    k = tuple(2 * int(i) + 1 for i in rng.integers(1, 3, 2))
    case = geometry(rng, rank=2, strides=2, kernel_dilation=1)
    kernel = rng.standard_normal((*k, 1, case.geometry.features), np.float32)
    case = case.replace(kernel=kernel, padding=tuple(i // 2 for i in k))
    return computed(case.replace(padding="SAME"), case)


@mutation("CONVENTION", "SAME against symmetric padding")
def symmetric_for_same(rng):
    k = tuple(2 * int(i) + 1 for i in rng.integers(1, 3, 2))
    case = geometry(rng, rank=2, strides=2, kernel_dilation=1)
    kernel = rng.standard_normal((*k, 1, case.geometry.features), np.float32)
    case = case.replace(kernel=kernel, padding="SAME")
    return computed(case.replace(padding=tuple(i // 2 for i in k)), case)


@mutation("CONVENTION", *PADDING)
def padding_off_by_one(rng):
    case = geometry(rng, least=2)
    pads = [list(pair) for pair in case.geometry.padding]
    axis, sign = int(rng.integers(len(pads))), int(rng.choice([-1, 1]))
    pads[axis] = [pads[axis][0] + sign, pads[axis][1] - sign * (case.geometry.strides[axis] == 1)]
    return computed(case.replace(padding=tuple(map(tuple, pads))), case)


@mutation("CONVENTION", *PADDING)
def padding_swapped_between_axes(rng):
    # with the same sum on both axes, so that the shape stays
    total = int(rng.integers(1, 5))
    low, other = (int(p) for p in rng.permutation(total + 1)[:2])
    pairs = ((low, total - low), (other, total - other))
    case = geometry(rng, rank=2, padding=pairs)
    return computed(case.replace(padding=pairs[::-1]), case)


@mutation("CONVENTION", *PADDING)
def rows_shifted_by_an_extra_row(rng):
    case = geometry(rng)
    g = case.geometry
    pads = list(g.padding)
    axis = int(rng.integers(g.rank))
    pads[axis] = (pads[axis][0] + g.strides[axis], pads[axis][1] - g.strides[axis])
    return computed(case.replace(padding=tuple(pads)), case)


@mutation("CONVENTION", "padding mode")
def padding_mode_mistaken(rng):
    case = geometry(rng, least=3, strides=1, padding="CIRCULAR")
    right, wrong = rng.permutation(["zeros", "CIRCULAR", "REFLECT"])[:2]
    cases = {w: case.replace(padding=w) for w in ("CIRCULAR", "REFLECT")} | {
        "zeros": case.replace(padding=case.geometry.padding)
    }
    return computed(cases[wrong], cases[right])


# Strides and dilations


@mutation("CONVENTION", "stride and dilation swapped")
def stride_and_dilation_swapped(rng):
    k, n = int(rng.integers(2, 5)), int(rng.integers(2, 9))
    case = geometry(rng, rank=2, kernel_dilation=1)
    c = case.geometry.channels
    kernel = rng.standard_normal((k, k, 1, case.geometry.features), np.float32)
    for size in range(2 * k, 4 * k + 8):  # the sizes at which both give as many outputs are few
        x = rng.standard_normal((16, size, size, c), np.float32)
        case = Case(x, kernel, strides=2, padding=n % 2, kernel_dilation=1)
        swapped = case.replace(strides=1, kernel_dilation=2)
        if case.geometry.output_shape == swapped.geometry.output_shape and case.geometry.output_spatial[0] > 1:
            return computed(swapped, case)
    raise Redraw


@mutation("CONVENTION", "dilation ignored", *PADDING)
def dilation_ignored(rng):
    case = geometry(rng, least=2, padding="SAME", kernel_dilation=2)
    return computed(case.replace(kernel_dilation=1), case)


# Channels and layouts


@mutation("CONVENTION", "channel order")
def channel_order_of_the_outputs(rng):
    case = geometry(rng, multiplier=int(rng.integers(2, 4)))
    g = case.geometry
    y, _ = computed(case.replace(x=-case.x), case)
    y = in_order(case).reshape(*g.output_shape[:-1], g.channels, g.multiplier)
    y = np.swapaxes(y, -1, -2).reshape(g.output_shape)
    seen(y, case)
    return y, case


@mutation("CONVENTION", "channel order")
def channel_order_of_the_inputs(rng):
    case = geometry(rng, multiplier=int(rng.integers(2, 4)))
    g = case.geometry
    rearranged = Case(
        case.x[..., np.arange(g.features) % g.channels],
        case.kernel,
        case.bias,
        strides=case.strides,
        padding=case.padding,
        kernel_dilation=case.kernel_dilation,
    )
    return computed(rearranged, case)


@mutation("CONVENTION", "channel order")
def channel_order_of_the_kernel(rng):
    case = geometry(rng, multiplier=int(rng.integers(2, 4)))
    g = case.geometry
    order = np.arange(g.features).reshape(g.channels, g.multiplier).T.ravel()
    return computed(case.replace(kernel=case.kernel[..., order]), case)


@mutation("CONVENTION", "input channels permuted")
def input_channels_permuted(rng):
    case = geometry(rng)
    return computed(case.replace(x=case.x[..., rng.permutation(case.geometry.channels)]), case)


@mutation("CONVENTION", "input layout")
def input_nchw_read_as_nhwc(rng):
    case = geometry(rng)
    first = np.ascontiguousarray(np.moveaxis(case.x, -1, 1))
    return computed(case.replace(x=first.reshape(case.x.shape)), case)


@mutation("CONVENTION", "output layout")
def output_nchw_read_as_nhwc(rng):
    case = geometry(rng)
    y = np.ascontiguousarray(np.moveaxis(in_order(case), -1, 1)).reshape(case.geometry.output_shape)
    seen(y, case)
    return y, case


@mutation("CONVENTION", "outputs permuted", "channel order", "kernel channels permuted")
def output_channels_permuted(rng):
    case = geometry(rng)
    y = in_order(case)[..., rng.permutation(case.geometry.features)]
    seen(y, case)
    return y, case


@mutation("CONVENTION", "outputs permuted", *PADDING)
def output_rows_reversed(rng):
    case = geometry(rng)
    y = np.flip(in_order(case), 1 + int(rng.integers(case.geometry.rank)))
    seen(y, case)
    return y, case


@mutation("BUG", "outputs permuted")
def outputs_shuffled(rng):
    case = geometry(rng)
    y = in_order(case)
    return rng.permutation(y.ravel()).reshape(y.shape), case


@mutation("CONVENTION", "row or column cropped", *PADDING)
def row_or_column_cropped(rng):
    case = geometry(rng)
    y = in_order(case)
    rows = np.moveaxis(y, 1 + int(rng.integers(case.geometry.rank)), 0)
    rows[int(rng.choice([0, -1]))] = 0
    seen(y, case)
    return y, case


# Bias


@mutation("CONVENTION", "bias missing")
def bias_missing(rng):
    case = geometry(rng, bias=True)
    return computed(case.replace(bias=None), case)


@mutation("CONVENTION", "bias doubled")
def bias_doubled(rng):
    case = geometry(rng, bias=True)
    return computed(case.replace(bias=2 * case.bias), case)


@mutation("CONVENTION", "bias permuted")
def bias_permuted(rng):
    case = geometry(rng, bias=True)
    return computed(case.replace(bias=case.bias[rng.permutation(case.geometry.features)]), case)


# Precision


def precision(case, **formats):
    operands = {name: rounded(getattr(case, name), *how) for name, how in formats.items()}
    return computed(case.replace(**operands), case)


@mutation("PRECISION", "bfloat16 inputs")
def bfloat16_inputs(rng):
    return precision(geometry(rng), x=(BFLOAT16,), kernel=(BFLOAT16,))


@mutation("PRECISION", "bfloat16 inputs")
def bfloat16_input_alone(rng):
    return precision(geometry(rng), x=(BFLOAT16,))


@mutation("PRECISION", "tf32 inputs")
def tf32_inputs(rng):
    return precision(geometry(rng), x=(TF32,), kernel=(TF32,))


@mutation("PRECISION", "tf32 inputs")
def tf32_inputs_truncated(rng):
    return precision(geometry(rng), x=(TF32, truncate_to), kernel=(TF32, truncate_to))


@mutation("PRECISION", "float16 inputs", "tf32 inputs")
def float16_inputs(rng):
    # the same digits as TF32, where no value is below the normal numbers
    return precision(geometry(rng), x=(FLOAT16,), kernel=(FLOAT16,))


@mutation("PRECISION", "bfloat16_3x inputs")
def bfloat16_inputs_in_three_passes(rng):
    case = geometry(rng)
    x1, w1 = rounded(case.x, BFLOAT16), rounded(case.kernel, BFLOAT16)
    x2, w2 = rounded(case.x - x1, BFLOAT16), rounded(case.kernel - w1, BFLOAT16)
    low = [in_order(case.replace(x=x, kernel=w, bias=None)) for x, w in ((x1, w2), (x2, w1))]
    y = in_order(case.replace(x=x1, kernel=w1)) + (low[0] + low[1])
    seen(y, case)
    return y, case


@mutation("PRECISION", "float16 output")
def output_rounded_to_float16(rng):
    case = geometry(rng)
    return in_order(case).astype(np.float16).astype(np.float32), case


@mutation("PRECISION", "bfloat16 output")
def output_rounded_to_bfloat16(rng):
    case = geometry(rng)
    return in_order(case).astype(ml_dtypes.bfloat16).astype(np.float32), case


@mutation("PRECISION", "bfloat16 inputs and output")
def computed_in_bfloat16(rng):
    case = geometry(rng)
    operands = {n: rounded(getattr(case, n), BFLOAT16) for n in ("x", "kernel", "bias")}
    return in_order(case.replace(**operands)).astype(ml_dtypes.bfloat16).astype(np.float32), case


@mutation("PRECISION", "bfloat16 accumulator")
def accumulated_in_bfloat16(rng):
    case = geometry(rng, least=2)
    return in_order(case, lambda s: s.astype(ml_dtypes.bfloat16).astype(np.float32)), case


@mutation("PRECISION", "float16 accumulator")
def accumulated_in_float16(rng):
    case = geometry(rng, least=2)
    return in_order(case, lambda s: s.astype(np.float16).astype(np.float32)), case


# Bugs


def with_tap(rng, factor, channels=1):
    """One tap of some channels scaled; a kernel of one tap has no other, and is a scaled channel."""
    case = geometry(rng, least=2)
    g = case.geometry
    tap = tuple(int(rng.integers(k)) for k in g.kernel_size)
    if not g.valid_taps()[(..., *tap)].sum() >= 4:
        raise Redraw  # a tap that nearly always reads padding
    kernel = case.kernel.copy()
    kernel[(*tap, 0, rng.choice(g.features, min(channels, g.features), replace=False))] *= np.float32(factor)
    return computed(case.replace(kernel=kernel), case)


@mutation("BUG", "tap", "few elements", "single element")
def tap_scaled_by_2_to_minus_10(rng):
    # where windows rarely read the tap, it passes the bound at a few elements, and those are listed
    return with_tap(rng, 1 + 2.0**-10)


@mutation("BUG", "tap")
def tap_scaled_by_one_percent(rng):
    return with_tap(rng, 1.01)


@mutation("BUG", "tap")
def tap_missing_in_three_channels(rng):
    return with_tap(rng, 0, channels=3)


@mutation("BUG", "sign of a tap")
def tap_with_the_other_sign(rng):
    return with_tap(rng, -1)


@mutation("BUG", "sign")
def output_with_the_other_sign(rng):
    case = geometry(rng)
    return -in_order(case), case


@mutation("BUG", "channel scaled")
def channel_scaled(rng):
    case = geometry(rng, least=2, bias=False)
    y = in_order(case)
    y[..., int(rng.integers(case.geometry.features))] *= np.float32(1.01)
    return y, case


@mutation("BUG", "bias")
def offset_where_there_is_no_bias(rng):
    case = geometry(rng, least=2, bias=False)
    y = in_order(case)
    y[..., int(rng.integers(case.geometry.features))] += np.float32(0.25)
    return y, case


@mutation("BUG", "single element")
def one_element_wrong(rng):
    case = geometry(rng)
    y = in_order(case)
    index = tuple(int(rng.integers(n)) for n in y.shape)
    y[index] += np.float32(rng.choice([-1, 1]) * rng.uniform(0.01, 2))
    return y, case


@mutation("BUG", "border")
def borders_wrong(rng):
    case = geometry(rng, rank=2, least=3, strides=1, padding=((1, 1), (1, 1)))
    y = in_order(case)
    full = case.geometry.valid_taps().all(axis=(2, 3))
    if full.sum() < 4:
        raise Redraw
    y[:, ~full] += rng.standard_normal(y[:, ~full].shape, np.float32)
    return y, case


@mutation("BUG", "batch")
def batch_entry_wrong(rng):
    case = geometry(rng)
    case = case.replace(x=np.concatenate([case.x, case.x[::-1]]))
    y = in_order(case)
    if y[1].size <= 8:
        raise Redraw  # so few elements are listed one by one
    y[1] += rng.standard_normal(y[1].shape, np.float32)
    return y, case


@mutation("BUG", "channels")
def channel_wrong(rng):
    case = geometry(rng)
    y = in_order(case)
    y[..., 1] += rng.standard_normal(y[..., 1].shape, np.float32)
    return y, case


# Not finite


@mutation("NONFINITE", "nonfinite")
def one_sided_nan(rng):
    case = geometry(rng)
    y = in_order(case)
    y.ravel()[rng.integers(y.size)] = np.nan
    return y, case


@mutation("NONFINITE", "nonfinite")
def infinity_against_finite(rng):
    case = geometry(rng)
    y = in_order(case)
    y.ravel()[rng.integers(y.size)] = -np.inf
    return y, case
