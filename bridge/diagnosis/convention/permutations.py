"""Permutations found in the values: the input channel, kernel channel, bias or slice that each output matches."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import sampled_terms

#: Output positions on which two channels are compared.
_POSITIONS = 12
#: Longest axis that is matched with itself: the comparison is quadratic.
_LONGEST = 2048
#: Most numbers of a block of the comparison.
_BLOCK = 1 << 22


def permutations(output: Output) -> Iterator[Mistake]:
    """Yield a permutation of input channels, kernel channels, bias, or along one axis of the output."""
    if output.target.quantity == "y":
        yield from _channels(output)
        yield from _biases(output)
    yield from _axes(output)


def _channels(output: Output) -> Iterator[Mistake]:
    """Compare output o with every input channel times kernel o, and with its input channel times every kernel.

    If there is a bias, differences from the mean are compared: the bias may be another channel's too.
    """
    case, g = output.target.case, output.target.case.geometry
    if g.channels == 1 or g.features > _LONGEST or 0 in g.x_shape:
        return
    windows, wanted, size_of_rest = _windows(output)
    kernel = case.kernel.reshape(g.taps, g.features).astype(np.float64)
    own = np.arange(g.features) // g.multiplier

    def centred(a: np.ndarray) -> np.ndarray:
        return a if case.bias is None else a - a.mean(axis=0)

    def close(x: np.ndarray, w: np.ndarray, features: slice | np.ndarray) -> np.ndarray:
        """Return (c, o): whether x (P, taps, c) with w (taps, o) is y at all positions, to a few times rounding."""
        columns = np.moveaxis(x, 1, -1)
        product, size = columns @ w, np.abs(columns) @ np.abs(w)
        u = output.arithmetic.accumulator.unit_roundoff * (g.taps + 4) + 2 * output.arithmetic.output.unit_roundoff
        y, other = (a[:, None, features] for a in (wanted, size_of_rest))
        return (np.abs(centred(product) - centred(y)) <= 4 * u * (size + other).max(axis=0)).all(axis=0)

    def with_bias(x: np.ndarray, w: np.ndarray) -> Iterator[tuple[Case, str]]:
        """Yield the case, then with its bias in the order of what y has beyond x (P, taps, C*M) with w, and that order.

        Of two biases that are near each other the wrong one may be nearer to what y has.
        """
        yield case, ""
        if case.bias is None:
            return
        left = np.median(wanted - np.einsum("ptf,tf->pf", x, w), axis=0) + case.bias
        order = np.abs(left[:, None] - case.bias.astype(np.float64)).argmin(axis=1)
        if _is_permutation(order):
            yield case.replace(bias=case.bias[order]), f" and the bias in the order {_short(order)}"

    def permuted(name: str, has: str, source: np.ndarray, operand: str, biased: Case, and_bias: str) -> Mistake:
        undo = _short(np.argsort(source))
        axes = ":, " * len(g.batch)
        in_torch = f"x[{axes}{undo}]" if operand == "x" else f"weight[{undo}]"
        also = ", and that of the bias" if and_bias else ""
        return Mistake(
            f"{name} channels permuted",
            f"{has} in the order {_short(source)}{and_bias}",
            f"undo the permutation of the {name} channels: {operand}[..., {undo}]{also}",
            biased.replace(**{operand: getattr(case, operand)[..., source]}),
            place=f"{name} channels" + (", bias" if and_bias else ""),
            torch_fix=f"undo the permutation of the {name} channels: {in_torch}{also}",
        )

    step = max(1, _BLOCK // (_POSITIONS * g.channels))
    input_of = np.full(g.features, -1)
    for start in range(0, g.features, step):
        block = slice(start, start + step)
        input_of[block] = _first(close(windows, kernel[:, block], block), own[block])
    source = input_of[:: g.multiplier]
    if _is_permutation(source) and (input_of == np.repeat(source, g.multiplier)).all():
        for biased, and_bias in with_bias(windows[..., input_of], kernel):
            yield permuted("input", "reads the input channels", source, "x", biased, and_bias)
    kernel_of = np.full(g.features, -1)
    for c in range(g.channels):
        features = np.flatnonzero(own == c)
        table = np.stack([close(windows[..., [c]], kernel, features[k : k + 1])[0] for k in range(len(features))])
        kernel_of[features] = _first(table.T, features)
        if (kernel_of[features] < 0).any():
            break
    if _is_permutation(kernel_of):
        for biased, and_bias in with_bias(windows[..., own], kernel[:, kernel_of]):
            yield permuted("kernel", "has the kernel's channels", kernel_of, "kernel", biased, and_bias)


def _windows(output: Output) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return windows `(P, taps, C)` at positions that read most of the input, and y - b and |y| + |b|, `(P, C*M)`."""
    case, g = output.target.case, output.target.case.geometry
    valid = g.valid_taps().reshape(*g.output_spatial, -1).sum(axis=-1)
    full = np.argwhere(valid == valid.max())
    rng = np.random.default_rng(0)
    rows = full[rng.choice(len(full), _POSITIONS)]
    batch = np.stack([rng.integers(0, n, _POSITIONS) for n in g.batch], axis=1) if g.batch else rows[:, :0]
    at = (*batch.T, *rows.T)
    each = (*(np.repeat(index, g.channels) for index in at), np.tile(np.arange(g.channels) * g.multiplier, _POSITIONS))
    # NumPy 2.0 crashes in `where` on bfloat16 and a Python number
    read = [np.where(valid, x.astype(np.float64), 0) for x, _, valid in sampled_terms(case, each)]
    windows = np.stack([x.reshape(_POSITIONS, g.channels) for x in read], axis=1)
    y = output.y[at].astype(np.float64)
    bias = np.zeros(g.features) if case.bias is None else case.bias.astype(np.float64)
    return windows, y - bias, np.abs(y) + np.abs(bias)


