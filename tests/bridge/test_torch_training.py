"""The kernels of a training step in PyTorch: the bits of JAX, forward and backward, and a network as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import jaxdw
from bridge import torch_ops
from bridge.numerics import same_bits
from jaxdw import native
from jaxdw.full_conv import ordered_conv
from jaxdw.matmul import ordered_matmul, ordered_mean
from jaxdw.norm import batch_norm
from jaxdw.training import cross_entropy

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())


def drawn(rng, dtype, *shapes):
    """JAX arrays, and tensors of the same numbers that need gradients."""
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return arrays, [to_torch(array).requires_grad_() for array in arrays]


def to_torch(a):
    return torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, a.dtype.name))


def equal(tensor, array):
    numbers = tensor.detach()
    numbers = numbers.float() if numbers.dtype == torch.bfloat16 else numbers
    return same_bits(numbers.numpy().astype(array.dtype), np.asarray(array)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("order", [None, jaxdw.SumOrder.blocks((3, 7, 20)), jaxdw.SumOrder.chain(range(19, -1, -1))])
def test_products_have_the_bits_of_jax(dtype, order, seed):
    (x, w, bias, dy), tensors = drawn(np.random.default_rng(seed), dtype, (2, 350, 20), (20, 9), (9,), (2, 350, 9))
    y, pull = jax.vjp(lambda *operands: ordered_matmul(*operands, order=order), x, w, bias)
    output = torch_ops.ordered_matmul(*tensors[:3], order=order)
    output.backward(tensors[3].detach())
    assert equal(output, y)
    for tensor, expected in zip(tensors, pull(dy)):
        assert equal(tensor.grad, expected)


@pytest.mark.parametrize(
    "kernel, options",
    [((3, 3), {"stride": 2, "padding": 1}), ((1, 1), {"stride": 2}), ((2, 3), {"dilation": (1, 2), "padding": (1, 0)})],
)
def test_convolutions_over_all_channels_have_the_bits_of_jax(kernel, options, seed):
    rng = np.random.default_rng(seed)
    (x, w, bias), _ = drawn(rng, jnp.float32, (2, 9, 8, 5), (*kernel, 5, 7), (7,))
    names = {"stride": "strides", "padding": "padding", "dilation": "kernel_dilation"}
    ours = {"padding": 0, **{names[name]: value for name, value in options.items()}}
    y, pull = jax.vjp(lambda w, bias: ordered_conv(x, w, bias, **ours), w, bias)
    dy = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    weight = to_torch(w).permute(3, 2, 0, 1).contiguous().requires_grad_()
    start = to_torch(bias).requires_grad_()
    output = torch_ops.conv(to_torch(x).movedim(-1, 1), weight, start, **options)
    output.backward(to_torch(dy).movedim(-1, 1))
    assert equal(output.movedim(1, -1), y)
    dw, dbias = pull(dy)
    assert equal(weight.grad.permute(2, 3, 1, 0), dw) and equal(start.grad, dbias)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_normalization_has_the_bits_of_jax_and_of_its_steps(activation, dtype, seed):
    rng = np.random.default_rng(seed)
    (x, dy), _ = drawn(rng, dtype, (3, 9, 7, 21), (3, 9, 7, 21))
    (scale, bias), parameters = drawn(rng, jnp.float32, 21, 21)
    y, pull = jax.vjp(lambda *operands: batch_norm(*operands, activation=activation)[0], x, scale, bias)
    image = to_torch(x).movedim(-1, 1).requires_grad_()
    output = torch_ops.batch_norm(image, None, None, *parameters, True, activation=activation)
    output.backward(to_torch(dy).movedim(-1, 1))
    assert equal(output.movedim(1, -1), y)
    for gradient, expected in zip((image.grad.movedim(1, -1), *(p.grad for p in parameters)), pull(dy)):
        assert equal(gradient, expected)
    if dtype == jnp.float32 and activation:  # the same steps one after the other
        alone = torch_ops.batch_norm(image.detach(), None, None, *parameters, True)
        assert torch.equal(getattr(F, activation)(alone), output)


def test_means_and_losses_have_the_bits_of_jax(seed):
    rng = np.random.default_rng(seed)
    (x, dy, logits), _ = drawn(rng, jnp.float32, (3, 7, 5, 10), (3, 10), (3, 10))
    y, pull = jax.vjp(lambda x: ordered_mean(x.reshape(3, 35, 10)), x)
    image = to_torch(x).movedim(-1, 1).requires_grad_()
    output = torch_ops.global_average_pool(image)
    output.backward(to_torch(dy))
    assert equal(output, y) and equal(image.grad.movedim(1, -1), pull(dy)[0])
    labels = rng.integers(0, 10, 3)
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, jnp.asarray(labels))
    given = to_torch(logits).requires_grad_()
    torch_ops.cross_entropy(given, torch.tensor(labels)).backward()
    assert equal(torch_ops.cross_entropy(given, torch.tensor(labels)), loss) and equal(given.grad, gradient)


def test_running_statistics_are_those_of_pytorch():
    """Two values of a channel, whose statistics are exact."""
    x = torch.tensor([[0.0, 2.0], [4.0, 8.0]])
    layers = [torch.nn.BatchNorm1d(2, momentum=0.5) for _ in range(2)]
    layers[0](x)
    with torch_ops.jaxdw_arithmetic():
        layers[1](x)
    for ours, theirs in zip(layers[1].buffers(), layers[0].buffers()):
        assert torch.equal(ours, theirs)


def test_gradients_are_right():
    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def norm(x, weight, bias):
        return torch_ops.batch_norm(x, None, None, weight, bias, True)

    assert torch.autograd.gradcheck(torch_ops.ordered_matmul, (tensor(2, 3, 4), tensor(4, 2), tensor(2)))
    assert torch.autograd.gradgradcheck(torch_ops.ordered_matmul, (tensor(3, 4), tensor(4, 2), tensor(2)))
    assert torch.autograd.gradcheck(lambda *t: torch_ops.conv(*t, padding=1), (tensor(1, 2, 4, 3), tensor(3, 2, 3, 3)))
    assert torch.autograd.gradcheck(norm, (tensor(3, 2, 2, 2), tensor(2), tensor(2)))
    assert torch.autograd.gradcheck(torch_ops.global_average_pool, (tensor(2, 3, 2, 2),))
    labels = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda logits: torch_ops.cross_entropy(logits, labels), (tensor(2, 3),))


def test_the_operations_are_correct_ones_for_pytorch():
    x, w, channels = torch.randn(4, 3), torch.randn(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    given = {
        "ordered_matmul": (x, w, None, None, 0),
        "global_average_pool": (image,),
        "batch_norm": (image, channels, channels.detach(), 1e-5, "relu"),
        "cross_entropy": (x.clone().requires_grad_(), torch.tensor([0, 1, 2, 0])),
    }
    for name, arguments in given.items():
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.jaxdw, name).default, arguments, test_utils=checks)


def test_sgd_is_that_of_pytorch_where_nothing_is_rounded():
    theirs, ours = ([torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))] for _ in range(2))
    options = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "nesterov": True}
    for parameters, optimizer in ((theirs, torch.optim.SGD), (ours, torch_ops.SGD)):
        steps = optimizer(parameters, **options)
        for _ in range(3):
            steps.zero_grad()
            (parameters[0] ** 2).sum().backward()
            steps.step()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: torch.matmul(torch.ones(2, 2), torch.ones(2, 2)), "`torch.matmul` has no arithmetic of jaxdw"),
        (lambda: torch.ones(2, 2) @ torch.ones(2, 2), "`torch.Tensor.*matmul.*` has no arithmetic of jaxdw"),
        (lambda: F.softmax(torch.ones(2), 0), "`F.softmax` has no arithmetic"),
        (lambda: F.conv2d(torch.ones(1, 4, 3, 3), torch.ones(4, 2, 1, 1), groups=2), "`groups` is 2, expected 1 or"),
        (lambda: F.cross_entropy(torch.ones(1, 2), torch.tensor([0]), label_smoothing=0.1), "`label_smoothing` 0.1"),
        (lambda: F.adaptive_avg_pool2d(torch.ones(1, 2, 4, 4), 2), "`output_size` is 2, expected 1"),
        (lambda: torch.ones(1, 2, 4, 4).mean(1), "`dim` is 1, expected all spatial axes"),
    ],
)
def test_what_has_no_arithmetic_is_named(run, message):
    with torch_ops.jaxdw_arithmetic(), pytest.raises(NotImplementedError, match=message):
        run()


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda: torch_ops.ordered_matmul(torch.ones(2, 3), torch.ones(2, 3)), ValueError, "`x` and `w` have shapes"),
        (lambda: torch_ops.ordered_matmul([1], torch.ones(2, 3)), TypeError, "`x` is a list, expected a tensor"),
        (
            lambda: torch_ops.ordered_matmul(torch.ones(2, 3), torch.ones(3, 2), order=jaxdw.SumOrder.chain(2)),
            ValueError,
            "`order` has 2 terms, expected 3",
        ),
        (
            lambda: torch_ops.batch_norm(torch.ones(1, 3), None, None, training=True),
            ValueError,
            "`x` has shape .*, expected more than one value per channel",
        ),
        (
            lambda: torch_ops.batch_norm(torch.ones(2, 3), None, None, torch.ones(2)),
            ValueError,
            r"`weight` has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: torch_ops.cross_entropy(torch.ones(1, 2), torch.tensor([2])),
            ValueError,
            "`labels` has 2 to 2, expected 0 to 1",
        ),
        (lambda: torch_ops.SGD([torch.ones(1)], lr=-1), ValueError, "`lr` is -1, expected a number from 0 on"),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()
