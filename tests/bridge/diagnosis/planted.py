"""Mistakes as users make them in a test of their own layer, each with what must be said of it, and a clean twin."""

import dataclasses
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

from bridge import Case
from bridge.diagnosis.precision.quantised import KERNEL_RULES, with_rule
from bridge.numerics import Arithmetic, exact
from tests.bridge.diagnosis.mutations import backwards, in_order

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Planted:
    """A mistake.

    Attributes:
      plant: takes a generator, returns `(wrong, case)`.
      verdict: what must be found.
      says: what name, cause, fix or place must match.
      arithmetic: what the sides declare, by dtype; None for the weakest.
    """

    plant: Callable
    verdict: str
    says: str
    arithmetic: Callable | None = None

    def clean(self, case):
        """A right output of the case."""
        return in_order(case) if case.dtype.itemsize > 2 else exact(case).value


PLANTED: dict[str, Planted] = {}


def plant(name, verdict, says, wrong, arithmetic=None, **options):
    """Register `wrong(case, rng)` on a case with these options."""

    def planted(rng):
        case = make(rng, **options)
        return wrong(case, rng), case

    assert name not in PLANTED, name
    re.compile(says)
    PLANTED[name] = Planted(planted, verdict, says, arithmetic)


def make(rng, shape=(2, 11, 12, 6), kernel=(3, 3), bias=True, dtype=F32, multiplier=1, **options):
    """Normal random numbers; sizes that differ, so that no two axes can be confused by accident."""
    features = shape[-1] * multiplier
    draw = lambda *sizes: rng.standard_normal(sizes).astype(dtype)  # noqa: E731
    options = {"padding": 1} | options
    return Case(draw(*shape), draw(*kernel, 1, features), draw(features) if bias else None, **options)


def to(dtype, a):
    return None if a is None else a.astype(dtype).astype(np.float32)


def half(case, dtype, *names):
    return case.replace(**{name: to(dtype, getattr(case, name)) for name in names})


def without_bias(case):
    return case.replace(bias=None)


# 1. Half precision with a bias


for word, dtype in (("bfloat16", BF16), ("float16", F16)):

    def rounded_before(case, rng, dtype=dtype):
        return to(dtype, in_order(without_bias(case))) + case.bias

    def rounded_twice(case, rng, dtype=dtype):
        return to(dtype, rounded_before(case, rng, dtype))

    def of_half_inputs(case, rng, dtype=dtype):
        return rounded_twice(half(case, dtype, "x", "kernel", "bias"), rng, dtype)

    def autocast(case, rng, dtype=dtype):
        return rounded_before(half(case, dtype, "x", "kernel"), rng, dtype)

    def accumulated(case, rng, dtype=dtype):
        return in_order(without_bias(case), lambda s: to(dtype, s)) + case.bias

    def accumulated_half_inputs(case, rng, dtype=dtype):
        return accumulated(half(case, dtype, "x", "kernel"), rng, dtype)

    def accumulated_with_bias(case, rng, dtype=dtype):
        return in_order(case, lambda s: to(dtype, s))

    def in_half(case, rng, dtype=dtype):
        return to(dtype, exact(without_bias(case)).value).astype(dtype) + case.bias

    def of_half_bias(case, rng, dtype=dtype):
        return in_order(half(case, dtype, "bias"))

    plant(
        f"sum in {word} before a float32 bias",
        "PRECISION",
        f"rounded to {word} before the bias is added",
        rounded_before,
    )
    plant(f"sum in {word} before the bias and after", "PRECISION", f"{word} before the bias.*and again", rounded_twice)
    plant(f"a layer in {word}", "PRECISION", f"inputs and output.*{word} before the bias is added", of_half_inputs)
    plant(f"autocast to {word}, float32 bias", "PRECISION", f"the kernel rounded to {word}.*before the bias", autocast)
    plant(
        f"accumulated in {word}, float32 bias", "PRECISION", f"accumulated in {word}, and a float32 bias", accumulated
    )
    plant(
        f"{word} inputs and accumulator, float32 bias",
        "PRECISION",
        "a float32 bias added after",
        accumulated_half_inputs,
    )
    plant(
        f"accumulated in {word} with the bias", "PRECISION", f"{word} accumulator", accumulated_with_bias, kernel=(5, 5)
    )
    plant(f"bias in {word}", "PRECISION", f"the bias rounded to {word}|float16: these", of_half_bias)
    plant(
        f"{word} data, rounded before the bias",
        "PRECISION",
        f"rounded to {word} before the bias is added, and again after",
        in_half,
        Arithmetic.of,
        dtype=dtype,
    )


