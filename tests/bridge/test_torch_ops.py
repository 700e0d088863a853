"""The compiled kernels in PyTorch: the bits of JAX, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxdw
from bridge import torch_ops
from jaxdw import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

GEOMETRIES = {
    "1-D": ((2, 19, 6), (4,), {"strides": 2, "padding": 3}),
    "2-D": ((2, 12, 11, 24), (3, 3), {"padding": 1}),
    "stride 2, dilated": ((3, 13, 12, 17), (5, 3), {"strides": 2, "padding": (4, 2), "kernel_dilation": 2}),
    "3-D": ((1, 6, 7, 5, 8), (3, 2, 3), {"padding": 1}),
    "wide padding": ((1, 9, 9, 3), (3, 3), {"padding": 3}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward_and_gradients_have_the_bits_of_jax(name, seed):
    x_shape, kernel_size, options = GEOMETRIES[name]
    rng = np.random.default_rng(seed)
    channels = x_shape[-1]
    x, kernel = rng.standard_normal(x_shape, np.float32), rng.standard_normal((*kernel_size, 1, channels), np.float32)
    bias = rng.standard_normal(channels, np.float32)
    y, pull = jax.vjp(lambda x, k: jaxdw.depthwise_conv(x, k, jnp.asarray(bias), method="taps", **options), x, kernel)
    dy = rng.standard_normal(y.shape, np.float32)
    dx, dkernel = pull(jnp.asarray(dy))

    tensors = [
        torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_(),
        torch.tensor(np.moveaxis(kernel, (-1, -2), (0, 1))).requires_grad_(),
        torch.tensor(bias).requires_grad_(),
    ]
    names = {"strides": "stride", "kernel_dilation": "dilation", "padding": "padding"}
    torch_options = {names[key]: value for key, value in options.items()}
    output = torch_ops.depthwise_conv(*tensors, **torch_options)
    output.backward(torch.tensor(np.moveaxis(dy, -1, 1)))

    assert (np.moveaxis(output.detach().numpy(), 1, -1) == np.asarray(y)).all()
    assert (np.moveaxis(tensors[0].grad.numpy(), 1, -1) == np.asarray(dx)).all()
    assert (np.moveaxis(tensors[1].grad.numpy(), (0, 1), (-1, -2)) == np.asarray(dkernel)).all()
    assert torch.equal(tensors[2].grad, torch.tensor(np.moveaxis(dy, -1, 1)).sum((0, *range(2, dy.ndim))))
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(kernel_size)]
    own = convolution(*(t.detach().contiguous() for t in tensors), groups=channels, **torch_options)
    assert torch.equal(output, own)


def test_the_operation_is_a_correct_one_for_pytorch():
    x, weight = torch.randn(2, 5, 8, 9, requires_grad=True), torch.randn(5, 1, 3, 3, requires_grad=True)
    arguments = (x, weight, torch.randn(5, requires_grad=True), [2, 1], [1, 1], [1, 2])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.jaxdw.depthwise_conv.default, arguments, test_utils=checks)
    double = functools.partial(torch_ops.depthwise_conv, stride=2, padding=1)
    assert torch.autograd.gradcheck(
        double,
        (
            torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True),
            torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True),
        ),
    )


@pytest.mark.parametrize(
    "x, weight, options, error, message",
    [
        ((2, 3), (3, 1), {}, ValueError, r"`x` has shape \(2, 3\), expected"),
        ((1, 4, 8, 8), (8, 1, 3, 3), {}, ValueError, r"`weight` has shape \(8, 1, 3, 3\), expected \(4, 1"),
        ((1, 4, 8, 8), (4, 1, 3), {}, ValueError, "`weight` has shape"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"stride": 0}, ValueError, "`strides` is"),
        ((1, 4, 2, 2), (4, 1, 3, 3), {}, ValueError, "expected at least one input and one output"),
    ],
)
def test_what_does_not_fit_is_an_error(x, weight, options, error, message):
    with pytest.raises(error, match=message):
        torch_ops.depthwise_conv(torch.zeros(x), torch.zeros(weight), **options)


def test_only_floating_tensors_of_one_dtype_are_taken():
    with pytest.raises(TypeError, match=r"`x` is torch\.int64 on cpu, expected"):
        torch_ops.depthwise_conv(torch.zeros(1, 2, 4, 4, dtype=torch.int64), torch.zeros(2, 1, 3, 3))
    with pytest.raises(TypeError, match=r"`weight` is torch\.float64 on cpu"):
        torch_ops.depthwise_conv(torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3, dtype=torch.float64))
