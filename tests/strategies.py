"""Random geometries and data for property tests."""

import dataclasses

import hypothesis.strategies as st
import numpy as np

WORDS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes, options and a seed; prints as something to paste."""

    x_shape: tuple
    kernel_shape: tuple
    options: dict
    bias: bool
    seed: int

    def arrays(self, dtype=np.float64):
        """(x, kernel, bias or None), normal random numbers rounded to dtype."""
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal(self.x_shape).astype(dtype)
        kernel = rng.standard_normal(self.kernel_shape).astype(dtype)
        bias = rng.standard_normal(self.kernel_shape[-1:]).astype(dtype)
        return x, kernel, bias if self.bias else None

    @property
    def rank(self):
        return len(self.kernel_shape) - 2


@st.composite
def problems(draw, max_rank=3, min_channels=1, max_channels=4, max_batch_axes=3, words=WORDS, max_size=9):
    """Every padding kind, stride, dilation, multiplier, any batch axes, sizes down to 0 and 1."""
    rank = draw(st.integers(1, max_rank))
    cap = {1: max_size, 2: max_size, 3: min(max_size, 5)}[rank]

    def per_axis(elements):
        return draw(st.one_of(elements, st.tuples(*[elements] * rank)))

    def each_axis(value):
        return (value,) * rank if isinstance(value, int) else value

    spatial = tuple(draw(st.integers(0, cap)) for _ in range(rank))
    kernel_size = tuple(draw(st.integers(1, {1: 7, 2: 5, 3: 3}[rank])) for _ in range(rank))
    channels = draw(st.integers(min_channels, max_channels))
    multiplier = draw(st.integers(1, 3))
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=max_batch_axes)))
    strides = per_axis(st.integers(1, 3))
    kernel_dilation = per_axis(st.integers(1, 3))
    word = draw(st.sampled_from([w for w in words if w != "CAUSAL" or rank == 1] + ["explicit"] * 3))
    if word in ("CIRCULAR", "REFLECT"):
        spatial = tuple(max(1, n) for n in spatial)
    input_dilation = per_axis(st.integers(1, 3)) if word in ("VALID", "explicit") else 1
    if word == "explicit":
        amount = st.integers(-2, 4)
        pairs = st.tuples(*[st.one_of(amount, st.tuples(amount, amount))] * rank)
        padding = draw(st.one_of(st.integers(0, 3), pairs))
    else:
        padding = word
    return Problem(
        x_shape=(*batch, *spatial, channels),
        kernel_shape=(*kernel_size, 1, channels * multiplier),
        options={
            "strides": strides,
            "padding": padding,
            "kernel_dilation": kernel_dilation,
            "input_dilation": input_dilation,
        },
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