def int8(case, *names, levels=127):
    arrays = {name: getattr(case, name).astype(np.float32) for name in ("x", "kernel")}
    for name in names:
        scale = np.float32(np.abs(arrays[name]).max() / np.float32(levels))
        arrays[name] = np.rint(arrays[name] / scale) * scale
    wide = Case(**arrays, bias=to(F32, case.bias), padding=case.padding)
    return in_order(wide).astype(case.dtype)


for dtype in (BF16, F16, F32):
    plant(f"int8 input, {dtype}", "PRECISION", "the input quantised to int8", lambda c, r: int8(c, "x"), dtype=dtype)
    plant(
        f"int8 in both, {dtype}",
        "PRECISION",
        "kernel quantised to int8",
        lambda c, r: int8(c, "x", "kernel"),
        dtype=dtype,
    )


def calibrated(case, rng, name, axis=None):
    """One operand rounded to multiples of a step that does not follow from its own greatest value."""
    wide = F32 if case.dtype.itemsize == 2 else case.dtype
    arrays = {each: None if (a := getattr(case, each)) is None else a.astype(wide) for each in ("x", "kernel", "bias")}
    a = arrays[name]
    top = np.abs(a).max() if axis is None else np.abs(a).max(axis=tuple(range(a.ndim - 1)))
    step = (top / rng.uniform(70, 160, np.shape(top))).astype(wide)
    arrays[name] = np.clip(np.rint(a / step), -127, 127) * step
    return in_order(Case(**arrays, padding=case.padding)).astype(case.dtype)


for dtype in (BF16, F16, F32, np.dtype(np.float64)):
    plant(
        f"calibrated input, {dtype}",
        "PRECISION",
        "quantised inputs.*the input rounded to multiples",
        lambda c, r: calibrated(c, r, "x"),
        dtype=dtype,
    )
plant(
    "calibrated input by channel",
    "PRECISION",
    "the input rounded to multiples of .* a step for each index of axis 3",
    lambda c, r: calibrated(c, r, "x", -1),
)
plant(
    "calibrated kernel by channel",
    "PRECISION",
    "the kernel rounded to multiples of .* a step for each index of axis 3",
    lambda c, r: calibrated(c, r, "kernel", -1),
)
plant(
    "calibrated input, int8 kernel",
    "PRECISION",
    "the input rounded to multiples .*the kernel quantised to int8 with one scale",
    lambda c, r: calibrated(c.replace(kernel=with_rule(c, "kernel", KERNEL_RULES[0]).kernel), r, "x"),
)


# 2. One layout mistake on several operands, and two mistakes


def order_of(case):
    g = case.geometry
    return np.arange(g.features).reshape(g.channels, g.multiplier).T.ravel()


def ordered(case, *names):
    o = order_of(case)
    return case.replace(**{name: getattr(case, name)[..., o] for name in names})


def permuted(case, rng, *names):
    order = np.roll(rng.permutation(case.geometry.features), 1)
    while (order == np.arange(len(order))).any():
        order = rng.permutation(len(order))
    return in_order(case.replace(**{name: getattr(case, name)[..., order] for name in names}))


def flipped(case):
    return case.replace(kernel=np.flip(case.kernel, tuple(range(case.geometry.rank))))


def nchw(case):
    return case.replace(x=np.ascontiguousarray(np.moveaxis(case.x, -1, 1)).reshape(case.x.shape))


