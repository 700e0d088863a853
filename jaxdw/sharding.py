"""One convolution over many devices: batch and channels without communication, space by exchanging halos.

Each device computes `jaxdw.depthwise_conv` on its block of x. Along a spatial axis that is shared out, it first
receives from its neighbours what its outputs read beyond the block: the halo. What lies outside of x arrives as zeros,
or around the ring for periodic padding, so every output is the same chain of multiply-adds as on one device.
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

from jaxdw import _arrays, primitive
from jaxdw._compat import varying_along, varying_axes
from jaxdw.bias import add_bias, starts_from_bias
from jaxdw.call import Call
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
) -> jax.Array:
    """`jaxdw.depthwise_conv` with x and the result shared out over a mesh of devices.

    Methods "taps" and "rows" give the bits of one device (finite weights; the sign of a zero aside), and so does their
    gradient by x, but at the edges of shards with periodic or reflected padding. Gradients by kernel and bias are sums
    over the devices. Both modes of differentiation work. The only communication of the forward pass is one exchange of
    halos for each spatial axis that is shared out, one axis after the other so that corners come along.

    Args:
      x: `(*batch, *spatial, C)`, as for `jaxdw.depthwise_conv`. Where it lies on the mesh in another way, it is moved.
      kernel: `(*kernel_size, 1, C*M)`; each device needs the part that belongs to its channels.
      bias: `(C*M,)` or None, likewise.
      spec: for each axis of x, the mesh axis or axes that share it out, such as `P("data", "x", "y", None)`; also that
        of the result. None: that of x itself, where it is known (outside `jit`, or over explicit mesh axes), and for
        channels also that of the kernel.
      mesh: None: that of x itself, or the one of `jax.set_mesh`. Mesh axes that `spec` does not name are left to JAX.
      strides, padding, kernel_dilation, input_dilation, method, precision, preferred_element_type: as for
        `jaxdw.depthwise_conv`.

    Every axis of x and of the result must be a multiple of the number of devices that share it; along a spatial axis no
    output may read beyond the neighbouring shards.

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
    return run(call, method, mesh, spec)


def run(
    call: Call, method: str, mesh: Mesh | AbstractMesh | None = None, spec: PartitionSpec | None = None
) -> jax.Array:
    """Compute `depthwise_conv` of a checked call."""
    mesh, spec = _placement(call.x, call.kernel, mesh, spec)
    shares = _shares(spec, mesh, call.x.ndim)
    y = call.without_products()
    if y is not None:  # nothing to partition
        return y
    cut = _Cut.of(call.geometry, shares)
    return _run(call.promoted(), cut=cut, mesh=mesh, method=method)


@dataclasses.dataclass(frozen=True)
class Over:
    """`depthwise_conv` over one mesh, as a module takes it: `DepthwiseConv(..., depthwise_conv=Over(P(None, "x")))`.

    Attributes:
      spec, mesh: as for `depthwise_conv`.
    """

    spec: PartitionSpec
    mesh: Mesh | AbstractMesh | None = None

    def __call__(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, **options: Any) -> jax.Array:
        return depthwise_conv(x, kernel, bias, spec=self.spec, mesh=self.mesh, **options)


