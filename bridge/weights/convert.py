"""Convert weights from PyTorch's names and layouts to Flax's, and back, with a manifest of every tensor."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bridge.weights.architectures import ARCHITECTURES, looks_like
from bridge.weights.hints import hints
from bridge.weights.layer_settings import differences, live_layers
from bridge.weights.layouts import LAYOUTS, PART, SAME
from bridge.weights.manifest import Form, Kept, Moved, WeightsManifest
from bridge.weights.mismatch import Misfits
from bridge.weights.names import unwrapped
from bridge.weights.read import load_weights, native, prepared, tensors_of
from bridge.weights.rule_lookup import Rules, choose_rules, covering, named_rules
from bridge.weights.rules import Place, Rule, RuleBook
from bridge.weights.trees import ParameterTree


class Converted(NamedTuple):
    """Weights in the other framework's form, and the manifest."""

    weights: Any
    manifest: WeightsManifest


def to_flax(
    weights: Any,
    target: Any,
    rules: Rules | None = None,
    *,
    automatic: bool = True,
    prefix: str | None = None,
    merge: bool = False,
    settings: bool = True,
) -> Converted:
    """Convert weights of PyTorch to the form of a Flax model; every tensor of both frameworks is accounted for.

    Args:
      weights: what `load_weights` returns or takes.
      target: an `nnx.Module` (with values or from `nnx.eval_shape`), an `nnx.State`, Linen variables, or a nested
        dictionary; only its structure and shapes are read.
      rules: an architecture's name, a network's ("mobilenet_v2"), or a sequence of `Rule`. None: for a MobileNet of
        `jaxdw.models` its rules, of the library that the names show; for another `nnx.Module`, equal names in both
        frameworks, the kinds of its layers, and its bare parameters as they are.
      automatic: add the rules that None would choose after a sequence of rules; False: the sequence alone.
      prefix, merge: as for `load_weights`.
      settings: for a live model, also compare what no checkpoint holds: eps and momentum; stride, padding, dilation
        and groups. Use False where the model itself pads before a layer.

    Returns:
      `(weights, manifest)`: the weights as the target is - an `nnx.State` of JAX arrays for `nnx.update(model, ...)`,
      or nested dictionaries of NumPy arrays - with the checkpoint's dtypes, bit for bit.

    Raises:
      WeightsMismatch: names, shapes or settings that do not fit; one message with all of them.
      ValueError: rules that are unknown; or 64-bit weights for an NNX target where JAX would narrow them.

    >>> import numpy as np
    >>> weights = {"weight": np.zeros((8, 1, 3, 3), np.float32)}
    >>> variables = {"params": {"kernel": np.zeros((3, 3, 1, 8), np.float32)}}
    >>> converted = to_flax(weights, variables, [Rule("", "", "conv")])
    >>> converted.weights["params"]["kernel"].shape, converted.manifest.moved[0].layout
    ((3, 3, 1, 8), 'OI* -> *IO')
    """
    source = weights
    if not _are_arrays(weights):
        weights = load_weights(weights, prefix=prefix, merge=merge)
    else:
        weights = {name: native(name, array) for name, array in weights.items()}
        weights = unwrapped(weights) if prefix is None and not merge else prepared(weights, prefix, merge)
    tree = ParameterTree.of(target)
    label, book = choose_rules(rules, list(weights), tree, automatic)
    weights = _in_parts(weights, book)
    misfits, places = _match({name: book.from_torch(name) for name in weights}, "flax")
    wanted = {flax: tuple(leaf.shape) for flax, leaf in tree.leaves.items()}
    for flax, place in places.items():
        given = weights[place.torch].shape
        if flax not in wanted:
            misfits.unplaced.append(place)
        elif place.layout.flax_shape(given) != wanted[flax]:
            misfits.shapes.append((place, given, wanted[flax]))
    told = misfits.named()
    for flax in wanted:
        if flax not in places and flax not in told:
            misfits.missing[flax] = wanted[flax], next((place.torch for place in book.from_flax(flax)), None)
    if settings:
        pads = "transformers." in label  # its models pad as TensorFlow does, before the convolution
        misfits.settings += differences(live_layers(source, prefix), tree.layers, book, padded_before=pads)
    if misfits:
        if misfits.settings and label in ARCHITECTURES:
            misfits.hints.append(f"other conventions: build the target with `like={ARCHITECTURES[label].library!r}`")
        misfits.hints += hints(misfits, weights, tree)
        looks = looks_like(list(weights))
        misfits.throw(label, looks if looks != label else None, list(weights), book)

    arrays = {flax: np.asarray(p.layout.to_flax(weights[p.torch]), order="C") for flax, p in places.items()}
    moved = [_moved(place, weights[place.torch], arrays[flax]) for flax, place in places.items()]
    placed = {place.torch for place in places.values()}
    kept = [Kept.of(name, array) for name, array in weights.items() if name not in placed]
    return Converted(tree.build(arrays), WeightsManifest(rules=label, moved=moved, kept=kept))


