"""For existing models: a replacement of lax's convolution, and one call that puts it into a Flax NNX model."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdw import _arrays
from jaxdw.conv import depthwise_conv
from jaxdw.geometry import Geometry

Model = TypeVar("Model")


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: tuple[str, str, str] | lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Compute `lax.conv_general_dilated`, and depthwise calls by `jaxdw.depthwise_conv`.

    A call is depthwise if `feature_group_count` is the number of input channels, at least 2, over 1 to 3 spatial axes,
    in float16, bfloat16, float32 or float64. It may have any stride, padding, dilation (of the input too: a transposed
    convolution), channel multiplier and dimension numbers. If channels are not last, the arrays are transposed. Every
    other call goes to lax with the same arguments; `docs/drop-in.md` lists the few depthwise calls that do.

    Arguments, shapes, dtypes and errors are lax's. The results differ by rounding: the order of the sum is another, and
    depthwise sums have at least float32 precision on every backend.

    >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    >>> numbers = ("NHWC", "HWIO", "NHWC")
    >>> conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)[0, :, :, 0]
    Array([[4., 6., 6., 4.],
           [6., 9., 9., 6.],
           [6., 9., 9., 6.],
           [4., 6., 6., 4.]], dtype=float32)
    """
    arguments: dict[str, Any] = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    depthwise = _depthwise(lhs, rhs, arguments)
    if depthwise is None:
        return lax.conv_general_dilated(lhs, rhs, **arguments)
    geometry = depthwise.geometry
    y = depthwise_conv(
        lax.transpose(lhs, depthwise.lhs_axes),
        lax.transpose(rhs, depthwise.rhs_axes),
        strides=geometry.strides,
        padding=geometry.padding,
        kernel_dilation=geometry.kernel_dilation,
        input_dilation=geometry.input_dilation,
        precision=precision,
        preferred_element_type=depthwise.dtype,
    )
    return lax.transpose(y, depthwise.out_axes)


def accelerate(model: Model) -> Model:
    """Set `conv_general_dilated` of every depthwise `flax.nnx.Conv` in a Flax NNX model, in place.

    A layer is depthwise if `feature_group_count == in_features >= 2`. Parameters, state and all other layers stay as
    they are. So does a layer that already has another `conv_general_dilated`.

    Args:
      model: a `flax.nnx.Module`.

    Returns:
      The same object.

    Raises:
      TypeError: model is something else.

    >>> from flax import nnx
    >>> def conv(groups, rngs):
    ...     return nnx.Conv(8, 8, (3, 3), feature_group_count=groups, rngs=rngs)
    >>> rngs = nnx.Rngs(0)
    >>> model = accelerate(nnx.Sequential(conv(1, rngs), conv(8, rngs)))
    >>> [layer.conv_general_dilated is conv_general_dilated for layer in model.layers]
    [False, True]
    """
    from flax import nnx  # `import jaxdw` does without Flax

    if not isinstance(model, nnx.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"`model` is {kind}, expected a flax.nnx.Module; a layer of Flax Linen takes "
            "`conv_general_dilated=jaxdw.conv_general_dilated` where it is built"
        )
    for _, module in nnx.iter_modules(model):
        if (
            isinstance(module, nnx.Conv)
            and module.feature_group_count == module.in_features >= 2
            and module.conv_general_dilated is lax.conv_general_dilated
        ):
            module.conv_general_dilated = conv_general_dilated
    return model


class _Depthwise(NamedTuple):
    """A call for `depthwise_conv`, with the permutations of lhs and rhs to channels last, and of the result back."""

    lhs_axes: tuple[int, ...]
    rhs_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    geometry: Geometry
    dtype: np.dtype


def _depthwise(lhs: Any, rhs: Any, arguments: dict[str, Any]) -> _Depthwise | None:
    """Return the call for `depthwise_conv`, or None if it is for lax: not depthwise, or not valid."""
    arguments = dict(arguments)
    counts = (arguments["feature_group_count"], arguments.pop("batch_group_count"))
    if not all(isinstance(count, (int, np.integer)) for count in counts) or counts[0] < 2 or counts[1] != 1:
        return None
    arrays = all(isinstance(array, (jax.Array, np.ndarray)) for array in (lhs, rhs))
    if arguments.pop("out_sharding") is not None or not arrays:
        return None
    try:
        x, kernel = jax.typeof(lhs), jax.typeof(rhs)
        call = _planned(
            (x.shape, x.dtype, x.weak_type),
            (kernel.shape, kernel.dtype, kernel.weak_type),
            jax.config.jax_enable_x64,
            **{name: _HASHABLE[name](value) for name, value in arguments.items() if value is not None},
        )
    except Exception:  # if it is a mistake, lax finds it too, and reports it in its own words
        return None
    return call if call is not None and _only_the_batch_is_sharded(x, kernel, call) else None