def _biases(output: Output) -> Iterator[Mistake]:
    """Find the bias of each output channel: the one nearest to the median of y less the products."""
    case = output.target.case
    if case.bias is None or not output.y.size:
        return
    axes = tuple(range(output.y.ndim - 1))
    b = case.bias.astype(np.float64)
    with np.errstate(all="ignore"):
        residual = output.y.astype(np.float64) - output.expected.reference
        seen = np.median(residual, axis=axes) + b
        if not np.isfinite(seen).all() or len(b) > _LONGEST:
            return
        source = np.abs(seen[:, None] - b).argmin(axis=1)
    if _is_permutation(source):
        yield Mistake(
            "bias permuted",
            f"has the bias in the order {_short(source)}",
            f"undo the permutation of the bias: bias[{_short(np.argsort(source))}]",
            case.replace(bias=case.bias[source]),
            place="bias",
        )


def _axes(output: Output) -> Iterator[Mistake]:
    """Find slices of the output along one axis that match other slices of the exact result."""
    batch = len(output.target.case.geometry.batch)
    reference, allowed = output.expected
    for axis in range(output.y.ndim):
        n = output.y.shape[axis]
        if not 1 < n <= _LONGEST:
            continue
        rng = np.random.default_rng(0)
        elsewhere = tuple(rng.integers(0, m, _POSITIONS) for k, m in enumerate(output.y.shape) if k != axis)
        given = (output.y, reference, allowed)  # of one axis alone, as a bias' gradient, a row is one number
        rows = [np.moveaxis(np.moveaxis(a, axis, -1)[elsewhere], 0, -1).reshape(n, -1) for a in given]
        source = _matching_slices(*rows)
        if not _is_permutation(source):
            continue
        kind = "batch entries" if axis < batch else "channels" if axis == output.y.ndim - 1 else "positions"
        if output.target.quantity != "y":
            kind = "slices"
        yield Mistake(
            "outputs permuted",
            f"has the {kind} along axis {axis} of its output {_order(source)}",
            f"undo the permutation of axis {axis}: np.take(y, {_short(np.argsort(source))}, axis={axis})",
            output.target.case,
            functools.partial(np.take, indices=source, axis=axis),
            f"{kind}, axis {axis} of the output",
        )


def _matching_slices(y: np.ndarray, reference: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return for each row of y the row of the reference that it matches, preferably its own; -1 for none."""
    y = y.astype(np.float64)
    source = np.full(len(y), -1)
    step = max(1, _BLOCK // y.size)
    with np.errstate(invalid="ignore"):
        for start in range(0, len(y), step):
            rows = y[start : start + step]
            near = (np.abs(rows - reference[:, None]) <= allowed[:, None]).all(axis=-1)
            source[start : start + step] = _first(near, np.arange(start, start + len(rows)))
    return source


def _first(matches: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return for each column of a table the row that matches: its own if that does, else the first, else -1."""
    columns = np.arange(matches.shape[1])
    best = np.where(matches.any(axis=0), matches.argmax(axis=0), -1)
    return np.where(matches[own, columns], own, best)


def _is_permutation(source: np.ndarray) -> bool:
    """Return whether it permutes its indices, and is not the identity."""
    indices = np.arange(len(source))
    return bool((source != indices).any() and np.array_equal(np.sort(source), indices))


def _order(source: np.ndarray) -> str:
    n = len(source)
    if np.array_equal(source, np.arange(n)[::-1]):
        return "reversed"
    shift = source[0]
    if np.array_equal(source, np.roll(np.arange(n), -shift)):
        return f"rolled by {shift}"
    return f"in the order {_short(source)}"


def _short(order: np.ndarray) -> str:
    shown = [str(i) for i in order[:16]]
    return f"[{', '.join(shown)}{', ...' if len(order) > 16 else ''}]"
