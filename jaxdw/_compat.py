"""What moved between releases of JAX and Flax, and nothing else.

JAX 0.10 renamed what a type says of the mesh axes of a `shard_map`: `vma`, the names of the axes along which a value
varies, became `manual_axis_type`. `lax.pvary` became `lax.pcast` on the way.

Flax 0.12.1 and 0.12.4 brought functions that 0.12.0, the only Flax 0.12 for JAX 0.8.0, has as methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

if TYPE_CHECKING:
    from flax import nnx

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


def modules_of(model: nnx.Module) -> Iterator[tuple[Any, nnx.Module]]:
    """Return each module of a Flax NNX model, after its path; the model itself is one."""
    from flax import nnx  # `import jaxdw` does without Flax

    return nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules()


def value_of(variable: nnx.Variable[Any]) -> Any:
    """Return the array of a Flax NNX variable, or the shape and dtype that it has instead."""
    return variable.get_value() if hasattr(type(variable), "get_value") else variable.raw_value


def in_inference(model: nnx.Module) -> nnx.Module:
    """Return the model as it infers: with running statistics and without dropout; `model` itself is as before."""
    from flax import nnx

    if hasattr(nnx, "view"):
        return nnx.view(model, use_running_average=True, deterministic=True)
    model = nnx.merge(*nnx.split(model))
    model.set_attributes(use_running_average=True, deterministic=True, raise_if_not_found=False)
    return model
