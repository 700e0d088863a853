"""The bound of a convolution by Fourier transforms holds for NumPy's own, and knows where it promises nothing."""

import math

import numpy as np
import pytest

from bridge.numerics import FLOAT32, FLOAT64, fourier_error


def correlated(x, kernel, lengths, dtype):
    """The circular correlation `(batch, *lengths, C, M)` by NumPy's transforms in a dtype."""
    axes = tuple(range(1, 1 + len(lengths)))
    x = np.fft.rfftn(x.astype(dtype), lengths, axes)[..., None]
    kernel = np.fft.rfftn(kernel.astype(dtype)[None], lengths, axes)
    return np.fft.irfftn(x * kernel.conj(), lengths, axes)


def exactly(x, kernel, lengths):
    """The same by its definition, on whole numbers, which float64 adds exactly."""
    wide = np.zeros((len(x), *lengths, x.shape[-1]))
    wide[(slice(None), *map(slice, x.shape[1:-1]))] = x
    y = np.zeros((*wide.shape, kernel.shape[-1]))
    axes = tuple(range(1, 1 + len(lengths)))
    for tap in np.ndindex(kernel.shape[:-2]):
        y += np.roll(wide, [-t for t in tap], axes)[..., None] * kernel[tap]
    return y


@pytest.mark.parametrize("dtype, fmt", [(np.float32, FLOAT32), (np.float64, FLOAT64)])
def test_it_holds_for_whole_numbers_of_any_size(dtype, fmt, seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(200 if full else 20):
        lengths = [int(rng.choice([2, 6, 8, 10, 16, 24, 30, 50, 72, 90])) for _ in range(rng.integers(1, 3))]
        sizes = [int(rng.integers(1, n + 1)) for n in lengths]
        spans = [int(rng.integers(1, n + 1)) for n in lengths]
        greatest = int(rng.choice([1, 100, 2000]))
        x = rng.integers(-greatest, greatest + 1, (2, *sizes, 2)).astype(dtype)
        kernel = rng.integers(-greatest, greatest + 1, (*spans, 2, 2)).astype(dtype)
        y, expected = correlated(x, kernel, lengths, dtype), exactly(x, kernel, lengths)
        bounds = [fourier_error(x, kernel, lengths, fmt, whole=whole) for whole in (True, False)]
        error = np.abs(y - expected).max(tuple(range(1, 1 + len(lengths))))
        assert (error <= bounds[0]).all() and (bounds[0] <= bounds[1]).all()


def test_it_scales_with_the_numbers_and_promises_nothing_where_they_overflow():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 40, 1)), rng.standard_normal((9, 1, 1))
    bound = fourier_error(x, kernel, [48], FLOAT64, whole=True)
    for factor in (2.0**-300, 2.0**300):
        scaled = fourier_error(x * factor, kernel, [48], FLOAT64, whole=True)
        assert math.isclose((scaled / factor).item(), bound.item(), rel_tol=1e-6)
    assert np.isinf(fourier_error(x * 1e38, kernel, [48], FLOAT32, whole=True)).all()
    x[0, 3] = np.nan
    assert np.isinf(fourier_error(x, kernel, [48], FLOAT32, whole=False)).all()
    assert fourier_error(0 * kernel[None, :, :, 0], kernel, [48], FLOAT32, whole=True).item() < 1e-30


def test_a_length_with_another_prime_factor_is_an_error():
    with pytest.raises(ValueError, match="`lengths` has 14, expected prime factors 2, 3 and 5 alone"):
        fourier_error(np.ones((1, 7, 1)), np.ones((2, 1, 1)), [14], FLOAT32, whole=True)
