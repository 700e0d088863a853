"""Symbolic batch and spatial sizes under `jax.export`: it exports, and computes what it computes for known sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import export

import jaxdw
import jaxdw.linen
import jaxdw.nnx
from jaxdw.methods import METHODS

SIZES = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}


def with_gradients(fn):
    def run(*arrays):
        y, pull = jax.vjp(fn, *arrays)
        return y, *pull(y)

    return run


def check(fn, rank, channels, symbolic, kernel_shape=None):
    """fn, exported for symbolic sizes and called with known ones, against itself; on integers, so exactly."""
    rng = np.random.default_rng(rank + channels)
    x = rng.integers(-4, 5, (2, *SIZES[rank], channels)).astype(np.float32)
    kernel = rng.integers(-4, 5, kernel_shape or (*(3,) * rank, 1, channels)).astype(np.float32)
    names = ["b", *"hwd"[:rank]]
    sizes = [name if name in symbolic else str(size) for name, size in zip(names, x.shape[:-1], strict=True)]
    shape = export.symbolic_shape(",".join([*sizes, str(channels)]))
    arguments = [jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(kernel.shape, np.float32)]
    exported = export.export(jax.jit(fn))(*arguments)
    results = exported.call(x, kernel), jax.jit(fn)(x, kernel)
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(actual, expected)


#: Which of b, h, w and d are symbolic.
BATCH, SPACE, ALL = "b", "hwd", "bhwd"

OPTIONS = {
    "SAME": {},
    "SAME with stride 2": {"strides": 2},
    "SAME_LOWER with stride 3": {"strides": 3, "padding": "SAME_LOWER"},
    "VALID": {"padding": "VALID", "strides": 2},
    "explicit": {"padding": 1, "strides": 2},
    "cropped": {"padding": -1},
    "REFLECT": {"padding": "REFLECT", "kernel_dilation": 2},
    "CIRCULAR": {"padding": "CIRCULAR", "strides": 2},
    "transposed": {"padding": 2, "input_dilation": 2},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_padding_exports_with_its_gradients(options, full):
    for rank in (1, 2, 3) if full else (2,):
        for channels in (8, 9) if full else (9,):
            for symbolic in (BATCH, SPACE, ALL) if full else (ALL,):
                check(with_gradients(lambda x, k: jaxdw.depthwise_conv(x, k, **options)), rank, channels, symbolic)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["auto", *(method for method in METHODS if method != "fft")])  # it is not exact
def test_every_method_exports_with_its_gradients(method):
    fn = with_gradients(lambda x, k: jaxdw.depthwise_conv(x, k, method=method, strides=2))
    for channels, symbolic in ((9, BATCH), (8, ALL)):
        check(fn, 1, channels, symbolic)


def test_causal_padding_and_a_kernel_of_many_taps_export():
    check(with_gradients(lambda x, k: jaxdw.depthwise_conv(x, k, padding="CAUSAL")), 1, 9, ALL)
    for method in ("taps", "rows"):
        many = with_gradients(lambda x, k, method=method: jaxdw.depthwise_conv(x, k, strides=2, method=method))
        for symbolic in (BATCH, ALL):
            check(many, 1, 9, symbolic, (70, 1, 9))
            check(many, 2, 9, symbolic, (9, 8, 1, 18))


@pytest.mark.parametrize("symbolic", [BATCH, SPACE, ALL], ids=["batch", "space", "both"])
def test_windows_and_the_drop_in_export(symbolic):
    def windows(x, kernel):
        kernel_size = kernel.shape[:-2]
        taken = jaxdw.unfold(x, kernel_size, strides=2)
        return (
            jaxdw.windowed_conv(lambda w: w * abs(w), x, kernel, padding="REFLECT"),
            jaxdw.contract(taken, kernel),
            jaxdw.fold(taken, x.shape[1:-1], strides=2),
            jaxdw.unfold(x, kernel_size, method="patches", padding="VALID"),
            jaxdw.map_windows(lambda w: w.max(-2), x, kernel_size),
            jaxdw.conv_general_dilated(
                x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=x.shape[-1]
            ),
        )

    check(windows, 1, 9, symbolic)


TRANSPOSED = {
    "PyTorch's": {"padding": 1, "output_padding": 1},
    "SAME": {"padding": "SAME"},
    "VALID": {"padding": "VALID", "transpose_kernel": False},
    "CIRCULAR": {"padding": "CIRCULAR"},
    "CIRCULAR as Flax's": {"padding": "CIRCULAR", "transpose_kernel": False, "kernel_dilation": 2},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolutions_export_with_their_gradients(options, full):
    fn = with_gradients(lambda x, k: jaxdw.depthwise_conv_transpose(x, k, strides=2, **options))
    for symbolic in (BATCH, SPACE, ALL) if full else (ALL,):
        check(fn, 2, 9, symbolic)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("symbolic", [BATCH, SPACE, ALL], ids=["batch", "space", "both"])
def test_causal_convolutions_export_with_their_gradients(symbolic):
    def causal(x, kernel):
        ids = jnp.zeros(x.shape[:-1], np.int32)
        y, state = jaxdw.causal_conv1d(x, kernel, return_state=True)
        packed, last = jaxdw.causal_conv1d(x, kernel, segment_ids=ids, return_state=True)
        return y, state, packed, last, *jaxdw.causal_conv1d_step(x[:, 0], state, kernel)

    check(with_gradients(causal), 1, 9, symbolic)


@pytest.mark.parametrize("padding, window_fn", [("SAME", None), ("REFLECT", abs)], ids=["plain", "window_fn"])
def test_both_modules_export(padding, window_fn):
    options = {"strides": 2, "padding": padding, "window_fn": window_fn, "use_bias": False}

    def in_nnx(x, kernel):
        layer = jaxdw.nnx.DepthwiseConv(9, (3, 3), **options, rngs=nnx.Rngs(0))
        layer.kernel[...] = kernel
        return (layer(x),)

    def in_linen(x, kernel):
        layer: linen.Module = jaxdw.linen.DepthwiseConv(9, (3, 3), **options)
        return (layer.apply({"params": {"kernel": kernel}}, x),)

    for module in (in_nnx, in_linen):
        check(module, 2, 9, ALL)
