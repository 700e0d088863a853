"""One checked call of a convolution: its arrays, geometry, precision and result dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw import _arrays
from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry, Padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one convolution, checked once. A pytree of its arrays; the rest is static under `jax.jit`.

    Attributes:
      x: `(*batch, *spatial, C)`.
      kernel: `(*kernel_size, 1, C*M)`.
      bias: `(C*M,)` or None.
      geometry: of these shapes.
      precision: for x and for the kernel, or None to leave it to JAX.
      result: dtype of the result.
    """

    x: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    geometry: Geometry = dataclasses.field(metadata={"static": True})
    precision: PrecisionPair = dataclasses.field(metadata={"static": True})
    result: np.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        x: Any,
        kernel: Any,
        bias: Any = None,
        *,
        strides: int | Sequence[int] | None = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        input_dilation: int | Sequence[int] | None = 1,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
    ) -> Call:
        """Check the arguments of `jaxdw.depthwise_conv`. The arrays keep their dtypes.

        Raises:
          ValueError, TypeError: an argument that does not fit; the message names it, its value and what was expected.
        """
        x, kernel = _arrays.as_array("x", x), _arrays.as_array("kernel", kernel)
        bias = None if bias is None else _arrays.as_array("bias", bias)
        pair = _arrays.precision_pair(precision)
        geometry = Geometry.of(
            x.shape,
            kernel.shape,
            None if bias is None else bias.shape,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            input_dilation=input_dilation,
        )
        arrays = {"x": x, "kernel": kernel, "bias": bias}
        _, result = _arrays.common_and_result_dtype(arrays, preferred_element_type)
        return cls(x, kernel, bias, geometry, pair, result)

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x, kernel and bias."""
        return self.x, self.kernel, self.bias

    @property
    def wide(self) -> np.dtype:
        """The dtype in which products are added: float32 or float64."""
        return _arrays.accumulator(self.result)

    def promoted(self) -> Call:
        """Return the call with its arrays in their common dtype."""
        return self.cast(jnp.result_type(*(array for array in self.arrays if array is not None)))

    def cast(self, dtype: np.dtype) -> Call:
        """Return the call with its arrays in this dtype."""

        def cast(array: jax.Array) -> jax.Array:
            # Of an array that is being differentiated, `astype` would be a copy, and that a program to compile.
            is_as_asked = array.dtype == dtype and not jax.typeof(array).weak_type
            return array if is_as_asked else array.astype(dtype)

        return jax.tree.map(cast, self)

    def without_products(self) -> jax.Array | None:
        """Return the result where no tap reads an element of x, since a size is 0; else None."""
        if not self.geometry.is_empty:
            return None
        start = jnp.zeros((), self.result) if self.bias is None else self.bias.astype(self.result)
        return jnp.broadcast_to(start, self.geometry.output_shape)
