"""The compiled kernels in PyTorch: the bits of JAX, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxdw
from bridge import torch_ops
from bridge.numerics import same_bits
from jaxdw import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

GEOMETRIES = {
    "1-D": ((2, 19, 6), (4,), {"strides": 2, "padding": 3}),
    "2-D": ((2, 12, 11, 24), (3, 3), {"padding": 1}),
    "stride 2, dilated": ((3, 13, 12, 17), (5, 3), {"strides": 2, "padding": (4, 2), "kernel_dilation": 2}),
    "3-D": ((1, 6, 7, 5, 8), (3, 2, 3), {"padding": 1}),
    "wide padding": ((1, 9, 9, 3), (3, 3), {"padding": 3}),
    "multiplier": ((2, 9, 8, 5), (3, 2), {"padding": 1, "strides": 2, "multiplier": 3}),
    "1-D, multiplier": ((2, 19, 4), (4,), {"multiplier": 2}),
}
NAMES = {"strides": "stride", "kernel_dilation": "dilation", "padding": "padding"}


def drawn(name, seed, dtype=np.float32):
    """Arrays for JAX, and the options of both frameworks."""
    x_shape, kernel_size, options = GEOMETRIES[name]
    options = {"padding": 0, **options}
    features = x_shape[-1] * options.pop("multiplier", 1)
    rng = np.random.default_rng(seed)
    shapes = (x_shape, (*kernel_size, 1, features), (features,))
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return rng, arrays, options, {NAMES[key]: value for key, value in options.items()}


def to_torch(a):
    """Channels first; the kernel's axes `(*kernel_size, 1, C)` as `(C, 1, *kernel_size)`."""
    a = torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, a.dtype.name))
    return a if a.dim() < 2 else a.movedim((-1, -2), (0, 1)) if a.shape[-2] == 1 else a.movedim(-1, 1)


def from_torch(t, like):
    t = t.detach()
    t = t if t.dim() < 2 else t.movedim((0, 1), (-1, -2)) if like.shape[-2] == 1 else t.movedim(1, -1)
    return np.asarray(t.float() if t.dtype == torch.bfloat16 else t).astype(like.dtype)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_and_gradients_have_the_bits_of_jax(name, dtype, seed):
    rng, arrays, options, torch_options = drawn(name, seed, dtype)
    y, pull = jax.vjp(lambda x, k: jaxdw.depthwise_conv(x, k, arrays[2], method="taps", **options), *arrays[:2])
    dy = jnp.asarray(rng.standard_normal(y.shape), dtype)

    tensors = [to_torch(a).requires_grad_() for a in arrays]
    output = torch_ops.depthwise_conv(*tensors, **torch_options)
    output.backward(to_torch(dy))

    assert same_bits(from_torch(output, y), np.asarray(y)).all()
    for tensor, expected in zip(tensors, pull(dy)):
        assert same_bits(from_torch(tensor.grad, expected), np.asarray(expected)).all()
    assert torch.equal(tensors[2].grad, to_torch(dy).sum((0, *range(2, dy.ndim))))
    if output.shape[1] == tensors[0].shape[1] and dtype == jnp.float32:  # with a multiplier PyTorch has other orders
        convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[y.ndim - 2]
        own = convolution(*(t.detach().contiguous() for t in tensors), groups=output.shape[1], **torch_options)
        assert torch.equal(output, own)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hard_swish"])
def test_an_epilogue_has_the_bits_of_jax_with_gradients_and_without(name, dtype, activation, seed):
    rng, arrays, options, torch_options = drawn(name, seed, dtype)
    shape = jax.eval_shape(lambda *a: jaxdw.depthwise_conv(*a, **options), *arrays).shape
    scale, shift = (jnp.asarray(rng.standard_normal(shape[-1:]), jnp.float32) for _ in range(2))
    residual = jnp.asarray(rng.standard_normal(shape), dtype)
    epilogue = jaxdw.Epilogue(scale, shift, residual, activation)
    expected = np.asarray(jaxdw.depthwise_conv(*arrays, method="taps", epilogue=epilogue, **options))
    tensors, added = map(to_torch, arrays), {"scale": to_torch(scale), "shift": to_torch(shift)}
    added["residual"] = torch.tensor(np.asarray(residual, np.float32)).to(getattr(torch, residual.dtype.name))
    added["residual"] = added["residual"].movedim(-1, 1)
    x, weight, bias = tensors
    learned = x.clone().requires_grad_()
    for given in (x, learned):
        y = torch_ops.depthwise_conv(given, weight, bias, activation=activation, **added, **torch_options)
        actual = y.detach().float().movedim(1, -1).numpy().astype(expected.dtype)
        assert same_bits(actual, expected).all()
    y.sum().backward()
    assert learned.grad.shape == x.shape


