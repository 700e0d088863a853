"""Mistakes in the kernel: flipped, transposed, or read in another layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake


def kernels(case: Case) -> Iterator[Mistake]:
    """Yield the kernel flipped, transposed, or read in another layout."""
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
                torch_fix=f"flip the weight: weight.flip({', '.join(str(a + 2) for a in flipped)})",
            )
    for order in itertools.permutations(axes):
        if order == tuple(axes) or tuple(kernel.shape[a] for a in order) != kernel.shape[:rank]:
            continue
        moved = np.transpose(kernel, (*order, rank, rank + 1))
        for n in range(rank + 1):
            for flipped in itertools.combinations(axes, n):
                also = f" and flipped {_along(flipped)}" if flipped else ""
                axes_of_weight, flipped_of_weight = (tuple(a + 2 for a in some) for some in (order, flipped))
                also_of_weight = f" and flipped {_along(flipped_of_weight)}" if flipped else ""
                yield Mistake(
                    "kernel transposed",
                    f"has the kernel's spatial axes transposed to {order}{also}",
                    f"transpose the kernel back: its axes {order} are in the wrong order{also}",
                    case.replace(kernel=np.flip(moved, flipped)),
                    place=f"kernel axes {order}",
                    torch_fix="transpose the weight back: "
                    f"its axes {axes_of_weight} are in the wrong order{also_of_weight}",
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
