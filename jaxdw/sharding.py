"""One convolution over many devices: batch and channels without communication, space by an exchange of halos.

Each device computes `jaxdw.depthwise_conv` on its block of x. Along a sharded spatial axis it first receives from its
neighbours what its outputs read beyond the block: the halo. Positions outside of x arrive as zeros, or around the ring
for periodic padding. So every output is the same chain of multiply-adds as on one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdw import epilogue as epilogues
from jaxdw import primitive
from jaxdw._compat import varying_along, varying_axes
from jaxdw.bias import add_bias, starts_from_bias
from jaxdw.call import Call
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Geometry, Padding
from jaxdw.methods import METHODS, check_method


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    method: str = "auto",
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Compute `jaxdw.depthwise_conv` with x and the result sharded over a mesh of devices.

    Methods "taps" and "rows" give the bits of one device (finite weights; except the sign of a zero). So does their
    gradient by x, except at the edges of shards with periodic or reflected padding. Gradients by kernel and bias are
    sums over the devices. Both modes of differentiation work. The forward pass communicates only one exchange of halos
    per sharded spatial axis, one axis after the other, so that corners arrive too.

    Args:
      x: `(*batch, *spatial, C)`, as for `jaxdw.depthwise_conv`. It is moved if its sharding on the mesh is another.
      kernel: `(*kernel_size, 1, C*M)`; each device needs the part of its channels.
      bias: `(C*M,)` or None, likewise.
      spec: for each axis of x and of the result, the mesh axis or axes that shard it, such as
        `P("data", "x", "y", None)`. None is the sharding of x itself, where it is known (outside `jit`, or over
        explicit mesh axes), and for channels also that of the kernel.
      mesh: None is that of x itself, or the one of `jax.set_mesh`. Mesh axes that `spec` does not name are left to JAX.
      strides, padding, kernel_dilation, input_dilation, method, precision, preferred_element_type, epilogue: as for
        `jaxdw.depthwise_conv`. A residual is sharded as the result.

    The size of every axis of x and of the result must be a multiple of the number of devices that shard it. Along a
    spatial axis no output may read beyond the neighbouring shards.

    Returns:
      `(*batch, *output_spatial, C*M)`, sharded by `spec`.

    Raises:
      ValueError, TypeError: an argument that does not fit, an axis that does not divide, or a halo wider than a shard;
        the message names it and what was expected.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("rows",))
    >>> x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    >>> depthwise_conv(x, kernel, spec=P(None, "rows"), mesh=mesh).shape
    (1, 8, 8, 4)
    """
    check_method(method)
    call = Call.of(
        x,
        kernel,
        bias,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return run(call, method, mesh, spec, epilogues.checked(epilogue, call))


def run(
    call: Call,
    method: str,
    mesh: Mesh | AbstractMesh | None = None,
    spec: PartitionSpec | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Compute `depthwise_conv` of a checked call and epilogue."""
    mesh, spec = _placement(call.x, call.kernel, mesh, spec)
    shardings = _axis_shardings(spec, mesh, call.x.ndim)
    y = call.without_products()
    if y is not None:  # nothing to partition
        return y if epilogue is None else epilogue.apply(y.astype(call.wide), call.geometry.rank, call.result)
    partition = _Partition.of(call.geometry, shardings)
    return _run(call.promoted(), epilogue, partition=partition, mesh=mesh, method=method)


@dataclasses.dataclass(frozen=True)
class Over:
    """`depthwise_conv` over one mesh, as modules accept it: `DepthwiseConv(..., depthwise_conv=Over(P(None, "x")))`.

    Attributes:
      spec, mesh: as for `depthwise_conv`.
    """

    spec: PartitionSpec
    mesh: Mesh | AbstractMesh | None = None

    def __call__(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, **options: Any) -> jax.Array:
        return depthwise_conv(x, kernel, bias, spec=self.spec, mesh=self.mesh, **options)


class _AxisSharding(NamedTuple):
    """The sharding of one axis of x.

    Attributes:
      names: the mesh axes, the first one major.
      shards: number of devices.
      as_in_mesh: `names` in the order of the mesh. `lax.ppermute` counts in it, and JAX 0.12 requires it.
      ranks: for each shard, the device along these mesh axes that has it, counted in that order.
    """

    names: tuple[str, ...]
    shards: int
    as_in_mesh: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Halo:
    """The reads of the shards of one spatial axis from each other.

    Positions count from the first of a shard's own block, after input dilation. Shard i reads `span` of them from
    `start + i * drift`. With "SAME" padding all shards read the same positions of their blocks (`drift` 0). With
    "VALID" each shard begins earlier in its block than the shard before.

    Attributes:
      axis: number of the spatial axis.
      sharding: of that axis.
      size: positions of x that a shard owns.
      low, high: positions received from the shard before and from the shard after.
      start, drift, span: as above.
      input_dilation: of that axis.
      mode: of the padding, as in `Geometry`.
    """

    axis: int
    sharding: _AxisSharding
    size: int
    low: int
    high: int
    start: int
    drift: int
    span: int
    input_dilation: int
    mode: str

    @classmethod
    def of(cls, geometry: Geometry, axis: int, sharding: _AxisSharding) -> _Halo:
        """Return the halo of one axis that divides.

        Raises:
          ValueError: an output reads beyond the neighbouring shards.
        """
        total, dilation, stride = geometry.spatial[axis], geometry.input_dilation[axis], geometry.strides[axis]
        size, outputs = total // sharding.shards, geometry.output_spatial[axis] // sharding.shards
        start, drift = -geometry.padding[axis][0], outputs * stride - size * dilation
        span = (outputs - 1) * stride + geometry.spans[axis]
        low = high = 0
        for shard in range(sharding.shards):
            begin = start + shard * drift
            first, last = -(-begin // dilation), (begin + span - 1) // dilation
            if geometry.padding_mode == "zeros":  # beyond x there is nothing to receive
                first, last = max(first, -shard * size), min(last, total - 1 - shard * size)
            if first <= last:
                low, high = max(low, -first), max(high, last + 1 - size)
        most = size - 1 if geometry.padding_mode == "reflect" else size
        if max(low, high) > most:
            raise ValueError(
                f"on axis {len(geometry.batch) + axis} of `x` the halo is {max(low, high)} wide and a shard {size} "
                f"({total} over the {sharding.shards} devices that {_quoted(sharding)} of `spec` names), expected a "
                f"halo of at most {most}{', what a shard can reflect' if most < size else ''}: use fewer devices on "
                "this axis"
            )
        return cls(axis, sharding, size, low, high, start, drift, span, dilation, geometry.padding_mode)

    @property
    def pads_every_shard_the_same(self) -> bool:
        """True if the rest of the padding is the same zeros in all shards, which a geometry can express."""
        return self.drift == 0 and self.mode == "zeros"

    @property
    def block(self) -> int:
        """Number of positions of x with both halos."""
        return self.low + self.size + self.high

    def margins(self) -> tuple[int, int]:
        """Return the padding of a block with halos, after dilation, that holds all reads of every shard.

        Negative padding crops.
        """
        furthest = (self.sharding.shards - 1) * self.drift
        first, last = self.start + min(0, furthest), self.start + max(0, furthest) + self.span
        return -self.low * self.input_dilation - first, last - (self.size + self.high - 1) * self.input_dilation - 1

    def exchange(self, x: jax.Array, at: int) -> jax.Array:
        """Return a shard's block of x with its halos along axis `at`."""
        before = self._received(x, at, self.low, 1) if self.low else None
        after = self._received(x, at, self.high, -1) if self.high else None
        present = [part for part in (before, x, after) if part is not None]
        x = present[0] if len(present) == 1 else lax.concatenate(present, at)
        return x if self.pads_every_shard_the_same else self._read(x, at)

    def _received(self, x: jax.Array, at: int, width: int, step: int) -> jax.Array:
        """Return the `width` positions next to this block, from the shard `step` before it."""
        names, count, as_in_mesh, ranks = self.sharding
        end = self.size - width if step > 0 else 0
        ring = [(ranks[shard], ranks[(shard + step) % count]) for shard in range(count)]
        border = 0 if step > 0 else count - 1  # the shard that has no neighbour there
        pairs = [(source, to) for source, to in ring if self.mode == "circular" or to != ranks[border]]
        halo = lax.ppermute(lax.slice_in_dim(x, end, end + width, axis=at), as_in_mesh, pairs)
        if self.mode != "reflect":
            return halo
        begin = 1 if step > 0 else self.size - 1 - width
        mirrored = lax.rev(lax.slice_in_dim(x, begin, begin + width, axis=at), (at,))
        return jnp.where(lax.axis_index(names) == border, mirrored, halo)

    def _read(self, x: jax.Array, at: int) -> jax.Array:
        """Return the `span` positions that this shard reads, from its block with halos."""
        config = [(0, 0, 0)] * x.ndim
        config[at] = (*self.margins(), self.input_dilation - 1)
        if config[at] != (0, 0, 0):
            x = lax.pad(x, jnp.zeros((), x.dtype), config)
        if self.drift == 0:
            return x
        shard = lax.axis_index(self.sharding.names)
        start = (shard if self.drift > 0 else self.sharding.shards - 1 - shard) * abs(self.drift)
        return lax.dynamic_slice_in_dim(x, start, self.span, axis=at)


@dataclasses.dataclass(frozen=True)
class _Partition:
    """A convolution partitioned into equal ones, one per device.

    Attributes:
      whole: the geometry on one device.
      local: the geometry of each device's part, with its halos.
      shardings: for each axis of x.
      halos: of the spatial axes that more than one device shards.
    """

    whole: Geometry
    local: Geometry
    shardings: tuple[_AxisSharding, ...]
    halos: tuple[_Halo, ...]

    @classmethod
    def of(cls, geometry: Geometry, shardings: tuple[_AxisSharding, ...]) -> _Partition:
        """Return the partition of a geometry.

        Raises:
          ValueError: an axis that does not divide, or a halo wider than a shard.
        """
        _check_divides("x", geometry.x_shape, geometry, shardings)
        _check_divides("the result", geometry.output_shape, geometry, shardings)
        spatial = shardings[len(geometry.batch) : -1]
        halos = tuple(_Halo.of(geometry, axis, each) for axis, each in enumerate(spatial) if each.shards > 1)
        return cls(geometry, _local(geometry, shardings, halos), shardings, halos)

    @property
    def names(self) -> list[tuple[str, ...]]:
        """For each axis of x, the mesh axes that shard it."""
        return [sharding.names for sharding in self.shardings]

    def exchange(self, x: jax.Array) -> jax.Array:
        """Return a device's block of x with its halos, axis after axis, so that corners arrive too."""
        for halo in self.halos:
            x = halo.exchange(x, len(self.whole.batch) + halo.axis)
        return x

    def adjoint(self) -> _Partition:
        """Return the partition of the convolution from the gradient of the result to that of x.

        It always exists: shard i reads what shard j owns where j's gradient needs what i computed.
        """
        return _Partition.of(primitive.adjoint(self.whole), self.shardings)


def _local(geometry: Geometry, shardings: Sequence[_AxisSharding], halos: Sequence[_Halo]) -> Geometry:
    spatial, padding, dilation = list(geometry.spatial), list(geometry.padding), list(geometry.input_dilation)
    for halo in halos:
        if halo.pads_every_shard_the_same:
            spatial[halo.axis], padding[halo.axis] = halo.block, halo.margins()
        else:
            spatial[halo.axis], padding[halo.axis], dilation[halo.axis] = halo.span, (0, 0), 1
    return dataclasses.replace(
        geometry,
        batch=tuple(size // sharding.shards for size, sharding in zip(geometry.batch, shardings)),
        spatial=tuple(spatial),
        channels=geometry.channels // shardings[-1].shards,
        padding=tuple(padding),
        padding_mode=geometry.padding_mode if any(pair != (0, 0) for pair in padding) else "zeros",
        input_dilation=tuple(dilation),
    )


@functools.partial(jax.jit, static_argnames=("partition", "mesh", "method"))
def _run(
    call: Call, epilogue: Epilogue | None, *, partition: _Partition, mesh: Mesh | AbstractMesh, method: str
) -> jax.Array:
    arrays, structure = jax.tree.flatten((call, epilogue))
    groups = [partition.names[-array.ndim :] for array in arrays]  # of all axes, or of the channels alone
    groups[1] = [()] * (call.kernel.ndim - 1) + partition.names[-1:]
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    if explicit:  # over these `shard_map` takes arrays only as they are placed
        kept = [_spec([tuple(n for n in names if n in explicit) for names in group]) for group in groups]
        arrays = [jax.sharding.reshard(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, kept)]

    def part(*arrays):
        call, epilogue = jax.tree.unflatten(structure, arrays)
        return _convolve(dataclasses.replace(call, geometry=partition.local), epilogue, partition, method)

    named = {name for group in partition.names for name in group}
    if not named:  # `shard_map` would take an empty set for all axes
        return part(*arrays)
    specs = tuple(map(_spec, groups))
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=specs[0], axis_names=named)(*arrays)


def _convolve(call: Call, epilogue: Epilogue | None, partition: _Partition, method: str) -> jax.Array:
    """Compute one device's part from its block of x and its channels of the other arrays."""
    x, wide = call.x, call.wide
    result = call.result if epilogue is None else wide
    # Cast here: gradients are then added over the devices when they are small, and before they are rounded.
    axes = varying_axes(x)
    kernel = varying_along(call.kernel.astype(wide), axes)
    bias = None if call.bias is None else varying_along(call.bias.astype(wide), axes)
    if epilogue is not None:
        epilogue = jax.tree.map(lambda array: varying_along(array, axes), epilogue)
    function = None if method == "auto" else METHODS[method].function
    if function is None and not partition.halos:
        return epilogues.conv(x, kernel, bias, partition.local, method, call.result, epilogue)
    bias_first = starts_from_bias(method, partition.whole)  # the shard's own padding does not matter
    start = bias if bias_first else None
    dtype = result if bias is None or bias_first else wide
    if function is not None:
        local = dataclasses.replace(
            call, x=partition.exchange(x), kernel=kernel.astype(x.dtype), bias=None, result=dtype
        )
        y = function(local)
    elif partition.whole.padding_mode == "zeros":
        y = _exchanged(x, kernel, start, partition, method, dtype)
    else:
        y = primitive.conv(partition.exchange(x), kernel, start, partition.local, method, dtype)
    if bias is not None and not bias_first:
        y = add_bias(y, bias, result)
    return y if epilogue is None else epilogue.apply(y, partition.whole.rank, call.result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _exchanged(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, partition: _Partition, method: str, dtype: np.dtype
) -> jax.Array:
    """Compute `primitive.conv` of x with its halos.

    In the derivative by JAX each device would send back the gradient of its halo, for the owner to add to its own: a
    sum of two chains, in another order than on one device. Therefore the tangent is the transpose of the gradient that
    we want, a convolution of dy with halos of its own. Reverse mode transposes it again and computes exactly that.
    """
    return primitive.conv(partition.exchange(x), kernel, bias, partition.local, method, dtype)


@functools.partial(_exchanged.defjvp, symbolic_zeros=True)
def _exchanged_jvp(partition, method, dtype, primals, tangents):
    x, kernel, bias = primals
    dx, dkernel, dbias = tangents
    with_halos = partition.exchange(x)
    y = primitive.conv(with_halos, kernel, bias, partition.local, method, dtype)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms += jax.linear_transpose(lambda dy: _input_gradient(dy, kernel, partition, method, x.dtype), y)(dx)
    if not isinstance(dkernel, SymbolicZero):
        terms.append(primitive.conv(with_halos, dkernel, None, partition.local, method, dtype))
    if bias is not None and not isinstance(dbias, SymbolicZero):
        terms.append(jnp.broadcast_to(dbias.astype(dtype), y.shape))
    return y, functools.reduce(jnp.add, terms)


def _input_gradient(dy: jax.Array, kernel: jax.Array, partition: _Partition, method: str, dtype: np.dtype) -> jax.Array:
    """Compute `primitive.input_gradient` for a device's block."""
    adjoint, multiplier = partition.adjoint(), partition.whole.multiplier
    dx = primitive.conv(adjoint.exchange(dy), kernel, None, adjoint.local, method, dtype, flipped=True)
    return dx if multiplier == 1 else dx.reshape(*dx.shape[:-1], -1, multiplier).sum(axis=-1)


def _placement(
    x: jax.Array, kernel: jax.Array, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec | None
) -> tuple[Mesh | AbstractMesh, PartitionSpec]:
    """Return the mesh and the spec; those not given are of x, or of the context."""
    context, of_type = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    own = _known_sharding(x) or _known_sharding(kernel)
    if spec is None:
        if own is None:
            raise ValueError(
                "`spec` is None, expected a PartitionSpec: the sharding of `x` is known only outside `jit` or over "
                "explicit mesh axes, for an array on a mesh"
            )
        spec = _own_spec(x, kernel)
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"`spec` is {spec!r}, expected a jax.sharding.PartitionSpec or None")
    if mesh is None:
        mesh = own.mesh if own is not None else context if of_type.empty else of_type
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"`mesh` is {mesh!r}, expected a jax.sharding.Mesh or None")
    if mesh.empty:
        raise ValueError("`mesh` is None, expected a mesh: `x` is on none, and none is set by `jax.set_mesh`")
    if context.manual_axes and context.shape == mesh.shape:  # inside a `shard_map` over some of its axes
        mesh = context
    return mesh, spec


def _known_sharding(array: jax.Array) -> NamedSharding | None:
    traced = isinstance(array, jax.core.Tracer)
    own = jax.typeof(array).sharding if traced else array.sharding
    if not isinstance(own, NamedSharding) or own.mesh.empty:
        return None
    return None if traced and AxisType.Explicit not in own.mesh.axis_types else own


def _own_spec(x: jax.Array, kernel: jax.Array) -> PartitionSpec:
    """Return the sharding of x; its channels have that of the kernel if they have none."""
    own, of_kernel = _known_sharding(x), _known_sharding(kernel)
    entries = [None] * x.ndim if own is None else list(own.spec) + [None] * (x.ndim - len(own.spec))
    features = None if of_kernel is None or len(of_kernel.spec) < kernel.ndim else of_kernel.spec[-1]
    taken = {name for entry in entries for name in _group(entry)}
    if entries[-1] is None and not taken & set(_group(features)):
        entries[-1] = features
    return PartitionSpec(*entries)


def _group(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _axis_shardings(spec: PartitionSpec, mesh: Mesh | AbstractMesh, ndim: int) -> tuple[_AxisSharding, ...]:
    """Return the sharding of each axis of x."""
    if len(spec) > ndim:
        raise ValueError(f"`spec` is {spec} of {len(spec)} entries, expected at most {ndim}, one per axis of `x`")
    names: list[tuple[str, ...]] = []
    for entry in spec:
        group = _group(entry)
        for name in group:
            if name not in mesh.shape:
                known = ", ".join(map(repr, mesh.shape))
                raise ValueError(f"`spec` is {spec}, which names {name!r}, expected the axes of the mesh: {known}")
            if name in mesh.manual_axes:
                raise ValueError(
                    f"`spec` is {spec}, which names {name!r}, expected axes that are free: the `shard_map` around this "
                    "call already uses it"
                )
            if any(name in earlier for earlier in names) or group.count(name) > 1:
                raise ValueError(f"`spec` is {spec}, which names {name!r} twice, expected each mesh axis once")
        names.append(group)
    names += [()] * (ndim - len(names))
    return tuple(_axis_sharding(group, mesh) for group in names)


def _axis_sharding(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> _AxisSharding:
    sizes = [mesh.shape[name] for name in names]
    in_mesh_order = np.argsort([mesh.axis_names.index(name) for name in names]).astype(int)
    ranks = np.arange(math.prod(sizes)).reshape([sizes[axis] for axis in in_mesh_order])
    ranks = ranks.transpose(np.argsort(in_mesh_order))
    as_in_mesh = tuple(names[axis] for axis in in_mesh_order)
    return _AxisSharding(names, math.prod(sizes), as_in_mesh, tuple(map(int, ranks.ravel())))


def _check_divides(what: str, shape: tuple[int, ...], geometry: Geometry, shardings: Sequence[_AxisSharding]) -> None:
    kinds = ["batch"] * len(geometry.batch) + ["spatial"] * geometry.rank + ["channels"]
    for axis, (size, sharding, kind) in enumerate(zip(shape, shardings, kinds)):
        if size % sharding.shards:
            raise ValueError(
                f"`x` has shape {geometry.x_shape} and the result {geometry.output_shape}: {what} has {size} on axis "
                f"{axis} ({kind}), expected a multiple of {sharding.shards}, the devices that {_quoted(sharding)} "
                "of `spec` names"
            )


def _spec(names: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(group[0] if len(group) == 1 else group or None for group in names))


def _quoted(sharding: _AxisSharding) -> str:
    return " x ".join(map(repr, sharding.names))