class _Share(NamedTuple):
    """How one axis of x is shared out.

    Attributes:
      names: the mesh axes, the first one major.
      shards: over how many devices.
      as_in_mesh: the same in the order of the mesh, which `lax.ppermute` counts in and JAX 0.12 insists on.
      ranks: for each shard, which device along these mesh axes has it, counted in that order.
    """

    names: tuple[str, ...]
    shards: int
    as_in_mesh: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Halo:
    """What the shards of one spatial axis read of each other.

    Positions count from the first of a shard's own block, after input dilation. Shard i reads `span` of them from
    `start + i * drift`: with "SAME" and its like all shards read alike (`drift` 0), with "VALID" each begins earlier
    in its block than the one before.

    Attributes:
      axis: which spatial axis.
      share: over which devices.
      size: positions of x that a shard owns.
      low, high: positions received from the shard before and from the one after.
      start, drift, span: as above.
      spread: the input dilation.
      mode: what padding holds, as in `Geometry`.
    """

    axis: int
    share: _Share
    size: int
    low: int
    high: int
    start: int
    drift: int
    span: int
    spread: int
    mode: str

    @classmethod
    def of(cls, geometry: Geometry, axis: int, share: _Share) -> _Halo:
        """The halo of one axis that divides.

        Raises:
          ValueError: an output reads beyond the neighbouring shards.
        """
        total, spread, stride = geometry.spatial[axis], geometry.input_dilation[axis], geometry.strides[axis]
        size, outputs = total // share.shards, geometry.output_spatial[axis] // share.shards
        start, drift = -geometry.padding[axis][0], outputs * stride - size * spread
        span = (outputs - 1) * stride + geometry.spans[axis]
        low = high = 0
        for shard in range(share.shards):
            begin = start + shard * drift
            first, last = -(-begin // spread), (begin + span - 1) // spread
            if geometry.padding_mode == "zeros":  # beyond x there is nothing to receive
                first, last = max(first, -shard * size), min(last, total - 1 - shard * size)
            if first <= last:
                low, high = max(low, -first), max(high, last + 1 - size)
        most = size - 1 if geometry.padding_mode == "reflect" else size
        if max(low, high) > most:
            raise ValueError(
                f"on axis {len(geometry.batch) + axis} of `x` the halo is {max(low, high)} wide and a shard {size} "
                f"({total} over the {share.shards} devices that {_quoted(share)} of `spec` names), expected a halo of "
                f"at most {most}{', what a shard can reflect' if most < size else ''}: use fewer devices on this axis"
            )
        return cls(axis, share, size, low, high, start, drift, span, spread, geometry.padding_mode)

    @property
    def alike(self) -> bool:
        """Whether the rest of the padding is the same zeros in all shards, which a geometry can express."""
        return self.drift == 0 and self.mode == "zeros"

    @property
    def block(self) -> int:
        """Positions of x with both halos."""
        return self.low + self.size + self.high

    def margins(self) -> tuple[int, int]:
        """What to pad a block with halos by, after dilation, to hold what every shard reads; negative crops."""
        furthest = (self.share.shards - 1) * self.drift
        first, last = self.start + min(0, furthest), self.start + max(0, furthest) + self.span
        return -self.low * self.spread - first, last - (self.size + self.high - 1) * self.spread - 1

    def exchange(self, x: jax.Array, at: int) -> jax.Array:
        """A shard's block of x, whose axis `at` is this one, with its halos."""
        before = self._received(x, at, self.low, 1) if self.low else None
        after = self._received(x, at, self.high, -1) if self.high else None
        present = [part for part in (before, x, after) if part is not None]
        x = present[0] if len(present) == 1 else lax.concatenate(present, at)
        return x if self.alike else self._read(x, at)

    def _received(self, x: jax.Array, at: int, width: int, step: int) -> jax.Array:
        """The `width` positions next to this block, of the shard `step` before it."""
        names, count, as_in_mesh, ranks = self.share
        end = self.size - width if step > 0 else 0
        ring = [(ranks[shard], ranks[(shard + step) % count]) for shard in range(count)]
        border = 0 if step > 0 else count - 1  # the shard that nobody is before
        pairs = [(source, to) for source, to in ring if self.mode == "circular" or to != ranks[border]]
        halo = lax.ppermute(lax.slice_in_dim(x, end, end + width, axis=at), as_in_mesh, pairs)
        if self.mode != "reflect":
            return halo
        begin = 1 if step > 0 else self.size - 1 - width
        mirrored = lax.rev(lax.slice_in_dim(x, begin, begin + width, axis=at), (at,))
        return jnp.where(lax.axis_index(names) == border, mirrored, halo)

    def _read(self, x: jax.Array, at: int) -> jax.Array:
        """The `span` positions that this shard reads, of the block with halos."""
        config = [(0, 0, 0)] * x.ndim
        config[at] = (*self.margins(), self.spread - 1)
        if config[at] != (0, 0, 0):
            x = lax.pad(x, jnp.zeros((), x.dtype), config)
        if self.drift == 0:
            return x
        shard = lax.axis_index(self.share.names)
        start = (shard if self.drift > 0 else self.share.shards - 1 - shard) * abs(self.drift)
        return lax.dynamic_slice_in_dim(x, start, self.span, axis=at)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A convolution cut into equal ones, one a device.

    Attributes:
      whole: the geometry on one device.
      local: the geometry of what each device computes, once it has its halos.
      shares: for each axis of x, the devices.
      halos: of the spatial axes that more than one device shares.
    """

    whole: Geometry
    local: Geometry
    shares: tuple[_Share, ...]
    halos: tuple[_Halo, ...]

    @classmethod
    def of(cls, geometry: Geometry, shares: tuple[_Share, ...]) -> _Cut:
        """The cut of a geometry.

        Raises:
          ValueError: an axis that does not divide, or a halo wider than a shard.
        """
        _check_divides("x", geometry.x_shape, geometry, shares)
        _check_divides("the result", geometry.output_shape, geometry, shares)
        spatial = shares[len(geometry.batch) : -1]
        halos = tuple(_Halo.of(geometry, axis, share) for axis, share in enumerate(spatial) if share.shards > 1)
        return cls(geometry, _local(geometry, shares, halos), shares, halos)

    @property
    def names(self) -> list[tuple[str, ...]]:
        """For each axis of x, the mesh axes that share it out."""
        return [share.names for share in self.shares]

    def exchange(self, x: jax.Array) -> jax.Array:
        """A device's block of x with what it reads of others, axis after axis so that corners come along."""
        for halo in self.halos:
            x = halo.exchange(x, len(self.whole.batch) + halo.axis)
        return x

    def adjoint(self) -> _Cut:
        """The cut of the convolution that takes the result's gradient to x's.

        It always exists: shard i reads what shard j owns where j's gradient needs what i made.
        """
        return _Cut.of(primitive.adjoint(self.whole), self.shares)


def _local(geometry: Geometry, shares: Sequence[_Share], halos: Sequence[_Halo]) -> Geometry:
    spatial, padding, spread = list(geometry.spatial), list(geometry.padding), list(geometry.input_dilation)
    for halo in halos:
        if halo.alike:
            spatial[halo.axis], padding[halo.axis] = halo.block, halo.margins()
        else:
            spatial[halo.axis], padding[halo.axis], spread[halo.axis] = halo.span, (0, 0), 1
    return dataclasses.replace(
        geometry,
        batch=tuple(size // share.shards for size, share in zip(geometry.batch, shares)),
        spatial=tuple(spatial),
        channels=geometry.channels // shares[-1].shards,
        padding=tuple(padding),
        padding_mode=geometry.padding_mode if any(pair != (0, 0) for pair in padding) else "zeros",
        input_dilation=tuple(spread),
    )


@functools.partial(jax.jit, static_argnames=("cut", "mesh", "method"))
def _run(call: Call, *, cut: _Cut, mesh: Mesh | AbstractMesh, method: str) -> jax.Array:
    channels = cut.names[-1]
    groups = cut.names, [()] * (call.kernel.ndim - 1) + [channels], [channels]
    arrays = [array for array in call.arrays if array is not None]
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    if explicit:  # over these `shard_map` takes arrays only as they are placed
        kept = [_spec([tuple(n for n in names if n in explicit) for names in group]) for group in groups]
        arrays = [jax.sharding.reshard(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, kept)]

    def part(x, kernel, bias=None):
        return _convolve(dataclasses.replace(call, x=x, kernel=kernel, bias=bias, geometry=cut.local), cut, method)

    named = {name for group in cut.names for name in group}
    if not named:  # `shard_map` would take an empty set for all axes
        return part(*arrays)
    specs = tuple(map(_spec, groups))
    return jax.shard_map(part, mesh=mesh, in_specs=specs[: len(arrays)], out_specs=specs[0], axis_names=named)(*arrays)


def _convolve(call: Call, cut: _Cut, method: str) -> jax.Array:
    """Compute one device's part from its block of x and its channels of kernel and bias."""
    x, result = call.x, call.result
    wide = _arrays.accumulator(result)
    # Here, so that their gradients are summed over the devices once these are small, and before they are rounded.
    axes = varying_axes(x)
    kernel = varying_along(call.kernel.astype(wide), axes)
    bias = None if call.bias is None else varying_along(call.bias.astype(wide), axes)
    bias_first = starts_from_bias(method, cut.whole)  # whatever padding the shard has
    start = bias if bias_first else None
    dtype = result if bias is None or bias_first else wide
    function = None if method == "auto" else METHODS[method].function
    if function is not None:
        local = dataclasses.replace(call, x=cut.exchange(x), kernel=kernel.astype(x.dtype), bias=None, result=dtype)
        y = function(local)
    elif cut.halos and cut.whole.padding_mode == "zeros":
        y = _exchanged(x, kernel, start, cut, method, dtype)
    else:
        y = primitive.conv(cut.exchange(x), kernel, start, cut.local, method, dtype)
    return y if bias is None or bias_first else add_bias(y, bias, result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _exchanged(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, cut: _Cut, method: str, dtype: np.dtype
) -> jax.Array:
    """`primitive.conv` of x with its halos.

    Differentiated as it stands, each device would send back the gradient of its halo, for the owner to add to its own:
    a sum of two chains, in another order than on one device. So the tangent is written as the transpose of the gradient
    that we want, a convolution of dy with halos of its own. Reverse mode transposes it once more, and computes just
    that.
    """
    return primitive.conv(cut.exchange(x), kernel, bias, cut.local, method, dtype)


@functools.partial(_exchanged.defjvp, symbolic_zeros=True)
def _exchanged_jvp(cut, method, dtype, primals, tangents):
    x, kernel, bias = primals
    dx, dkernel, dbias = tangents
    with_halos = cut.exchange(x)
    y = primitive.conv(with_halos, kernel, bias, cut.local, method, dtype)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms += jax.linear_transpose(lambda dy: _input_gradient(dy, kernel, cut, method, x.dtype), y)(dx)
    if not isinstance(dkernel, SymbolicZero):
        terms.append(primitive.conv(with_halos, dkernel, None, cut.local, method, dtype))
    if bias is not None and not isinstance(dbias, SymbolicZero):
        terms.append(jnp.broadcast_to(dbias.astype(dtype), y.shape))
    return y, functools.reduce(jnp.add, terms)


def _input_gradient(dy: jax.Array, kernel: jax.Array, cut: _Cut, method: str, dtype: np.dtype) -> jax.Array:
    """As `primitive.input_gradient`, of a device's block."""
    adjoint, multiplier = cut.adjoint(), cut.whole.multiplier
    flipped = lax.rev(kernel, tuple(range(cut.whole.rank)))
    dx = primitive.conv(adjoint.exchange(dy), flipped, None, adjoint.local, method, dtype)
    return dx if multiplier == 1 else dx.reshape(*dx.shape[:-1], -1, multiplier).sum(axis=-1)


def _placement(
    x: jax.Array, kernel: jax.Array, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec | None
) -> tuple[Mesh | AbstractMesh, PartitionSpec]:
    """The mesh and the spec, those not given as x has them, or the context."""
    context, of_type = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    own = _known_sharding(x) or _known_sharding(kernel)
    if spec is None:
        if own is None:
            raise ValueError(
                "`spec` is None, expected a PartitionSpec: how `x` is shared out is known only outside `jit` or over "
                "explicit mesh axes, of an array that is on a mesh"
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
    """How x is shared out, its channels as the kernel's where x itself is whole."""
    own, of_kernel = _known_sharding(x), _known_sharding(kernel)
    entries = [None] * x.ndim if own is None else list(own.spec) + [None] * (x.ndim - len(own.spec))
    features = None if of_kernel is None or len(of_kernel.spec) < kernel.ndim else of_kernel.spec[-1]
    taken = {name for entry in entries for name in _group(entry)}
    if entries[-1] is None and not taken & set(_group(features)):
        entries[-1] = features
    return PartitionSpec(*entries)


def _group(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _shares(spec: PartitionSpec, mesh: Mesh | AbstractMesh, ndim: int) -> tuple[_Share, ...]:
    """For each axis of x, the devices that share it out."""
    if len(spec) > ndim:
        raise ValueError(f"`spec` is {spec} of {len(spec)} entries, expected at most {ndim}, one an axis of `x`")
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
                    "call has taken that one already"
                )
            if any(name in earlier for earlier in names) or group.count(name) > 1:
                raise ValueError(f"`spec` is {spec}, which names {name!r} twice, expected each mesh axis once")
        names.append(group)
    names += [()] * (ndim - len(names))
    return tuple(_share(group, mesh) for group in names)


def _share(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> _Share:
    sizes = [mesh.shape[name] for name in names]
    in_mesh_order = np.argsort([mesh.axis_names.index(name) for name in names]).astype(int)
    ranks = np.arange(math.prod(sizes)).reshape([sizes[axis] for axis in in_mesh_order])
    ranks = ranks.transpose(np.argsort(in_mesh_order))
    as_in_mesh = tuple(names[axis] for axis in in_mesh_order)
    return _Share(names, math.prod(sizes), as_in_mesh, tuple(map(int, ranks.ravel())))


def _check_divides(what: str, shape: tuple[int, ...], geometry: Geometry, shares: Sequence[_Share]) -> None:
    kinds = ["batch"] * len(geometry.batch) + ["spatial"] * geometry.rank + ["channels"]
    for axis, (size, share, kind) in enumerate(zip(shape, shares, kinds)):
        if size % share.shards:
            raise ValueError(
                f"`x` has shape {geometry.x_shape} and the result {geometry.output_shape}: {what} has {size} on axis "
                f"{axis} ({kind}), expected a multiple of {share.shards}, the devices that {_quoted(share)} of `spec` "
                "names"
            )


def _spec(names: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(group[0] if len(group) == 1 else group or None for group in names))


def _quoted(share: _Share) -> str:
    return " x ".join(map(repr, share.names))
