"""Functions and layers of a user: how they are called, in which framework, with which order of axes."""

import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen, nnx
from jax import lax

import bridge
import jaxdw
from bridge._implementations import ImplementationError, implementation
from bridge.diagnosis import Verdict
from tests.bridge.implementations import question


def draw(seed, shape=(2, 6, 6, 3), kernel_size=(3, 3), bias=False, multiplier=1, **options):
    rng = np.random.default_rng(seed)
    features = shape[-1] * multiplier
    arrays = [rng.standard_normal(size, np.float32) for size in (shape, (*kernel_size, 1, features), (features,))]
    return bridge.Case(*arrays[: 2 + bias], **({"padding": 1} | options))


def verdict(function, case, name="mine"):
    """The verdict against PyTorch's convolution, and how the function was called."""
    diagnosis = bridge.parity(case, {name: function}, explain=False)
    (called,) = diagnosis.calls.values()
    return diagnosis.verdict, called


class Layer(torch.nn.Module):
    def __init__(self, channels, kernel=3, stride=1, bias=True):
        super().__init__()
        self.inner = torch.nn.Conv2d(channels, channels, kernel, stride, padding=1, groups=channels, bias=bias)

    def forward(self, x):
        return self.inner(x)


class Wrapped(torch.nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Square(torch.nn.Conv2d):
    def __init__(self, channels, **settings):
        super().__init__(channels, channels, 3, **settings)


class Inside(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inner = torch.nn.Conv2d(**settings)

    def forward(self, x):
        return self.inner(x)


class WrappedInFlax(nnx.Conv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class NoWeights(torch.nn.Module):
    def forward(self, x):
        return x


class OnlyPositions(torch.nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)


def any_arguments(*arguments, **settings):
    return F.conv2d(*arguments, **settings)


def decorated():
    @functools.wraps(F.conv2d)
    def wrapper(*arguments, **settings):
        return F.conv2d(*arguments, **settings)

    return wrapper


def channels_last_in_torch(x, w, padding=0):
    return F.conv2d(x.movedim(-1, 1), w, padding=padding, groups=len(w)).movedim(1, -1)


def three_axes(x, w, padding=0):
    taps = torch.einsum("nctl,ct->ncl", F.unfold(x, w.shape[1:], padding=padding).unflatten(1, (3, -1)), w.flatten(1))
    assert w.ndim == 3
    return taps.reshape(x.shape)


def imports_inside(x, k, padding=0):
    from jax import lax as inner

    return inner.conv_general_dilated(x, k, (1, 1), [(padding, padding)] * 2, feature_group_count=x.shape[1])


def says_nothing(x, k, padding=0):
    """Only operators: the first framework whose arrays it takes is PyTorch's."""
    return padding * x * k.reshape(-1)[0] + x


def windows_in_numpy(x, w, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijoc->nhwc", windows, w)


NHWC = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def fixed_padding(a, b, c=None):
    return F.conv2d(a, b, c, padding=1, groups=3)


def positional_only(x, w, stride=1, padding=0, /):
    return F.conv2d(x, w, None, stride, padding, groups=3)


def third_is_none(a, b, c=None, padding=0):
    return F.conv2d(a, b, c, padding=padding, groups=3)


#: A function, the options of the case, and what the call must say. All compute the convolution.
RIGHT = {
    "names": (question.depthwise_conv2d_matmul, {"strides": 2, "bias": True}, "weight, bias, stride=2, padding=1"),
    "positional only": (positional_only, {}, "(x, w, stride=1, padding=1)"),
    "any keywords": (lambda x, w, **kw: F.conv2d(x, w, **kw), {"strides": (2, 1)}, "stride=(2, 1), padding=1, groups"),
    "any arguments": (any_arguments, {"bias": True}, "(x, kernel, bias, padding=1, groups=3)"),
    "decorated": (decorated(), {"kernel_dilation": 2}, "dilation=2"),
    "partial": (functools.partial(F.conv2d, groups=3, padding=1), {}, "(input, weight)"),
    "built in": (F.conv2d, {"bias": True, "strides": 2}, "stride=2, padding=1, groups=3"),
    "positions": (lambda a, b, c: fixed_padding(a, b, c), {"bias": True}, "(a, b, c)"),
    "a bias that is None by default": (third_is_none, {"bias": True}, "(a, b, c, padding=1)"),
    "no bias where it is None by default": (third_is_none, {}, "(a, b, padding=1)"),
    "a bias that is not there": (lambda a, b, c: fixed_padding(a, b, c), {}, "c=None"),
    "asymmetric padding": (F.conv2d, {"padding": "SAME", "strides": 2, "kernel_size": (2, 2)}, "groups=3"),
    "periodic padding": (F.conv2d, {"padding": "CIRCULAR"}, "groups=3"),
    "input dilation": (F.conv2d, {"input_dilation": 2}, "groups=3"),
    "1-D": (F.conv1d, {"shape": (2, 9, 4), "kernel_size": (3,)}, "padding=1, groups=4"),
    "3-D": (F.conv3d, {"shape": (1, 5, 4, 6, 2), "kernel_size": (3, 2, 2), "padding": (1, 0, 2)}, "padding=(1, 0, 2)"),
    "batch axes": (jaxdw.depthwise_conv, {"shape": (2, 2, 6, 6, 3), "strides": 2}, "padding=((1, 1), (1, 1))"),
    "multiplier": (jaxdw.depthwise_conv, {"multiplier": 2, "bias": True}, "(x, kernel, bias"),
    "a word": (lambda x, k, padding="VALID": jaxdw.depthwise_conv(x, k, padding=padding), {}, "padding='SAME'"),
    "lax": (NHWC, {"strides": 2}, "window_strides=(2, 2), padding=((1, 1), (1, 1)), feature_group_count=3): JAX"),
    "lax, channels first": (lax.conv_general_dilated, {"shape": (2, 6, 7, 3)}, "JAX arrays, channels first"),
    "jit": (jax.jit(lambda x, k: jaxdw.depthwise_conv(x, k, padding=1)), {}, "(x, k)"),
    "torch, channels last": (channels_last_in_torch, {"shape": (2, 6, 7, 3)}, "last, the kernel channels first"),
    "a kernel of three axes": (three_axes, {"shape": (2, 6, 7, 3)}, "channels first, the kernel of shape (3, 3, 3)"),
    "imports inside": (imports_inside, {"shape": (2, 6, 7, 3)}, "JAX arrays, channels first"),
    "NumPy": (windows_in_numpy, {"strides": 2, "shape": (2, 6, 7, 3)}, "NumPy arrays, channels last"),
    "a class of torch": (torch.nn.Conv2d, {"bias": True, "strides": 2}, "in_channels=3, out_channels=3, kernel_size=3"),
    "a class of any arguments": (Wrapped, {"bias": True, "strides": 2}, "in_channels=3, out_channels=3, kernel_size=3"),
    "a class of one name and any keywords": (Square, {"strides": 2}, "channels=3, stride=2, padding=1, groups=3"),
    "a class of keywords for a layer inside": (Inside, {"bias": True}, "in_channels=3, out_channels=3, kernel_size=3"),
    "a class of any arguments of nnx": (WrappedInFlax, {"bias": True, "strides": 2}, "in_features=3, out_features=3"),
    "a class of the user": (Layer, {"bias": True, "strides": 2}, "channels=3, stride=2"),
    "a layer of torch": (Layer(3), {"bias": True}, "with the case's weights: PyTorch"),
    "a layer without the bias of the case": (Layer(3), {}, "with the case's weights"),
    "a class of nnx": (nnx.Conv, {"bias": True, "strides": 2}, "in_features=3, out_features=3"),
    "a layer of nnx": (nnx.Conv(3, 3, (3, 3), padding=1, feature_group_count=3, rngs=nnx.Rngs(0)), {}, "weights: JAX"),
    "jaxdw's class": (jaxdw.nnx.DepthwiseConv, {"multiplier": 2, "bias": True}, "features=3, kernel_size=(3, 3)"),
    "a class of linen": (linen.Conv, {"bias": True, "strides": 2}, "features=3, kernel_size=(3, 3)"),
    "a layer of linen": (linen.Conv(3, (3, 3), padding=1, feature_group_count=3), {"bias": True}, "weights: JAX"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_function_or_layer_is_called_as_its_parameters_say(name, seed):
    function, options, words = RIGHT[name]
    found, called = verdict(function, draw(seed, **options))
    assert found.passes, (found, called)
    assert words in called


def no_padding(x, w):
    return F.conv2d(x, w, groups=3)


#: A function, the options of the case, and the words of the error.
WRONG = {
    "no bias": (lambda x, w, padding: no_padding(x, w), {"bias": True}, "no parameter takes it"),
    "no default": (lambda x, w, padding, norm: x, {}, "nothing is known to pass as `norm`; give it a default"),
    "no layer": (torch.nn.Conv2d(3, 6, 3), {}, r"parameters of shapes .* expected one kernel \(3, 1, 3, 3\)"),
    "a layer without bias": (Layer(3, bias=False), {"bias": True}, "the case has a bias, and Layer has none"),
    "a class that fails": (torch.nn.MultiheadAttention, {}, r"cannot be made: .*known to pass as `embed_dim`"),
    "a class without weights": (NoWeights, {}, r"NoWeights has parameters of shapes \{\}, expected one kernel"),
    "a class of positions": (OnlyPositions, {}, "mine cannot be made: TypeError: .*missing 3 required"),
    "complex": (lambda x, w: F.conv2d(x, w, padding=1, groups=3) * (1 + 5j), {}, "mine returned dtype complex64, exp"),
    "integers": (lambda x, w: torch.round(x).int(), {}, "dtype int32, expected a real floating dtype: it was given fl"),
    "truth values": (lambda x, w: torch.gt(x, 0), {}, "mine returned dtype bool, expected a real floating dtype"),
    "complex in JAX": (lambda x, w: lax.complex(x, x), {}, "mine returned dtype complex64"),
    "shape": (no_padding, {}, r"returned shape \(2, 3, 4, 4\), expected shape \(2, 3, 6, 6\)"),
    "not traced": (lambda x, w: jax.numpy.asarray(np.asarray(x)), {}, r"mine\[jit=off\] it is not traced"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_cannot_be_called_says_why(name, seed):
    function, options, words = WRONG[name]
    with pytest.raises(ImplementationError, match=words):
        bridge.parity(draw(seed, **options), {"mine": function})


def test_complex_arrays_of_numpy_are_refused(seed):
    function = lambda x, w: windows_in_numpy(x, w, padding=1) * 1j  # noqa: E731
    with pytest.raises(ImplementationError, match="mine returned dtype complex64"):
        bridge.parity(draw(seed), {"mine[framework=numpy]": function})


def test_settings_say_what_no_trial_tells(seed):
    square = draw(seed, (2, 5, 5, 5))
    found, called = verdict(lambda x, w, padding=0: F.conv2d(x, w, padding=padding, groups=5), square)
    assert found is Verdict.IDENTICAL and "mine[axes=channels_last] takes the other order" in called
    found, called = verdict(channels_last_in_torch, square, "mine[axes=channels_last]")
    assert found is Verdict.IDENTICAL and "channels last" in called and "the shapes do not tell" not in called
    assert "PyTorch tensors" in verdict(says_nothing, draw(seed))[1]
    assert "JAX arrays" in verdict(says_nothing, draw(seed), "mine[framework=jax]")[1]
    jax_function = lambda x, k: jaxdw.depthwise_conv(x, k, padding=1)  # noqa: E731
    for function, name, spelled in (
        (F.conv2d, "mine[layout=channels_first,threads=1]", "mine[axes=channels_first,threads=1]"),
        (F.conv2d, "mine[layout=channels_last]", "mine[layout=channels_last]"),  # the format in memory
        (jax_function, "mine[layout=channels_last]", "mine[axes=channels_last]"),
    ):
        assert implementation(name, function=function).name == spelled
    with pytest.raises(ValueError, match="`axes` is 'NHWC', expected one of channels_first, channels_last"):
        implementation("mine[axes=NHWC]", function=F.conv2d)
    with pytest.raises(ValueError, match=r"takes none of these .*torch: .*jax: .*numpy: "):
        implementation("mine", function=lambda x, w: None)


def test_parity_takes_functions_in_a_list_and_gradients_pass_through_them(seed):
    case = draw(seed, bias=True)
    dy = np.ones(case.geometry.output_shape, np.float32)
    names = ["jax.taps", question.depthwise_conv2d_matmul, Layer(3)]
    diagnosis = bridge.parity(case, names, quantity="dx", dy=dy)
    assert diagnosis.names == ["jax.taps", "depthwise_conv2d_matmul", "Layer"] and diagnosis.verdict.passes
    with pytest.raises(TypeError, match="expected names, functions, or objects"):
        bridge.parity(case, ["jax.taps", 3])
    with pytest.raises(ImplementationError, match="NumPy arrays, which has no gradient"):
        bridge.parity(case.replace(bias=None), {"mine": windows_in_numpy}, quantity="dx", dy=dy)


def test_what_is_no_function_is_named_and_prints_go_to_standard_error(seed, tmp_path, monkeypatch, capsys):
    (tmp_path / "printing_model.py").write_text(
        "import torch.nn.functional as F\nn = 3\nprint('on import')\n"
        "def conv(x, w):\n    print('in a call')\n    return F.conv2d(x, w, padding=1, groups=3)\n"
        "def unsaid(x, k):\n    print('in a trial')\n    return x\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is 'printing_model:n', of type int, expected a function, a layer, or the cl"):
        implementation("printing_model:n")
    with pytest.raises(ValueError, match="expected a function: printing_model has no 'missing'"):
        implementation("printing_model:missing")
    assert bridge.parity(draw(seed), ["torch.conv2d", "printing_model:conv"], explain=False).verdict.passes
    implementation("printing_model:unsaid", draw(seed))
    out, err = capsys.readouterr()
    assert not out and "on import" in err and "in a call" in err


def in_one_row(x, weight, bias=None, padding=0):
    weight = weight[..., None, :]
    return F.conv2d(x[..., None, :], weight, bias, padding=(0, padding), groups=x.shape[1])[..., 0, :]


def same_size(x, weight):
    return F.conv1d(x, weight, padding="same", groups=x.shape[1])


class Row(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv1d(5, 5, 31, padding=15, groups=5)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("function", ["torch.conv2d", in_one_row, same_size, Row()])
def test_a_convolution_that_does_not_return_is_refused(function, seed, monkeypatch):
    """As on a processor with AVX512-FP16; other kernels, dtypes and ways to compute are not refused."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("jaxdw.onednn._simd", lambda: frozenset(["AVX512_SKX", "AVX512_SPR"]))
    case = draw(seed, (1, 40, 5), (31,), padding=15)
    half = bridge.Case(case.x.astype(np.float16), case.kernel.astype(np.float16), padding=15)
    with pytest.raises(ImplementationError, match="does not return from a depthwise convolution in float16"):
        bridge.parity(half, [function, "numpy.exact"] if isinstance(function, str) else {"mine": function})
    assert implementation("torch.conv2d").run(case).shape == implementation("torch.unfold_matmul").run(half).shape
    monkeypatch.setattr("jaxdw.onednn._allowed", lambda: "AVX512_CORE_BF16")
    assert not jaxdw.onednn.never_returns(5, 31, 40)


def test_short_kernels_in_float16_are_not_refused(seed):
    case = draw(seed, (1, 40, 5), (3,), padding=1)
    half = bridge.Case(case.x.astype(np.float16), case.kernel.astype(np.float16), padding=1)
    assert verdict(in_one_row, half)[0].passes
