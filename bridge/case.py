"""The data and the geometry of one convolution, in NumPy, channels last."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxdw.conv_transpose import transposed_padding
from jaxdw.geometry import Geometry, Padding

#: The dtypes a case may have, by name.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def options(geometry: Geometry) -> dict[str, Any]:
    """Return strides, padding and dilations as `jaxdw.depthwise_conv` and `Case` take them."""
    return {
        "strides": geometry.strides,
        "padding": geometry.padding if geometry.padding_mode == "zeros" else geometry.padding_mode.upper(),
        "kernel_dilation": geometry.kernel_dilation,
        "input_dilation": geometry.input_dilation,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Input, kernel, bias and geometry of one depthwise convolution.

    Attributes:
      x: `(*batch, *spatial, C)`.
      kernel: `(*kernel_size, 1, C*M)`, of x's dtype.
      bias: `(C*M,)` or None, of x's dtype.
      strides, padding, kernel_dilation, input_dilation: as `jaxdw.depthwise_conv` takes them.
      geometry: the same, normalised; computed.
      name: what to call the case in a report.

    >>> import numpy as np
    >>> Case(np.zeros((2, 5, 5, 3), np.float32), np.zeros((3, 3, 1, 3), np.float32), padding=1).geometry.output_shape
    (2, 5, 5, 3)
    """

    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None = None
    _: dataclasses.KW_ONLY
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    input_dilation: int | Sequence[int] | None = 1
    name: str = ""
    geometry: Geometry = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        dtypes = {}
        for name in ("x", "kernel", "bias"):
            array = getattr(self, name)
            if array is None and name == "bias":
                continue
            if not isinstance(array, np.ndarray):
                raise TypeError(f"`{name}` is a {type(array).__name__}, expected a NumPy array")
            if array.dtype not in DTYPES.values():
                raise TypeError(f"`{name}` has dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
            dtypes[name] = array.dtype
        if len(set(dtypes.values())) > 1:
            given = ", ".join(f"`{name}` has dtype {dtype}" for name, dtype in dtypes.items())
            raise TypeError(f"{given}; expected one dtype for all")
        geometry = Geometry.of(
            self.x.shape,
            self.kernel.shape,
            None if self.bias is None else self.bias.shape,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
        )
        object.__setattr__(self, "geometry", geometry)

    @classmethod
    def transposed(
        cls,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        strides: int | Sequence[int] = 1,
        padding: int | Sequence[int | tuple[int, int]] | str = 0,
        output_padding: int | Sequence[int] = 0,
        kernel_dilation: int | Sequence[int] = 1,
        name: str = "",
    ) -> Case:
        """Return the case of `jaxdw.depthwise_conv_transpose`: a convolution with input dilation and a flipped kernel.

        Args:
          kernel: `(*kernel_size, 1, C*M)`, as PyTorch's weight with its axes moved. `padding` is not "CIRCULAR".

        >>> x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32)
        >>> case = Case.transposed(x, kernel, strides=2, padding=1, output_padding=1)
        >>> case.geometry.output_shape, case.input_dilation, case.padding
        ((1, 8, 8, 2), (2, 2), ((1, 2), (1, 2)))
        """
        pads, steps = transposed_padding(kernel.shape[:-2], strides, padding, output_padding, kernel_dilation)
        flipped = np.flip(kernel, tuple(range(kernel.ndim - 2)))
        return cls(x, flipped, bias, padding=pads, kernel_dilation=kernel_dilation, input_dilation=steps, name=name)

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def terms(self) -> int:
        """The number of terms of one output: its products, and the bias where there is one."""
        return self.geometry.taps + (self.bias is not None)

    def replace(self, **changes: Any) -> Case:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def tap_terms(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield `(x, w, valid)` for each tap in raster order.

        x is `(*batch, *output_spatial, C, 1)`, the inputs under that tap, 0 where `valid` is False; w is `(C, M)`;
        valid is bool `(*output_spatial, 1, 1)`, False where the tap reads padding. They broadcast to the output with
        its channels split into (C, M).
        """
        g = self.geometry
        batch = len(g.batch)
        w = self.kernel.reshape(*g.kernel_size, g.channels, g.multiplier)
        for tap in itertools.product(*map(range, g.kernel_size)):
            x = self.x
            valid = np.ones((), bool)
            for axis, (source, t) in enumerate(zip(g.sources, tap)):
                index = source[:, t]
                valid = np.logical_and.outer(valid, index >= 0)
                if x.shape[batch + axis]:
                    x = np.take(x, np.maximum(index, 0), axis=batch + axis)
                else:  # nothing to take: every position is padding
                    shape = (*x.shape[: batch + axis], len(index), *x.shape[batch + axis + 1 :])
                    x = np.zeros(shape, x.dtype)
            valid = valid[..., None, None]
            x = x[..., None]
            yield (x if valid.all() else np.where(valid, x, x.dtype.type(0))), w[tap], valid

    def split_channels(self, y: np.ndarray) -> np.ndarray:
        """Return an output `(..., C*M)` with its channels as `(..., C, M)`."""
        return y.reshape(*y.shape[:-1], self.geometry.channels, self.geometry.multiplier)