MANY = {"multiplier": 2, "shape": (2, 11, 12, 4)}
plant("channel order, kernel", "CONVENTION", "^channel order ", lambda c, r: in_order(ordered(c, "kernel")), **MANY)
plant("channel order, bias", "CONVENTION", "bias in the order m", lambda c, r: in_order(ordered(c, "bias")), **MANY)
plant(
    "channel order, kernel and bias",
    "CONVENTION",
    "^channel order .*kernel.*bias",
    lambda c, r: in_order(ordered(c, "kernel", "bias")),
    **MANY,
)
plant(
    "channel order, kernel and bias, M = 3",
    "CONVENTION",
    "^channel order .*kernel.*bias",
    lambda c, r: in_order(ordered(c, "kernel", "bias")),
    multiplier=3,
)
plant(
    "channel order, kernel and bias, 1-D",
    "CONVENTION",
    "^channel order .*kernel.*bias",
    lambda c, r: in_order(ordered(c, "kernel", "bias")),
    shape=(3, 40, 4),
    kernel=(5,),
    multiplier=2,
)
plant(
    "channel order, output before the bias",
    "CONVENTION",
    "channel order",
    lambda c, r: in_order(without_bias(c))[..., order_of(c)] + c.bias,
    **MANY,
)
plant(
    "kernel and bias permuted",
    "CONVENTION",
    "kernel channels perm.*bias",
    lambda c, r: permuted(c, r, "kernel", "bias"),
)
plant("input and bias permuted", "CONVENTION", "input channels perm.*bias", lambda c, r: permuted(c, r, "x", "bias"))
plant(
    "flipped, no bias", "CONVENTION", "kernel flipped and bias missing", lambda c, r: in_order(without_bias(flipped(c)))
)
plant(
    "flipped, circular",
    "CONVENTION",
    "kernel flipped and padding mode",
    lambda c, r: in_order(flipped(c).replace(padding="CIRCULAR")),
)
plant("flipped, ReLU", "CONVENTION", "kernel flipped and ReLU after", lambda c, r: np.maximum(in_order(flipped(c)), 0))
plant(
    "flipped, x/255",
    "CONVENTION",
    "kernel flipped and input scaled.*x/255",
    lambda c, r: in_order(flipped(c).replace(x=c.x / np.float32(255))),
)
plant(
    "flipped, channel order",
    "CONVENTION",
    "channel order.*kernel flipped|kernel flipped.*channel order",
    lambda c, r: in_order(flipped(ordered(c, "kernel", "bias"))),
    **MANY,
)
plant("NCHW read as NHWC, bias doubled", "CONVENTION", "input layout", lambda c, r: in_order(nchw(c)) + c.bias)
plant("NCHW read as NHWC, SiLU", "CONVENTION", "input layout.*SiLU", lambda c, r: silu(in_order(nchw(c))))
plant(
    "flipped, SAME for symmetric",
    "CONVENTION",
    "kernel flipped.*SAME against symmetric",
    lambda c, r: in_order(flipped(c).replace(padding="SAME")),
    strides=2,
    shape=(2, 12, 14, 6),
)
plant(
    "transposed, no bias",
    "CONVENTION",
    "kernel transposed.*bias missing",
    lambda c, r: in_order(without_bias(c.replace(kernel=np.swapaxes(c.kernel, 0, 1)))),
)
plant(
    "SAME for symmetric, bias subtracted",
    "CONVENTION",
    "bias subtracted.*SAME against|SAME against.*bias subtracted",
    lambda c, r: in_order(c.replace(padding="SAME", bias=-c.bias)),
    strides=2,
    shape=(2, 12, 14, 6),
)


for name, says, change in (
    ("flipped", "kernel flipped, bfloat16 inputs", flipped),
    ("SAME", "SAME against symmetric padding, bfloat16", lambda c: c.replace(padding="SAME")),
    ("no bias", "bias missing, bfloat16", without_bias),
):
    plant(
        f"{name}, in bfloat16",
        "CONVENTION",
        f"^{says}",
        lambda c, r, change=change: in_order(half(change(c), BF16, "x", "kernel")),
        strides=2,
        shape=(2, 12, 14, 6),
    )


# 3. A word and its numbers


def with_options(**options):
    return lambda case, rng: in_order(case.replace(**options))


