"""Name the order of elements: both frameworks have the same numbers, and JAX has them at other places."""

from __future__ import annotations

import itertools

import numpy as np


def other_order(ours: np.ndarray, theirs: np.ndarray, allowed: np.ndarray | float = 0.0) -> str | None:
    """Return in words how JAX's elements are ordered; None where they are no reordering of PyTorch's.

    An axis may be reversed, two axes exchanged, or the slices along one axis be in another order.

    Args:
      ours: JAX's array; theirs: PyTorch's, in the same layout.
      allowed: how far each number may be from `theirs` by rounding.
    """
    if ours.shape != theirs.shape or ours.ndim == 0 or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    room = 2 * np.broadcast_to(np.asarray(allowed, np.float64), theirs.shape)
    total, size = abs(float(ours.sum() - theirs.sum())), float(np.abs(theirs).sum())
    if not total <= float(room.sum()) + 2.0**-40 * size:
        return None
    long = [axis for axis, n in enumerate(ours.shape) if n > 1]
    for axis in long:
        if (np.abs(ours - np.flip(theirs, axis)) <= np.flip(room, axis)).all():
            return f"axis {axis} of {ours.shape} is reversed in JAX"
    for one, other in itertools.combinations(long, 2):
        if ours.shape[one] == ours.shape[other]:
            turned, its = theirs.swapaxes(one, other), room.swapaxes(one, other)
            if (np.abs(ours - turned) <= its).all():
                return f"the axes {one} and {other} of {ours.shape} are exchanged in JAX: height and width, or the like"
    for axis in long:
        places = _places(np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0), np.moveaxis(room, axis, 0))
        if places is not None:
            moved = [i for i, place in enumerate(places) if place != i]
            some = ", ".join(f"{i} is PyTorch's {places[i]}" for i in moved[:4]) + (", ..." if len(moved) > 4 else "")
            what = "channels" if axis == ours.ndim - 1 else f"slices of axis {axis}"
            return f"the {what} of {ours.shape} are in another order in JAX: {some}"
    return None


def _places(ours: np.ndarray, theirs: np.ndarray, room: np.ndarray) -> list[int] | None:
    """Return for each slice of the first axis which one of PyTorch it is; None where they are not the same slices."""
    ours, theirs, room = (a.reshape(len(a), -1) for a in (ours, theirs, room))
    direction = np.random.default_rng(0).standard_normal(ours.shape[1])
    places = np.empty(len(ours), np.int64)
    places[np.argsort(ours @ direction, kind="stable")] = np.argsort(theirs @ direction, kind="stable")
    is_same = (np.abs(ours - theirs[places]) <= room[places]).all()
    return [int(n) for n in places] if is_same and (places != np.arange(len(places))).any() else None
