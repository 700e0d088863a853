"""Every mode and order of differentiation, and vmap over either operand, of `taps` and `rows`: whole numbers are exact
in any order of summation, so XLA's own convolution must give the very same."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax

import jaxdw

PROBLEMS = {
    "few channels": ((2, 9, 8, 3), (3, 3), 1, {"padding": 1}),
    "stride": ((2, 9, 8, 16), (3, 3), 1, {"padding": "SAME", "strides": 2}),
    "multiplier": (
        (2, 9, 8, 9),
        (3, 2),
        2,
        {"padding": ((1, 2), (0, 3)), "strides": (2, 3), "kernel_dilation": (2, 1)},
    ),
    "1-D": ((2, 9, 9), (3,), 1, {"padding": 2}),
    "3-D": ((2, 5, 6, 7, 9), (2, 3, 2), 1, {"padding": 1, "strides": 2}),
    "circular": ((2, 9, 8, 9), (3, 3), 1, {"padding": "CIRCULAR"}),
    "reflect": ((2, 9, 8, 9), (3, 3), 1, {"padding": "REFLECT", "strides": 2}),
    "input dilation": ((2, 5, 4, 9), (3, 3), 1, {"padding": 2, "input_dilation": (2, 3), "strides": (3, 2)}),
    "batch axes": ((3, 2, 7, 7, 9), (5, 5), 1, {"padding": 2}),
}


def equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(a, b)


CASES = [(name, method) for name in PROBLEMS for method in ("taps", "rows")]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(CASES[case]))
def test_every_mode_and_order_is_that_of_lax(case, seed, full):
    rng = np.random.default_rng(seed)
    if not full and case not in rng.permutation(len(CASES))[:4]:
        pytest.skip("four of these, drawn by the seed; all with --full")
    name, method = CASES[case]
    shape, size, multiplier, options = PROBLEMS[name]

    def draw(*shape):
        return rng.integers(-3, 4, shape).astype(np.float32)

    def ours(x, w):
        return jaxdw.depthwise_conv(x, w, method=method, **options)

    def theirs(x, w):
        return jaxdw.depthwise_conv(x, w, method="grouped", **options)

    kernel = (*size, 1, shape[-1] * multiplier)
    x, w, dx, dw = draw(*shape), draw(*kernel), draw(*shape), draw(*kernel)
    y = ours(x, w)
    equal(y, theirs(x, w))
    dy = draw(*y.shape)

    def both(f):
        return (
            jax.vjp(f, x, w)[1](dy),
            jax.jvp(f, (x, w), (dx, dw)),
            jax.jvp(jax.grad(lambda x, w: (f(x, w) ** 2).sum(), argnums=(0, 1)), (x, w), (dx, dw)),
            jax.vjp(jax.grad(lambda x, w: (f(x, w) ** 2).sum(), argnums=(0, 1)), x, w)[1]((dx, dw)),
        )

    equal(both(ours), both(theirs))
    back = jax.vjp(theirs, x, w)[1](dy)
    equal(jax.linear_transpose(lambda x: ours(x, w), x)(dy), back[:1])
    equal(jax.linear_transpose(lambda w: ours(x, w), w)(dy), back[1:])
    equal(jax.vjp(jax.checkpoint(ours), x, w)[1](dy), back)
    equal(lax.scan(lambda carry, w: (carry, ours(carry, w)), x, w[None])[1][0], y)
    many, kernels = draw(3, *shape), draw(3, *kernel)
    for axes, operands in (((0, None), (many, w)), ((None, 0), (x, kernels)), ((0, 0), (many, kernels))):

        def gradients(x, w):
            return jax.grad(lambda x, w: (ours(x, w) ** 2).sum(), argnums=(0, 1))(x, w)

        each = [tuple(o if a is None else o[i] for o, a in zip(operands, axes)) for i in range(3)]
        equal(jax.vmap(ours, in_axes=axes)(*operands), np.stack([ours(*pair) for pair in each]))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(gradients(*pair) for pair in each))
        equal(jax.vmap(gradients, in_axes=axes)(*operands), stacked)
