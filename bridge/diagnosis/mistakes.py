"""The named mistakes: what an implementation that misreads a convention computes instead.

Each is another case, a rearrangement of its output, a function of each element of it, or several of these; so its exact
result and its bound can be computed like those of the case itself. Where two mistakes compute the same - a flip of a
symmetric kernel, SAME and symmetric padding at stride 1 - the first one here is the one that is named.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bridge.case import Case
from bridge.diagnosis.shapes import spelled
from jaxdw.geometry import Geometry, Padding

if TYPE_CHECKING:
    from bridge.diagnosis.target import Expected

Rearrange = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """A hypothesis on what was computed.

    Attributes:
      name: short and stable, such as "kernel flipped".
      cause: what was done, to follow the name of the side.
      fix: what to change.
      case: what was computed instead.
      rearrange: what happened to its output; None for nothing.
      place: what part of the computation it concerns.
      after: what a function of each element makes of the expected output, given its channels; None for nothing.
      error_of_x: how far each element of the case's x may be from what was computed, of x's shape; None for nothing.
    """

    name: str
    cause: str
    fix: str
    case: Case
    rearrange: Rearrange | None = None
    place: str = ""
    after: Callable[[Expected, np.ndarray], Expected] | None = None
    error_of_x: np.ndarray | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is allowed but what the declared arithmetic of the mistaken case is."""
        return self.after is None and self.error_of_x is None

    def then(self, second: Mistake) -> Mistake:
        """Both mistakes, where the second was made in this one's case."""
        first = self.rearrange
        rearrange = second.rearrange or first
        if first is not None and second.rearrange is not None:
            later = second.rearrange

            def rearrange(y: np.ndarray) -> np.ndarray:
                return later(first(y))

        return Mistake(
            f"{self.name} and {second.name}",
            f"{self.cause}, and {second.cause}",
            f"{self.fix}; and {second.fix}",
            second.case,
            rearrange,
            "; ".join(dict.fromkeys(filter(None, (self.place, second.place)))),
            second.after or self.after,
            second.error_of_x,
        )


def pairs(case: Case) -> Iterator[tuple[Mistake, Callable[[], Iterator[Mistake]]]]:
    """Each mistake, with the mistakes of later families, or of its own, that may have been made beside it.

    The shape of the output need be right only after both.
    """
    families = (channel_orders, kernels, biases, steps, padding_words, padding_modes, layouts, shifts)
    for number, family in enumerate(families):
        for first in family(case):
            yield first, functools.partial(_second, first, families[number + (family in (biases, shifts)) :])


def _second(first: Mistake, families: Sequence[Callable[[Case], Iterator[Mistake]]]) -> Iterator[Mistake]:
    for family in families:
        for second in family(first.case):
            if first.name != second.name:
                yield first.then(second)


def mistakes(case: Case) -> Iterator[Mistake]:
    """Every mistake that leaves the output's shape as it is, the likeliest first."""
    shape = case.geometry.output_shape
    families = (padding_words, kernels, biases, steps, padding_modes, layouts, channel_orders, shifts, edges)
    for family in families:
        for mistake in family(case):
            if mistake.case.geometry.output_shape == shape:
                yield mistake