@functools.lru_cache(maxsize=4096)
def _planned(
    lhs: tuple[tuple[int, ...], np.dtype, bool],
    rhs: tuple[tuple[int, ...], np.dtype, bool],
    x64: bool,
    **arguments: Any,
) -> _Depthwise | None:
    """Return `_depthwise` from shapes and dtypes, with lax's arguments in their hashable forms.

    `x64` says if float64 is enabled. This raises where lax may raise.
    """
    (lhs_shape, lhs_dtype, lhs_weak), (rhs_shape, rhs_dtype, rhs_weak) = lhs, rhs
    dtypes = [lhs_dtype, rhs_dtype, arguments.get("preferred_element_type", lhs_dtype)]
    if any(dtype.name not in _arrays.FLOATING or (dtype.name == "float64" and not x64) for dtype in dtypes):
        return None
    if not all(isinstance(size, int) for size in lhs_shape + rhs_shape):  # symbolic, for jax.export
        return None
    if lhs_weak and rhs_weak:  # the result is weakly typed too, which depthwise_conv's never is
        return None
    numbers = lax.conv_dimension_numbers(lhs_shape, rhs_shape, arguments.get("dimension_numbers"))
    # channels last: lax has (batch, feature, *spatial), of the kernel (output, input, *spatial)
    (n, c, *spatial), (o, i, *window), (out_n, out_c, *out) = numbers
    lhs_axes, rhs_axes, y_axes = (n, *spatial, c), (*window, i, o), (out_n, *out, out_c)
    # lax checks neither that these are permutations nor some of the lengths until XLA does
    if not all(sorted(axes) == list(range(len(lhs_shape))) for axes in (lhs_axes, rhs_axes, y_axes)):
        return None
    if lhs_shape[c] != arguments["feature_group_count"]:
        return None
    padding = arguments["padding"]
    geometry = Geometry.of(
        [lhs_shape[axis] for axis in lhs_axes],
        [rhs_shape[axis] for axis in rhs_axes],
        strides=arguments["window_strides"],
        padding=padding.upper() if isinstance(padding, str) else padding,
        kernel_dilation=arguments.get("rhs_dilation"),
        input_dilation=arguments.get("lhs_dilation"),
    )
    _arrays.precision_pair(arguments.get("precision"))  # refuses the dot algorithms, which only lax has
    result = jax.eval_shape(
        functools.partial(lax.conv_general_dilated, **arguments),
        jax.ShapeDtypeStruct(lhs_shape, lhs_dtype),
        jax.ShapeDtypeStruct(rhs_shape, rhs_dtype),
    )
    if result.dtype != lhs_dtype and result.dtype.itemsize <= lhs_dtype.itemsize:
        return None
    out_axes = tuple(int(axis) for axis in np.argsort(y_axes))
    return _Depthwise(lhs_axes, rhs_axes, out_axes, geometry, result.dtype)


def _only_the_batch_is_sharded(x: Any, kernel: Any, call: _Depthwise) -> bool:
    """Return True if the types shard nothing but the batch (explicit sharding); for the rest lax has its own rules."""
    batch = call.lhs_axes[0]
    spec = [x.sharding.spec[axis] if axis == batch else None for axis in range(len(x.shape))]
    replicated = PartitionSpec(*[None] * len(kernel.shape))
    return x.sharding.spec == PartitionSpec(*spec) and kernel.sharding.spec == replicated


def _sequence(values: Any) -> Sequence[Any] | np.ndarray:
    """Return values unless they are an iterator: reading it would leave nothing for lax."""
    if not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError
    return values


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, _sequence(values)))


def _tuple_of(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


#: The conversions of lax's arguments to hashable forms.
_HASHABLE: dict[str, Callable[[Any], Any]] = {
    "window_strides": _ints,
    "padding": lambda padding: padding if isinstance(padding, str) else tuple(map(_ints, _sequence(padding))),
    "lhs_dilation": _ints,
    "rhs_dilation": _ints,
    "dimension_numbers": _tuple_of,
    "feature_group_count": int,
    "precision": _tuple_of,
    "preferred_element_type": jnp.dtype,
}