NUMBERS = {"padding": 2, "kernel_dilation": 2}
AS_SAME = {"padding": ((0, 1), (0, 1)), "strides": 2, "shape": (2, 12, 14, 6)}
plant(
    "SAME without dilation",
    "CONVENTION",
    "dilation ignored",
    with_options(padding="SAME", kernel_dilation=1),
    **NUMBERS,
)
plant(
    "numbers without dilation",
    "CONVENTION",
    "dilation ignored",
    with_options(padding=1, kernel_dilation=1),
    padding="SAME",
    kernel_dilation=2,
)
plant("symmetric for the numbers of SAME", "CONVENTION", "SAME against symmetric", with_options(padding=1), **AS_SAME)
plant(
    "dilation that is not asked for",
    "CONVENTION",
    "dilation",
    with_options(padding="SAME", kernel_dilation=2),
)
plant(
    "symmetric for the numbers of CAUSAL",
    "CONVENTION",
    "causal padding",
    with_options(padding=2),
    padding=((4, 0),),
    shape=(2, 40, 6),
    kernel=(5,),
)
plant(
    "REFLECT for the numbers of SAME",
    "CONVENTION",
    "padding mode.*reflect",
    with_options(padding="REFLECT"),
    padding=2,
    kernel=(5, 5),
)


# 4. Functions and scales around the layer


def of_torch(function):
    return lambda y: function(torch.from_numpy(np.ascontiguousarray(y))).numpy()


