"""Read and write checkpoints of Flax in Orbax's format; they are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from bridge.files import atomic_folder, check_tree
from bridge.weights.trees import ParameterTree, nested


def write_orbax(path: Path, leaves: Mapping[str, np.ndarray], track: Callable[[Iterable], Iterable] = iter) -> None:
    """Write an Orbax checkpoint: nested dictionaries of NumPy arrays, as `nnx.to_pure_dict` gives them.

    `orbax.checkpoint.StandardCheckpointer().restore(path)` reads it.

    Args:
      path: the folder.
      leaves: arrays by dotted path.
      track: wraps the loop over tensors, for a progress bar.

    Raises:
      ValueError: an array without elements, which Orbax cannot save.
      OSError: the folder could not be written; nothing of it stays.
    """
    import orbax.checkpoint

    if empty := [name for name, leaf in leaves.items() if leaf.size == 0]:
        raise ValueError(f"Orbax saves no arrays without elements: {', '.join(empty)}; write safetensors instead")
    with atomic_folder(path) as folder, orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "tree", nested(dict(track(leaves.items()))))
        checkpointer.wait_until_finished()
        for part in (folder / "tree").iterdir():
            part.rename(folder / part.name)
        (folder / "tree").rmdir()


def is_orbax(path: Path) -> bool:
    return (path / "_METADATA").is_file()


def read_orbax(path: Path) -> dict[str, np.ndarray]:
    """Read an Orbax checkpoint of parameters, or of an `nnx.State`, as NumPy arrays by dotted path.

    Raises:
      ValueError: the folder is no Orbax checkpoint, or a damaged one.
    """
    import orbax.checkpoint

    check_tree(path)
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        try:
            structure = checkpointer.metadata(path.absolute()).item_metadata
            arguments = _map(structure.tree, lambda _: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray))
            tree = checkpointer.restore(path.absolute(), restore_args=arguments)
        except Exception as error:  # Orbax and tensorstore raise almost anything on a damaged folder
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path} is no whole Orbax checkpoint: {reason}") from None
    return {name.removesuffix(".value"): leaf for name, leaf in ParameterTree.of(tree).leaves.items()}


def _map(tree, leaf):
    return {key: _map(value, leaf) for key, value in tree.items()} if isinstance(tree, Mapping) else leaf(tree)