def padding_words(case: Case) -> Iterator[Mistake]:
    """Other words for padding, and axes or sides swapped. A word and its numbers are the same padding."""
    g = case.geometry
    against = "SAME against symmetric padding"
    if_symmetric = against if g.symmetric_padding is not None else "padding"
    if_same = against if _numbers(case, "SAME") == g.padding else "padding"
    span_half = tuple((k // 2, k // 2) for k in g.spans)
    named: list[tuple[str, Padding]] = [
        (if_symmetric, "SAME"),
        (if_same, _half(g)),
        (if_same, span_half),
        (if_symmetric, "SAME_LOWER"),
        ("padding missing", "VALID"),
        ("padding swapped between axes", g.padding[::-1]),
        ("padding low and high swapped", tuple((high, low) for low, high in g.padding)),
    ]
    if g.rank == 1:
        named.insert(5, ("causal padding", "CAUSAL"))
    if g.rank == 1 and _numbers(case, "CAUSAL") == g.padding:
        named = [("causal padding", padding) for _, padding in named]
    yield from _of_paddings(case, named)


def _half(g: Geometry) -> tuple[tuple[int, int], ...]:
    """k // 2 on both sides."""
    return tuple((k // 2, k // 2) for k in g.kernel_size)


def _numbers(case: Case, word: str) -> tuple[tuple[int, int], ...] | None:
    """What a word for padding is in numbers, for this case; None where it does not fit."""
    try:
        return case.replace(padding=word).geometry.padding
    except ValueError:
        return None


def shifts(case: Case) -> Iterator[Mistake]:
    """Other amounts of zeros: off by one or two, or by a stride, which shifts the output by a row."""
    g = case.geometry

    def moved(shift: tuple[int, ...]) -> Padding:
        return tuple(_pair(case, axis, low + d) for axis, ((low, _), d) in enumerate(zip(g.padding, shift)))

    far = 2 if g.rank < 3 else 1
    along_several = itertools.product(range(-far, far + 1), repeat=g.rank)
    along_one = ((axis, d) for axis, s in enumerate(g.strides) for d in (-2, -1, 1, 2, -s, s, -2 * s, 2 * s))
    changes = {*along_several, *(tuple(d * (a == axis) for a in range(g.rank)) for axis, d in along_one)}
    named: list[tuple[str, Padding]] = []
    for shift in sorted(changes, key=lambda d: (np.count_nonzero(d), sum(map(abs, d)), d)):
        name = "padding"
        if np.count_nonzero(shift) == 1:
            rows = any(abs(d) == s for d, s in zip(shift, g.strides))
            name = "padding off by one" if sum(map(abs, shift)) == 1 else "row or column shifted" if rows else "padding"
        named.append((name, moved(shift)))
    yield from _of_paddings(case, named)


def _of_paddings(case: Case, named: list[tuple[str, Padding]]) -> Iterator[Mistake]:
    """Those that differ. Where the size of the output is fixed, only the zeros in front matter."""
    g = case.geometry
    if g.padding_mode != "zeros" or 0 in g.output_shape:
        return
    seen = {tuple(low for low, _ in g.padding)}
    for name, padding in named:
        try:
            other = case.replace(padding=padding)
        except ValueError:
            continue
        lows = tuple(low for low, _ in other.geometry.padding)
        if other.geometry.output_shape == g.output_shape and lows not in seen:
            seen.add(lows)
            yield _option(case, other, name, "padding")


def _pair(case: Case, axis: int, low: int) -> tuple[int, int]:
    """(low, high) that leaves the output's size as it is; high is low if it can be, else the case's own, else least."""
    g = case.geometry
    dilated = (g.spatial[axis] - 1) * g.input_dilation[axis] + 1 if g.spatial[axis] else 0
    least = (g.output_spatial[axis] - 1) * g.strides[axis] + g.spans[axis] - dilated - low
    possible = range(least, least + g.strides[axis])
    return low, next((high for high in (low, g.padding[axis][1]) if high in possible), least)


def _option(case: Case, other: Case, name: str, *options: str) -> Mistake:
    """A mistake in options of the call."""
    right, wrong = ([f"{o}={_as_called(c, o)}" for o in options] for c in (case, other))
    meant = [f"{o}={getattr(case.geometry, o)}" for o in options if isinstance(getattr(case, o), str)]
    got = [f"{o}={getattr(other.geometry, o)}" for o in options if isinstance(getattr(other, o), str)]
    there, here = (f", here {', '.join(p)}," if p else "" for p in (got, meant))
    return Mistake(
        name,
        f"was computed with {', '.join(wrong)}{there} where the case has {', '.join(right)}{here}".rstrip(","),
        f"`{', '.join(right)}` instead of `{', '.join(wrong)}`",
        other,
        place=", ".join(options),
    )


def _as_called(case: Case, option: str) -> str:
    """The word that the user gave, or the numbers an axis."""
    given = getattr(case, option)
    return spelled(given if isinstance(given, str) else getattr(case.geometry, option))


def kernels(case: Case) -> Iterator[Mistake]:
    """The kernel flipped, transposed, or read in another layout."""
    rank, kernel = case.geometry.rank, case.kernel
    axes = range(rank)
    for n in range(rank, 0, -1):
        for flipped in itertools.combinations(axes, n):
            which = "along every axis: a convolution, not a cross-correlation" if n == rank else _along(flipped)
            yield Mistake(
                "kernel flipped",
                f"has the kernel flipped {which}",
                f"flip the kernel: kernel[{', '.join('::-1' if a in flipped else ':' for a in axes)}]",
                case.replace(kernel=np.flip(kernel, flipped)),
                place=f"kernel {_along(flipped)}",
            )
    for order in itertools.permutations(axes):
        if order == tuple(axes) or tuple(kernel.shape[a] for a in order) != kernel.shape[:rank]:
            continue
        moved = np.transpose(kernel, (*order, rank, rank + 1))
        for n in range(rank + 1):
            for flipped in itertools.combinations(axes, n):
                also = f" and flipped {_along(flipped)}" if flipped else ""
                yield Mistake(
                    "kernel transposed",
                    f"has the kernel's spatial axes transposed to {order}{also}",
                    f"transpose the kernel back: its axes {order} are in the wrong order{also}",
                    case.replace(kernel=np.flip(moved, flipped)),
                    place=f"kernel axes {order}",
                )
    back = np.moveaxis(kernel, (-1, -2), (0, 1))
    for kernel_read, done, wanted in (
        (back.reshape(kernel.shape), "an OIHW kernel reshaped to HWIO", "np.transpose(weight, (2, 3, 1, 0))"),
        (
            np.moveaxis(kernel.reshape(back.shape), (0, 1), (-1, -2)),
            "an HWIO kernel reshaped to OIHW",
            "np.transpose(kernel, (3, 2, 0, 1))",
        ),
    ):
        yield Mistake(
            "kernel layout",
            f"has {done}, where a transpose is needed",
            f"{wanted} instead of a reshape{'' if rank == 2 else f' (here with {rank} spatial axes)'}",
            case.replace(kernel=kernel_read),
            place="kernel",
        )


def _along(axes: tuple[int, ...]) -> str:
    return f"along axis {axes[0]}" if len(axes) == 1 else f"along axes {axes}"


def biases(case: Case) -> Iterator[Mistake]:
    """The bias missing, doubled, subtracted, or in another order of channels."""
    if case.bias is None:
        return
    g, b = case.geometry, case.bias
    wide = b.astype(np.float64)
    with np.errstate(over="ignore"):
        changed = [
            ("bias missing", "has no bias", "add the bias", np.zeros_like(b)),
            ("bias doubled", "has the bias added twice", "add the bias once", (2 * wide).astype(b.dtype)),
            ("bias subtracted", "has the bias subtracted", "add the bias", -b),
        ]
    order = _channel_order(case)
    if g.multiplier > 1:
        for permutation in (order, np.argsort(order)):
            changed.append(
                ("bias permuted", "has the bias in the order m*C+c", "order the bias as c*M+m", b[permutation])
            )
    for name, cause, fix, bias in changed:
        yield Mistake(name, cause, fix, case.replace(bias=bias), place="bias")


def steps(case: Case) -> Iterator[Mistake]:
    """Strides and dilations mistaken; padding as it was, and as the same word would have it."""
    g = case.geometry
    s, d, spread = g.strides, g.kernel_dilation, g.input_dilation
    ones = (1,) * g.rank
    changes: list[tuple[str, dict[str, Any]]] = [
        ("stride and dilation swapped", {"strides": d, "kernel_dilation": s}),
        ("strides swapped between axes", {"strides": s[::-1]}),
        ("dilation swapped between axes", {"kernel_dilation": d[::-1]}),
        ("dilation ignored", {"kernel_dilation": ones}),
        ("stride ignored", {"strides": ones}),
        ("input dilation ignored", {"input_dilation": ones}),
        ("input and kernel dilation swapped", {"input_dilation": d, "kernel_dilation": spread}),
    ]
    if max(d) == 1:
        changes += [("dilation", {"kernel_dilation": (n,) * g.rank}) for n in (2, 3)]
    for name, change in changes:
        if all(getattr(g, option) == value for option, value in change.items()):
            continue
        seen = set()
        for padding in _paddings_beside(case):
            try:
                other = case.replace(**change, padding=padding)
            except ValueError:
                continue
            if other.geometry not in seen:
                seen.add(other.geometry)
                yield _option(case, other, name, *change, *(["padding"] if padding != case.padding else []))


def _paddings_beside(case: Case) -> Iterator[Padding]:
    """The case's padding as it was given and in numbers; and, where it is a word's, other words and their numbers.

    Who writes numbers may have meant a word, and the other way round.
    """
    g = case.geometry
    yield case.padding
    if g.padding_mode != "zeros":
        return
    yield from (g.padding, "SAME", _half(g), "VALID", "SAME_LOWER")
    if g.rank == 1:
        yield "CAUSAL"


def padding_modes(case: Case) -> Iterator[Mistake]:
    """Zeros, periodic and reflecting padding, and repeated edges, mistaken for each other; on one border alone, too."""
    g = case.geometry
    modes: dict[str, Literal["constant", "wrap", "reflect", "edge"]]
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    if max(g.input_dilation) > 1 or 0 in g.spatial or min(min(pair) for pair in g.padding) < 0:
        return
    batch = len(g.batch)

    def padded(x: np.ndarray, pads: Sequence[Sequence[int]], mode: str) -> Case:
        x = np.pad(x, [(0, 0)] * batch + [(low, high) for low, high in pads] + [(0, 0)], mode=modes[mode])
        return case.replace(x=x, padding="VALID")

    shifts = [(0,) * g.rank] if g.padding_mode == "zeros" else list(itertools.product((0, -1, 1), repeat=g.rank))
    for mode, shift in itertools.product(modes, shifts):
        pads = tuple((low + d, high - d) for (low, high), d in zip(g.padding, shift))
        same_mode = mode == g.padding_mode
        if same_mode == (not any(shift)) or min(min(pair) for pair in pads) < 0:
            continue
        wrong = f"padding={pads}" if same_mode else f"padding mode {mode!r}"
        right = f"padding={g.padding}" if same_mode else f"padding mode {g.padding_mode!r}"
        yield Mistake(
            "padding off by one" if same_mode else "padding mode",
            f"was computed with {wrong}, where the case has {right}",
            f"{right} instead of {wrong}",
            padded(case.x, pads, mode),
            place="padding",
        )
    borders = [(axis, end) for axis in range(g.rank) for end in (0, 1) if g.padding[axis][end]]
    for (axis, end), mode in itertools.product(borders if len(borders) > 1 else (), modes):
        if mode == g.padding_mode:
            continue
        alone = tuple(tuple(n * ((a, e) == (axis, end)) for e, n in enumerate(p)) for a, p in enumerate(g.padding))
        rest = tuple((low - a, high - b) for (low, high), (a, b) in zip(g.padding, alone))
        where = f"{'after the end' if end else 'before the start'} of axis {batch + axis} of x"
        yield Mistake(
            "padding mode of one border",
            f"was computed with padding mode {mode!r} {where}, where the case has {g.padding_mode!r}",
            f"padding mode {g.padding_mode!r} {where} too",
            padded(padded(case.x, rest, g.padding_mode).x, alone, mode),
            place=f"padding {where}: the output's {'last' if end else 'first'} positions of axis {batch + axis}",
        )


def layouts(case: Case) -> Iterator[Mistake]:
    """Images read in another order of axes."""
    g = case.geometry
    batch = len(g.batch)
    first, last = ("NCHW", "NHWC") if g.rank == 2 else ("channels-first", "channels-last")

    def from_first(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a, -1, batch).reshape(a.shape)

    def from_last(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(np.moveaxis(a, -1, batch).shape), batch, -1)

    for read, source, seen, fix in (
        (from_first, first, last, f"np.moveaxis({{}}, {batch}, -1) instead of a reshape"),
        (from_last, last, first, f"np.moveaxis({{}}, -1, {batch}) instead of a reshape"),
    ):
        how = f"in {source} read as {seen}: reshaped, where a transpose is needed"
        yield Mistake("input layout", f"has its input {how}", fix.format("x"), case.replace(x=read(case.x)), place="x")
        yield Mistake("output layout", f"has its output {how}", fix.format("y"), case, read, "y")
    for i, j in itertools.combinations(range(batch, batch + g.rank), 2):
        if g.x_shape[i] == g.x_shape[j]:
            yield Mistake(
                "spatial axes swapped",
                f"has axes {i} and {j} of its input swapped",
                f"np.swapaxes(x, {i}, {j})",
                case.replace(x=np.swapaxes(case.x, i, j)),
                place="x",
            )
        if g.output_shape[i] == g.output_shape[j]:
            yield Mistake(
                "spatial axes swapped",
                f"has axes {i} and {j} of its output swapped",
                f"np.swapaxes(y, {i}, {j})",
                case,
                functools.partial(np.swapaxes, axis1=i, axis2=j),
                "y",
            )


def _channel_order(case: Case) -> np.ndarray:
    """Where output m*C+c of the other order is in ours."""
    g = case.geometry
    return np.arange(g.features).reshape(g.channels, g.multiplier).T.ravel()


def channel_orders(case: Case) -> Iterator[Mistake]:
    """Output channel m*C+c where c*M+m is meant, in the kernel, in the output, and in both."""
    g = case.geometry
    if g.multiplier == 1 or g.channels == 1:
        return
    order = _channel_order(case)
    inverse = np.argsort(order)
    bias = case.bias
    fix = "output channel c*M+m reads input channel c: order {} as (C, M), not (M, C)"
    for p, q in ((order, inverse), (inverse, order)):
        yield Mistake(
            "channel order",
            "reads input channel o mod C for output channel o, where o div M is meant",
            fix.format("the kernel's channels"),
            case.replace(kernel=case.kernel[..., q], bias=None if bias is None else bias[q]),
            functools.partial(np.take, indices=p, axis=-1),
            "input channels",
        )
    operands = ("output", "kernel") if bias is None else ("output", "kernel", "bias")
    for number in range(1, len(operands) + 1):
        for chosen in itertools.combinations(operands, number):
            if chosen == ("bias",):  # among the mistakes of the bias
                continue
            for orders in itertools.product((order, inverse), repeat=number):
                how = dict(zip(chosen, orders))
                changed = {name: getattr(case, name)[..., how[name]] for name in chosen if name != "output"}
                what = " and ".join(f"the {name}'s channels" for name in chosen)
                yield Mistake(
                    "channel order",
                    f"has {what.replace('the ', 'its ')} in the order m*C+c, where c*M+m is meant",
                    fix.format(what),
                    case.replace(**changed) if changed else case,
                    functools.partial(np.take, indices=how["output"], axis=-1) if "output" in how else None,
                    ", ".join(f"{name} channels" for name in chosen),
                )


def edges(case: Case) -> Iterator[Mistake]:
    """The first or last row or column left at zero, or a copy of its neighbour."""
    g = case.geometry
    batch = len(g.batch)
    for axis in range(batch, batch + g.rank):
        n = g.output_shape[axis]
        if n < 2:
            continue
        for edge, neighbour, word in ((0, 1, "first"), (n - 1, n - 2, "last")):

            def zeroed(y: np.ndarray, axis: int = axis, edge: int = edge) -> np.ndarray:
                y = y.copy()
                np.moveaxis(y, axis, 0)[edge] = 0
                return y

            def repeated(y: np.ndarray, axis: int = axis, edge: int = edge, neighbour: int = neighbour) -> np.ndarray:
                index = np.arange(y.shape[axis])
                index[edge] = neighbour
                return np.take(y, index, axis)

            for how, done in ((zeroed, "left at zero"), (repeated, "a copy of the one beside it")):
                yield Mistake(
                    "row or column cropped",
                    f"has the {word} position along axis {axis} of the output {done}",
                    f"compute all {n} positions of axis {axis}: the output was cropped by one",
                    case,
                    how,
                    f"output axis {axis}, {word} position",
                )