silu = of_torch(F.silu)
FUNCTIONS = {
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "hard swish": F.hardswish,
    "SiLU": F.silu,
    "GELU": F.gelu,
    r"GELU \(tanh\)": lambda t: F.gelu(t, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hard sigmoid": F.hardsigmoid,
    "leaky ReLU with slope 0.01": F.leaky_relu,
    "leaky ReLU with slope 0.2": lambda t: F.leaky_relu(t, 0.2),
    "ELU": F.elu,
    "SELU": F.selu,
    "softplus": F.softplus,
    "mish": F.mish,
}
for name, function in FUNCTIONS.items():
    function = of_torch(function)
    plant(f"{name} after", "CONVENTION", f"^{name} after", lambda c, r, f=function: f(in_order(c)))
for name in ("ReLU", "hard swish", "SiLU", "GELU", "sigmoid"):
    function = of_torch(FUNCTIONS[name])
    early = lambda c, r, f=function: f(in_order(c.replace(bias=None))) + c.bias  # noqa: E731
    plant(f"bias after {name}", "CONVENTION", f"bias after {name}.*add the bias before {name}", early)
for name in ("ReLU", "hard swish", "SiLU", "GELU", "sigmoid", "leaky ReLU with slope 0.2"):
    function = of_torch(FUNCTIONS[name])
    plant(f"{name} before", "CONVENTION", f"^{name} before", lambda c, r, f=function: in_order(c.replace(x=f(c.x))))

INPUTS = {
    "x/255": ("input scaled.*x/255", lambda x, r: x / np.float32(255)),
    "255 x": (r"input scaled.*255\*x", lambda x, r: x * np.float32(255)),
    "2x - 1": (r"input normalised.*2\*x - 1", lambda x, r: 2 * x - 1),
    "x/127.5 - 1": ("input normalised.*x/127.5 - 1", lambda x, r: x / np.float32(127.5) - 1),
    "(x - m)/s": (r"\(x - 0.45\)/0.225", lambda x, r: (x - np.float32(0.45)) / np.float32(0.225)),
    "(x - m)/s by channel": (
        r"\(x - m\)/s for each channel",
        lambda x, r: (x - per_channel(r, x)) / np.exp(per_channel(r, x)),
    ),
}


def per_channel(rng, x):
    return rng.uniform(-1, 1, x.shape[-1]).astype(np.float32)


for name, (says, normalise) in INPUTS.items():
    for bias in (True, False):
        plant(
            f"{name}, {'with' if bias else 'no'} bias",
            "CONVENTION",
            says,
            lambda c, r, f=normalise: in_order(c.replace(x=f(c.x, r))),
            bias=bias,
        )


def batch_norm(case, rng, eps=1e-5):
    y = in_order(case)
    scale, shift, mean = (rng.uniform(0.5, 2, y.shape[-1]).astype(np.float32) for _ in range(3))
    variance = rng.uniform(0.05, 2, y.shape[-1]).astype(np.float32)
    return (y - mean) / np.sqrt(variance + np.float32(eps)) * scale + shift


def other_eps(case, rng):
    variance, center = (rng.uniform(0.05, 2, case.geometry.features).astype(np.float32) for _ in range(2))
    return (in_order(case) - center) * np.sqrt((variance + np.float32(1e-5)) / (variance + np.float32(1e-3))) + center


def in_training(case, rng):
    y = torch.from_numpy(np.moveaxis(in_order(case), -1, 1).copy())
    return np.moveaxis(F.batch_norm(y, None, None, training=True).numpy(), 1, -1).copy()


plant("BatchNorm left out", "CONVENTION", "^BatchNorm .*fold it", batch_norm)
for name in ("ReLU", "hard swish", "SiLU", "GELU", "sigmoid", "tanh"):  # as in MobileNets, EfficientNets, ConvNeXt
    function = of_torch(FUNCTIONS[name])
    plant(
        f"BatchNorm and {name} left out",
        "CONVENTION",
        f"^BatchNorm and {name} after",
        lambda c, r, f=function: f(batch_norm(c, r)),
    )
plant("residual", "CONVENTION", "^residual added", lambda c, r: in_order(c) + c.x)
plant("residual, no bias", "CONVENTION", "^residual added", lambda c, r: in_order(c) + c.x, bias=False)
plant("residual, ReLU", "CONVENTION", "^residual added and ReLU", lambda c, r: np.maximum(in_order(c) + c.x, 0))
plant(
    "residual, causal padding",
    "CONVENTION",
    "causal padding.*residual added",
    lambda c, r: in_order(c.replace(padding=((2, 0),))) + c.x,
    shape=(2, 30, 6),
    kernel=(3,),
)
plant("residual, flipped", "CONVENTION", "residual added", lambda c, r: in_order(flipped(c)) + c.x)
plant("BatchNorm with another eps", "CONVENTION", "BatchNorm eps.*greater eps", other_eps)
plant("BatchNorm in training mode", "CONVENTION", "BatchNorm .*as in training", in_training)


# 5. What must not be said


def one_ulp(case, rng):
    return np.nextafter(exact(case).value, np.float32(np.inf))


def at_one_phase(case, rng):
    y = in_order(case)
    y[:, 1::2, 1::2] = in_order(case.replace(kernel=np.swapaxes(case.kernel, 0, 1)))[:, 1::2, 1::2]
    return y


def one_border(case, rng):
    x = np.pad(case.x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x[:, 0] = x[:, 1]
    return in_order(case.replace(x=x, padding="VALID"))


def doubled_border(case, rng):
    y = in_order(case)
    y[:, -1] *= 2
    return y


def one_element_beside(function):
    def wrong(case, rng):
        y = function(in_order(case))
        y[1, 4, 5, 3] += 1
        return y

    return wrong


def zeroed(case, rng):
    return np.where(rng.random(case.geometry.output_shape) < 0.5, np.float32(0), in_order(case))


plant(
    "the other sign, no padding",
    "BUG",
    "^sign .*every channel has the other sign",
    lambda c, r: -in_order(c),
    padding=0,
)
plant("one ULP up", "ROUNDING", "one-sided rounding.*above the exact result", one_ulp)
plant("a transposed window at one phase", "BUG", "positions .*in rows 1 to 9 in steps of 2.*transposed", at_one_phase)
plant("one replicated border", "CONVENTION", "one border.*'replicate' before the start of axis 1", one_border)
plant("a border that counts twice", "BUG", "border .*only at the borders.*in rows 10", doubled_border)
plant(
    "ReLU, and one element",
    "BUG",
    r"single element .*ReLU.*\(1, 4, 5, 3\)",
    one_element_beside(lambda y: np.maximum(y, 0)),
)
plant("GELU, and one element", "BUG", r"single element .*GELU.*\(1, 4, 5, 3\)", one_element_beside(of_torch(F.gelu)))
plant("half of the elements zero", "BUG", "zero at elements all over the output", zeroed)


def said(result):
    """Return all words of a report on the cause."""
    return f"{result.name} | {result.cause} | {result.fix} | {result.place}"


def compared(planted, rng, compare, *, clean=False):
    """Return the comparison for the mistake, or for its clean twin."""
    wrong, case = planted.plant(rng)
    right = planted.clean(case)
    declared = planted.arithmetic and planted.arithmetic(case.dtype)
    other = backwards(case) if case.dtype.itemsize > 2 else right
    return compare(right if clean else wrong, other, case, arithmetics=(declared, declared)), case
