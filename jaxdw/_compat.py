"""Names that differ between JAX releases, and nothing else.

JAX 0.10 renamed the part of a type about the mesh axes of a `shard_map`: `vma`, the names of the axes along which a
value varies, became `manual_axis_type`. `lax.pvary` became `lax.pcast` on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import lax

_RENAMED = hasattr(jax.sharding, "ManualAxisType")
_FIELD = "manual_axis_type" if _RENAMED else "vma"


def varying_axes(array: Any) -> frozenset[Any]:
    """Return the mesh axes of a `shard_map` along which an array varies."""
    kind = getattr(jax.typeof(array), _FIELD)
    return kind.varying if _RENAMED else kind


def varying_along(array: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Return `array` as one that varies along these axes, too."""
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    return lax.pcast(array, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(array, missing)


def varying_together(*operands: jax.Array) -> list[jax.Array]:
    """Return the operands as arrays that vary along the same axes, as a primitive needs them."""
    axes = frozenset().union(*map(varying_axes, operands))
    return [varying_along(operand, axes) for operand in operands]


def varying_nowhere(aval: Any) -> Any:
    """Return a type as it is outside a `shard_map`."""
    return aval.update(**{_FIELD: jax.sharding.ManualAxisType() if _RENAMED else frozenset()})


@contextlib.contextmanager
def triton_kernels() -> Iterator[None]:
    """Lower kernels for NVIDIA GPUs without the warning of JAX 0.11 and newer, which no user of them can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


def struct_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return a shape and a dtype that vary as `x` does."""
    return jax.ShapeDtypeStruct(shape, dtype, **{_FIELD: getattr(jax.typeof(x), _FIELD)})


def mesh_of_no_axis(kind: str, cores: int | None, platform: str) -> jax.sharding.AbstractMesh:
    """Return a mesh that names a kind of device and has no axis, to lower kernels for it where it is not."""
    fields = dataclasses.fields(jax.sharding.AbstractDevice)  # JAX 0.8 has no `platform` among them
    device = jax.sharding.AbstractDevice(*(kind, cores, platform)[: len(fields)])
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return of the parameters of a `scan` how many constants it has, and how many values it carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts.vals), len(carry.vals)
