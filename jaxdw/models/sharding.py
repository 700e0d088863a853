"""Models whose depthwise convolutions are sharded over a mesh of devices."""

from __future__ import annotations

from typing import TypeVar

from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxdw.models import dense
from jaxdw.nnx import DepthwiseConv
from jaxdw.sharding import Over

Model = TypeVar("Model")


def shard_layers(model: Model, spec: PartitionSpec, mesh: Mesh | AbstractMesh | None = None) -> Model:
    """Shard every `jaxdw.nnx.DepthwiseConv` in a Flax NNX model by `spec`, in place.

    Use it for images that are sharded over automatic mesh axes. The stem of a `jaxdw.models` model becomes lax's own
    convolution, which the compiler partitions with halos of its own. The rest works position by position.

    Args:
      model: a `flax.nnx.Module`.
      spec, mesh: as for `jaxdw.sharding.depthwise_conv`.

    Returns:
      The same object.

    Raises:
      TypeError: model is something else.
    """
    if not isinstance(model, nnx.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"`model` is {kind}, expected a flax.nnx.Module")
    for _, module in nnx.iter_modules(model):
        if isinstance(module, DepthwiseConv):
            module.depthwise_conv = Over(spec, mesh)
        elif isinstance(module, nnx.Conv) and module.conv_general_dilated is dense.conv_general_dilated:
            module.conv_general_dilated = lax.conv_general_dilated
    return model
