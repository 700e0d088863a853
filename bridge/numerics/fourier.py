"""A rigorous bound on the error of a circular convolution by fast Fourier transforms. NumPy only.

Let n be the product of the lengths of the transforms, F the transform of that size, unscaled, so that
||F v|| = sqrt(n) ||v||, and y = F^-1 (F x * conj(F w)). All norms are Euclidean. u is the unit roundoff.

**A transform.** Its length has the prime factors 2, 3 and 5. It is a sequence of stages, one for each factor, in any
order, along each axis. A stage multiplies by numbers of modulus 1 (twiddles), and then transforms groups of p numbers,
or first the one and then the other. A radix of 4 or 8 is two or three stages with p = 2. A stage is sqrt(p) times a
unitary matrix. Its relative error in norm is at most eta_p:

- A stored twiddle is off by at most mu = 4 u. A complex product has a relative error of at most 3 u (Higham 2002,
  lemma 3.5: sqrt(2) 2 u / (1 - 2 u)). Together t = (1 + mu)(1 + 3 u) - 1. The twiddles are a unitary diagonal matrix.
- p = 2: one complex addition, of relative error u: eta_2 = (1 + t)(1 + u) - 1.
- p = 3 and 5: the real part of an output is a sum over the inputs a_j of Re(a_j) cos - Im(a_j) sin, in which at most
  seven errors (of constants, products and sums) come together on any path. So it is off by at most
  gamma_7 sum |a_j| <= gamma_7 sqrt(p) ||a||, the imaginary part too, and the p outputs by sqrt(2) gamma_7 p ||a||,
  where gamma_7 = 7 u / (1 - 7 u): eta_p = (1 + t)(1 + sqrt(2 p) gamma_7) - 1.

Errors of stages compose: e = prod (1 + eta_p) - 1 over all stages. A transform of real numbers computes a part of the
numbers that the complex one computes. Or it is a complex one of half the length with one stage before and one after.
Two stages with p = 2 are added for it, and for twiddles between the parts of a long transform. The inverse is also
multiplied by 1 / n, with two roundings for each axis: e_i = (1 + e)(1 + u)^(2 axes) - 1.

**The convolution.** With X = F x and W = F w, the computed ones are off by at most e ||X|| and e ||W||, and the
products by 3 u. By the inequality of Cauchy and Schwarz, sum_k |X_k| |W_k| <= ||X|| ||W|| = n ||x|| ||w||. So with
k = (1 + e)^2 (1 + 3 u) - 1 the errors d of the products have sum |d| <= k n ||x|| ||w||, and change no element of y by
more than k ||x|| ||w||. The inverse transform then adds at most e_i (||X * W|| + ||d||) / sqrt(n) to the norm, and so
to any element; ||d|| <= sum |d|. With s >= ||y||,

    |computed - y| <= k ||x|| ||w|| + e_i (s + k sqrt(n) ||x|| ||w||) + U

s is the least of ||x|| ||w||_1 (Young) and, where the transform is the whole, ||X * W|| / sqrt(n) in float64 with its
own error by the same formula. Where x is cut into blocks, ||x|| of the whole is none the smaller.

*Underflow.* Each operation may lose lambda, the smallest normal number. A stage has fewer than 46 sqrt(n) lambda of
such losses in norm, and later stages enlarge them by sqrt(n) at most. Over L stages this moves y by at most
46 L lambda sqrt(n) (||x|| + ||w||) through the products, and by 46 L lambda through the inverse:
U = 128 L lambda (1 + sqrt(n) (||x|| + ||w||)). *Overflow.* No number exceeds 4 n ||x|| ||w|| or 4 sqrt(n) times a norm;
where that overflows nothing is promised.

The model of a transform is that of pocketfft and DUCC, which NumPy and XLA use on CPUs. For the closed libraries of
GPUs it is an assumption.

References. N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, chapter 24. N. Brisebarre
et al., Error analysis of some operations involved in the Cooley-Tukey fast Fourier transform, ACM TOMS 46, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bridge.numerics.formats import FLOAT64, Format

#: What the float64 evaluation of the formulas may lose, with room.
_SLACK = 1 + 2.0**-30


def fourier_error(x: np.ndarray, kernel: np.ndarray, lengths: Sequence[int], fmt: Format, *, whole: bool) -> np.ndarray:
    """Return the bound `(batch, C, M)` for x `(batch, *spatial, C)` and a dilated kernel `(*spans, C, M)`: float64.

    Args:
      lengths: of the transform along each axis.
      fmt: the format in which it computes.
      whole: whether one transform has all of x. Else x is cut into blocks of these lengths.
    """
    size, axes_of_x, axes_of_w = math.prod(lengths), tuple(range(1, x.ndim - 1)), tuple(range(kernel.ndim - 2))
    stages = 2 + sum(sum(_factors(length).values()) for length in lengths)
    k, inverse = _relative_errors(lengths, fmt)
    with np.errstate(all="ignore"):
        x, scale_x = _scaled(x, axes_of_x)
        kernel, scale_w = _scaled(kernel, axes_of_w)
        scale_x, of_x = scale_x[..., None], _norm(x, axes_of_x)[..., None]
        of_w = _norm(kernel, axes_of_w)
        both = of_x * of_w
        norm = of_x * np.abs(kernel).sum(axes_of_w)
        if whole:
            norm = np.minimum(norm, _norm_of_product(x, kernel, lengths, both))
        error = scale_x * scale_w * (k * both + inverse * (norm + k * math.sqrt(size) * both))
        of_x, of_w = scale_x * of_x, scale_w * of_w
        error += 128 * stages * fmt.smallest_normal * (1 + math.sqrt(size) * (of_x + of_w))
        largest = 4 * np.maximum(size * of_x * of_w, math.sqrt(size) * (of_x + of_w))
        return np.where(largest <= fmt.largest, error * _SLACK, np.inf)


def _relative_errors(lengths: Sequence[int], fmt: Format) -> tuple[float, float]:
    """Return k and e_i."""
    u = fmt.unit_roundoff
    t = (1 + 4 * u) * (1 + 3 * u) - 1
    gamma = 7 * u / (1 - 7 * u)
    log = 2 * math.log1p(_sum_of_errors(t, u))
    for length in lengths:
        for p, count in _factors(length).items():
            log += count * math.log1p(_sum_of_errors(t, u if p == 2 else math.sqrt(2 * p) * gamma))
    e = math.expm1(log)
    k = math.expm1(2 * log + math.log1p(3 * u))
    return k, math.expm1(math.log1p(e) + 2 * len(lengths) * math.log1p(u))


def _sum_of_errors(a: float, b: float) -> float:
    """Return (1 + a)(1 + b) - 1."""
    return a + b + a * b


def _factors(length: int) -> dict[int, int]:
    """Return how often 2, 3 and 5 divide a length that has no other prime factors."""
    counts = {}
    rest = length
    for p in (2, 3, 5):
        counts[p] = 0
        while rest % p == 0:
            rest, counts[p] = rest // p, counts[p] + 1
    if rest != 1:
        raise ValueError(f"`lengths` has {length}, expected prime factors 2, 3 and 5 alone")
    return counts


def _scaled(array: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 numbers of at most 1 along the axes, and the powers of two that they were divided by."""
    array = array.astype(np.float64)
    greatest = np.abs(array).max(axes, initial=0.0)
    scale = np.ldexp(1.0, np.frexp(np.where(np.isfinite(greatest), greatest, 1.0))[1])
    return array / np.expand_dims(scale, axes), scale


def _norm(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.sqrt((array**2).sum(axes))


def _norm_of_product(x: np.ndarray, kernel: np.ndarray, lengths: Sequence[int], both: np.ndarray) -> np.ndarray:
    """Return s `(batch, C, M)`, from the spectra in float64."""
    size, axes = math.prod(lengths), tuple(range(1, 1 + len(lengths)))

    def power(arrays: np.ndarray) -> np.ndarray:
        spectra = np.fft.fftn(arrays, lengths, axes)
        return (spectra.real**2 + spectra.imag**2).reshape(len(arrays), -1)

    result = np.empty(both.shape)
    for channel in range(kernel.shape[-2]):
        product = power(x[..., channel]) @ power(np.moveaxis(kernel[..., channel, :], -1, 0)).T
        result[:, channel] = np.sqrt(product / size)
    k, _ = _relative_errors(lengths, FLOAT64)
    return (result + k * math.sqrt(size) * both) * _SLACK