def to_torch(tree: Any, by: WeightsManifest | Rules, *, tensors: bool = False) -> Converted:
    """Convert weights of Flax to PyTorch's form; every tensor is accounted for.

    Args:
      tree: an `nnx.Module`, an `nnx.State`, Linen variables, or a nested dictionary of arrays.
      by: the manifest of `to_flax`, which also holds the tensors for which Flax has no place; or an architecture's full
        name, as "torchvision.mobilenet_v2"; or a sequence of `Rule`. Without a manifest `num_batches_tracked` is 0.
      tensors: return `torch.Tensor`s instead of NumPy arrays.

    Returns:
      `(weights, manifest)`: a state_dict, and the manifest of this conversion.

    Raises:
      WeightsMismatch: names or shapes that do not fit; one message with all of them.

    >>> import numpy as np
    >>> kernel = np.zeros((3, 3, 1, 8), np.float32)
    >>> to_torch({"stem": {"kernel": kernel}}, [Rule("conv1", "stem", "conv")]).weights["conv1.weight"].shape
    (8, 1, 3, 3)
    """
    leaves = {name: _values(name, leaf) for name, leaf in ParameterTree.of(tree).leaves.items()}
    if isinstance(by, WeightsManifest):
        label, rules, book = f"those of the manifest, {by.rules}", by.rules, RuleBook(())
        recorded = _places_of(by)
        found = {name: recorded.get(name, []) for name in leaves}
        kept = {record.torch.name: record.array() for record in by.kept}
    else:
        rules, book = named_rules(by, leaves)
        label, recorded = rules, {}
        found = {name: book.from_flax(name) for name in leaves}
        kept = {name: np.zeros((), np.int64) for name in book.kept(leaves)}
    misfits, places = _match(found, "torch")
    for flax in recorded.keys() - leaves.keys():
        misfits.absent.append(f"{flax}, for {recorded[flax][0].torch}")
    for place in places.values():
        shape = leaves[str(place.flax)].shape
        if not place.layout.fits_flax(shape):
            misfits.misshapen.append(f"{place.flax} {shape} ({place.layout.name})")
    if misfits:
        books = {name: RuleBook(architecture.rules(leaves)) for name, architecture in ARCHITECTURES.items()}
        misfits.throw(label, " or ".join(covering(leaves, books)) or None, list(leaves), book)

    arrays = {name: np.asarray(p.layout.to_torch(leaves[str(p.flax)]), order="C") for name, p in places.items()}
    moved = [_moved(place, arrays[name], leaves[str(place.flax)]) for name, place in places.items()]
    manifest = WeightsManifest(rules=rules, moved=moved, kept=[Kept.of(name, array) for name, array in kept.items()])
    state = _joined(arrays | kept)
    return Converted(tensors_of(state) if tensors else state, manifest)


def _match(found: Mapping[str, Sequence[Place]], side: Literal["torch", "flax"]) -> tuple[Misfits, dict[str, Place]]:
    """Match names with places in the framework `side`, one to one; every other name is a misfit.

    A name that has no place there, as `num_batches_tracked` in Flax, is left out.
    """
    misfits = Misfits()
    places: dict[str, Place] = {}
    taken = collections.defaultdict(list)
    for name, candidates in found.items():
        if not candidates:
            misfits.unexpected.append(name)
        elif len(candidates) > 1:
            misfits.ambiguous[name] = list(candidates)
        elif (other := getattr(candidates[0], side)) is not None:
            places[other] = candidates[0]
            taken[other].append(name)
    misfits.collisions |= {other: names for other, names in taken.items() if len(names) > 1}
    return misfits, places


def _in_parts(weights: Mapping[str, np.ndarray], book: RuleBook) -> dict[str, np.ndarray]:
    """Cut the tensors of which the rules take parts, as `attn.in_proj_weight[0/3]`."""
    found: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        is_whole = array.ndim == 0 or book.from_torch(name)
        counts = (n for n in range(2, 10) if not is_whole and array.shape[0] % n == 0)
        count = next((n for n in counts if book.from_torch(f"{name}[0/{n}]")), None)
        if count is None:
            found[name] = array
        else:
            found |= {f"{name}[{k}/{count}]": part for k, part in enumerate(np.split(array, count))}
    return found


def _joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return whole tensors: parts become the tensor that they were cut from."""
    parts: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
    for name, array in arrays.items():
        whole, part, place = name.partition("[") if re.search(f"{PART}$", name) else (name, "", "")
        parts[whole][int(place[0]) if part else 0] = array
    return {
        name: np.concatenate([some[k] for k in sorted(some)]) if len(some) > 1 else some[0]
        for name, some in parts.items()
    }


def _are_arrays(weights: Any) -> bool:
    return isinstance(weights, Mapping) and all(isinstance(array, np.ndarray) for array in weights.values())


def _values(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "__array__"):
        raise TypeError(f"`tree` has a {type(leaf).__name__} at {name!r}, expected an array with values")
    return native(name, np.asarray(leaf))


def _moved(place: Place, torch: np.ndarray, flax: np.ndarray) -> Moved:
    form, name = Form.of(place.torch, torch), str(place.flax)
    same = form.model_copy(update={"name": name})
    return Moved(
        dtype=torch.dtype.name,
        layout=place.layout.name,
        torch=form,
        flax=same if place.layout is SAME else Form.of(name, flax),
    )


def _places_of(manifest: WeightsManifest) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {}
    for record in manifest.moved:
        if record.layout not in LAYOUTS:
            raise ValueError(f"the manifest has a layout {record.layout!r}, expected one of {', '.join(LAYOUTS)}")
        rule = Rule(record.torch.name, record.flax.name, "array")
        place = Place(record.torch.name, record.flax.name, LAYOUTS[record.layout], rule)
        places.setdefault(record.flax.name, []).append(place)
    return places
