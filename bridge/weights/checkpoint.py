"""Convert one checkpoint file into another, as `jaxdw convert` does."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.files import atomic_file, check_free
from bridge.weights.architectures import ARCHITECTURES
from bridge.weights.convert import to_flax, to_torch
from bridge.weights.manifest import WeightsManifest, manifest_path
from bridge.weights.orbax_ import is_orbax, read_orbax, write_orbax
from bridge.weights.read import load_weights
from bridge.weights.rule_lookup import choose_rules
from bridge.weights.rules import RuleBook
from bridge.weights.safetensors_ import write_safetensors
from bridge.weights.trees import ParameterTree, empty_model, nested


class Format(enum.StrEnum):
    """The form in which a checkpoint is written."""

    FLAX = "flax"
    TORCH = "torch"
    ORBAX = "orbax"


@dataclasses.dataclass(frozen=True)
class Written:
    """The written arrays by name, and the manifest where one framework's form was turned into the other's."""

    arrays: Mapping[str, np.ndarray]
    manifest: WeightsManifest | None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def convert_checkpoint(
    source: Path,
    destination: Path,
    *,
    to: Format | str = Format.FLAX,
    model: str | None = None,
    target: Any = None,
    width: float = 1.0,
    part: str | None = None,
    prefix: str | None = None,
    merge: bool = False,
    force: bool = False,
    track: Callable[[Iterable], Iterable] = iter,
) -> Written:
    """Read a checkpoint of either framework and write it for the other, with its manifest beside it.

    Args:
      source: what `load_weights` reads, or a checkpoint that this function wrote.
      destination: the file, or for Orbax the folder.
      to: "flax": safetensors with Flax's names and layouts; "orbax": the same as an Orbax checkpoint; "torch":
        safetensors with PyTorch's. A checkpoint that has this form already only changes its file format.
      model: the network or architecture, as `to_flax` takes it; None: the one that the names show.
      target: the Flax model that takes the weights, as `to_flax` takes it; then `model` may be rules.
      width: of the model of `jaxdw.models`.
      part, prefix, merge: as for `load_weights`.
      force: overwrite what exists.
      track: wraps the loop over tensors, for a progress bar.

    Raises:
      WeightsMismatch: the weights do not fit the model.
      ValueError, OSError: a file that cannot be read or written; nothing of the destination stays.
    """
    if to not in list(Format):
        raise ValueError(f"`to` is {to!r}, expected one of {', '.join(Format)}")
    for path in (destination, manifest_path(destination)):
        check_free(path, force)
    if destination.is_dir() and (to != Format.ORBAX or not (is_orbax(destination) or not any(destination.iterdir()))):
        raise FileExistsError(f"{destination} is a folder and no Orbax checkpoint: it is not overwritten")
    weights = read_orbax(source) if is_orbax(source) else load_weights(source, part=part, prefix=prefix, merge=merge)
    beside = manifest_path(source)
    manifest = WeightsManifest.read(beside) if beside.exists() else None
    is_flax = any(name.rpartition(".")[2] == "kernel" for name in weights)
    if target is not None and (is_flax or to == Format.TORCH):
        raise ValueError(
            f"`like` gives a Flax model, expected PyTorch's weights in {source} and `to` flax or orbax; the way back "
            "takes the manifest beside the file"
        )
    if is_flax and to == Format.TORCH:
        if manifest is None and model is None:
            raise ValueError(
                f"{source} has no manifest {beside.name} beside it, expected `model`: one of {', '.join(ARCHITECTURES)}"
            )
        weights, manifest = to_torch(nested(weights), manifest or str(model))
    elif not is_flax and to != Format.TORCH:
        if target is None:
            weights, manifest = _to_flax(weights, model, width)
        else:
            tree, manifest = to_flax(weights, target, model)
            weights = {name: np.asarray(leaf) for name, leaf in ParameterTree.of(tree).leaves.items()}
    with _manifest(manifest_path(destination), manifest):
        if to == Format.ORBAX:
            write_orbax(destination, weights, track)
        else:
            write_safetensors(destination, weights, {"format": "pt"} if to == Format.TORCH else {}, track)
    return Written(weights, manifest)


def _to_flax(weights: Mapping[str, np.ndarray], model: str | None, width: float) -> tuple[dict, WeightsManifest]:
    """Convert weights for a model of `jaxdw.models` with as many classes and input channels as the weights have."""
    label, book = choose_rules(model, list(weights), ParameterTree.of({}))
    architecture = ARCHITECTURES[label]
    options = {
        "num_classes": _size(weights, book, "classifier.kernel", 0, 0),
        "in_channels": _size(weights, book, "stem.conv.kernel", 1, 3),
    }
    target = empty_model(architecture.model, architecture.library, width=width, **options)
    # as dictionaries, since JAX would narrow 64 bits
    tree, manifest = to_flax(weights, nested(ParameterTree.of(target).leaves), label)
    return dict(ParameterTree.of(tree).leaves), manifest


def _size(weights: Mapping[str, np.ndarray], book: RuleBook, flax: str, axis: int, otherwise: int) -> int:
    for place in book.from_flax(flax):
        if place.torch in weights and weights[place.torch].ndim > axis:
            return weights[place.torch].shape[axis]
    return otherwise


@contextlib.contextmanager
def _manifest(path: Path, manifest: WeightsManifest | None) -> Iterator[None]:
    """Write the manifest together with what the block writes, or not at all."""
    if manifest is None:
        yield
        path.unlink(missing_ok=True)  # it belonged to the overwritten file
        return
    with atomic_file(path) as file:
        file.write(manifest.to_json().encode())
        file.flush()
        yield