def test_the_operation_is_a_correct_one_for_pytorch():
    x, weight = torch.randn(2, 5, 8, 9, requires_grad=True), torch.randn(5, 1, 3, 3, requires_grad=True)
    arguments = (x, weight, torch.randn(5, requires_grad=True), [2, 1], [1, 1], [1, 2])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.jaxdw.depthwise_conv.default, arguments, test_utils=checks)
    size, dy = list(x.shape), torch.randn(2, 5, 4, 7, requires_grad=True)
    bilinear = {"input": (dy, weight, size, *arguments[3:]), "weight": (x, dy, list(weight.shape), *arguments[3:])}
    for name, given in bilinear.items():
        operation = getattr(torch.ops.jaxdw, f"depthwise_conv_{name}_gradient").default
        torch.library.opcheck(operation, given, test_utils=checks)
    features = torch.randn(5)
    finished = (x.detach(), weight.detach(), features, features, features, dy.detach(), "relu6", *arguments[3:])
    torch.library.opcheck(torch.ops.jaxdw.depthwise_conv_with_epilogue.default, finished, test_utils=checks)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("epilogue", [False, True])
def test_derivatives_of_first_and_second_order_are_right(multiplier, epilogue):
    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def conv(x, weight, bias, scale=None, shift=None, residual=None):
        more = {"scale": scale, "shift": shift, "residual": residual} if epilogue else {}
        return torch_ops.depthwise_conv(x, weight, bias, stride=2, padding=1, **more)

    features = 2 * multiplier
    tensors = [tensor(1, 2, 5, 4), tensor(features, 1, 3, 3), tensor(features)]
    tensors += [tensor(features), tensor(features), tensor(1, features, 3, 2)] if epilogue else []
    assert torch.autograd.gradcheck(conv, tensors)
    assert torch.autograd.gradgradcheck(conv, tensors)


@pytest.mark.parametrize(
    "x, weight, options, error, message",
    [
        ((2, 3), (3, 1), {}, ValueError, r"`x` has shape \(2, 3\), expected"),
        ((1, 4, 8, 8), (6, 1, 3, 3), {}, ValueError, r"`weight` has shape \(6, 1, 3, 3\), expected \(C\*M, 1"),
        ((1, 4, 8, 8), (4, 1, 3), {}, ValueError, "`weight` has shape"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"stride": 0}, ValueError, "`strides` is"),
        ((1, 4, 2, 2), (4, 1, 3, 3), {}, ValueError, "expected at least one input and one output"),
        (
            (1, 4, 8, 8),
            (4, 1, 3, 3),
            {"activation": "silu"},
            ValueError,
            "`activation` is 'silu', expected None or",
        ),
        (
            (1, 4, 8, 8),
            (4, 1, 3, 3),
            {"scale": torch.ones(3)},
            ValueError,
            r"`scale` has shape \(3,\), expected \(4",
        ),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"shift": torch.ones(4).double()}, TypeError, r"`shift` is torch\.float64 on cpu"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"residual": torch.ones(4)}, ValueError, "`residual` has shape"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"scale": 2.0}, TypeError, "`scale` is a float, expected a tensor or None"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"activation": ["relu"]}, ValueError, "`activation` is"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"padding": "same"}, TypeError, "`padding` is 'same', expected an int"),
    ],
)
def test_what_does_not_fit_is_an_error(x, weight, options, error, message):
    with pytest.raises(error, match=message):
        torch_ops.depthwise_conv(torch.zeros(x), torch.zeros(weight), **options)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which PyTorch's own rules use
def test_forward_mode_is_refused_and_not_zero():
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
    with pytest.raises(NotImplementedError, match="`x` has a tangent"):
        torch.func.jvp(lambda x: torch_ops.depthwise_conv(x, weight), (x,), (x,))
    with pytest.raises(NotImplementedError, match="`weight` has a tangent"):
        torch.func.jacfwd(lambda weight: torch_ops.depthwise_conv(x, weight))(weight)


def test_only_floating_tensors_of_one_dtype_are_taken():
    with pytest.raises(TypeError, match=r"`x` is torch\.int64 on cpu, expected"):
        torch_ops.depthwise_conv(torch.zeros(1, 2, 4, 4, dtype=torch.int64), torch.zeros(2, 1, 3, 3))
    with pytest.raises(TypeError, match=r"`weight` is torch\.float64 on cpu"):
        torch_ops.depthwise_conv(torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3, dtype=torch.float64))
