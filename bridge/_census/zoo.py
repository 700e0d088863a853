"""Models by name, as `timm:mobilenetv3_large_100`: with random weights or their own, and an input for them."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from bridge._implementations.torch_ import to_tensor
from bridge.files import check_tree
from bridge.libraries import import_library, users_module, with_torchvision
from bridge.memory import check_fits
from bridge.torch_models import seeded
from bridge.weights.read import load_weights, tensors_of

#: The default side of an image.
SIZE = 224

#: Libraries of named models, each with its module that lists and makes them.
LIBRARIES = {"timm": "timm", "torchvision": "torchvision.models"}

_KINDS = "timm:NAME, torchvision:NAME, transformers:FOLDER or package.module:factory"


class ModelAndInputs(NamedTuple):
    """A model and its inputs, as `bridge.census` takes them."""

    module: Any
    inputs: Any


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the models' full names, each once: a glob such as `timm:efficientnet*` becomes all names that match it.

    Raises:
      ValueError: an unknown name, with close ones; a glob that matches nothing; a library that cannot be imported.

    >>> expand(["examples.models:tiny"])
    ['examples.models:tiny']
    """
    return list(dict.fromkeys(name for pattern in patterns for name in _expand(pattern)))


def make(
    name: str, *, size: int | None, batch: int, seed: int, pretrained: bool = False, weights: Path | None = None
) -> ModelAndInputs:
    """Make a model in eval mode with random weights, and a random input.

    Args:
      name: one of `expand`'s.
      size: the side of the image; None: 224, or the only size that a timm model takes.
      batch: the number of inputs at once.
      seed: of weights and input. A factory's own weights are kept.
      pretrained: let the library load the model's published weights, which may need a connection.
      weights: a checkpoint to load, as `bridge.load_weights` reads it; every tensor must have its place.

    Raises:
      ValueError: the model cannot be made or the weights do not fit; the message says why.
    """
    rng = np.random.default_rng(seed)
    source, _, own = name.partition(":")
    with seeded(seed):
        if source in LIBRARIES:
            module = _of_library(source, own, pretrained)
        elif source == "transformers":
            module, loaded = _of_transformers(own, pretrained)
            pretrained = pretrained or loaded
        else:
            made = _of_factory(name)
            if isinstance(made, ModelAndInputs):
                if weights is not None:
                    set_weights(made.module, load_weights(weights), weights)
                return made
            module, pretrained = made, True
    if weights is not None:
        set_weights(module, load_weights(weights), weights)
    elif not pretrained:
        draw_weights(module, rng)
    return ModelAndInputs(module.eval(), _inputs(module, name, size, batch, rng))


def draw_weights(module: Any, rng: np.random.Generator) -> None:
    """Replace a model's weights by random ones, so that nothing hides behind 0 and 1.

    Kernels and matrices are normal with variance 2 / fan-in, which keeps the size of activations through ReLU (He et
    al., 2015); biases, scales and other vectors are uniform in [-1, 1], variances in [1/2, 2].
    """
    for tensor in module.parameters():
        shape = tuple(tensor.shape)
        drawn = rng.uniform(-1, 1, shape)
        if len(shape) > 1 and math.prod(shape[1:]) > 0:
            drawn = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        _set(tensor, drawn)
    for name, tensor in module.named_buffers():
        if name.endswith("running_mean"):
            _set(tensor, rng.uniform(-1, 1, tuple(tensor.shape)))
        elif name.endswith("running_var"):
            _set(tensor, rng.uniform(0.5, 2, tuple(tensor.shape)))


def set_weights(module: Any, arrays: Mapping[str, np.ndarray], source: Path | None) -> None:
    """Put arrays into a model, all of them and no others.

    Args:
      module: an `nn.Module`.
      arrays: as `load_weights` gives them.
      source: their file, for the error.

    Raises:
      ValueError: names or shapes that do not fit.
    """
    try:
        module.load_state_dict(tensors_of(arrays), strict=True)
    except RuntimeError as error:
        raise ValueError(f"`weights` is {source}, which does not fit {type(module).__name__}: {error}") from None


def model_library(asked: str, library: str) -> ModuleType:
    """Import timm, torchvision's models or transformers.

    Args:
      asked: the argument that needs it and its value, for the error.
      library: its name.

    Raises:
      ValueError: it cannot be imported.
    """
    try:
        return import_library(LIBRARIES.get(library, library))
    except Exception as error:  # of any kind: a library runs code when it is imported
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{asked}, and {library} cannot be imported here: {reason}. Likely causes: (a) it is not installed: "
            "pip install 'jaxdw[models]'; (b) torchvision was built for another build of PyTorch than the one installed"
        ) from error


def _set(tensor: Any, drawn: np.ndarray) -> None:
    if tensor.is_floating_point():
        tensor.detach().copy_(to_tensor(drawn))


def _expand(pattern: str) -> Iterator[str]:
    source, colon, name = pattern.partition(":")
    if not colon or not source or not name:
        raise ValueError(f"`model` is {pattern!r}, expected {_KINDS}")
    if source == "transformers" or source not in LIBRARIES:
        yield pattern
        return
    known = sorted(model_library(f"`model` is {pattern}", source).list_models())
    if any(sign in name for sign in "*?["):
        found = fnmatch.filter(known, name)
        if not found:
            raise ValueError(f"`model` is {pattern!r}, and none of the {len(known)} models of {source} matches it")
        yield from (f"{source}:{each}" for each in found)
    elif name.partition(".")[0] in known:  # the part after the dot names weights, as in timm's resnet18.a1_in1k
        yield pattern
    else:
        raise ValueError(f"`model` is {pattern!r}, and {source} has no such model{_meant(name, known)}")


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _of_library(source: str, name: str, pretrained: bool) -> Any:
    library = model_library(f"`model` is {source}:{name}", source)
    if source == "timm":
        return library.create_model(name, pretrained=pretrained)
    options = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in inspect.signature(library.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # whose default is to download
    return library.get_model(name, **options)


def _of_transformers(name: str, pretrained: bool) -> tuple[Any, bool]:
    """Return the model, and whether it has weights of its own. A folder is read without a connection."""
    folder = Path(name)
    if not pretrained and not (folder / "config.json").is_file():
        raise ValueError(
            f"`model` is 'transformers:{name}', expected a folder with a config.json; "
            "a name on the Hugging Face Hub needs --pretrained"
        )
    if folder.is_dir():
        check_tree(folder)
    transformers = model_library(f"`model` is transformers:{name}", "transformers")
    if pretrained or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        kept = {"local_files_only": not pretrained, "trust_remote_code": False}
        return transformers.AutoModel.from_pretrained(name, **kept), True
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    return transformers.AutoModel.from_config(config, trust_remote_code=False), False


def _of_factory(name: str) -> Any:
    """Call a user's function, and return its module, or its module and inputs."""
    source, _, attribute = name.partition(":")
    try:
        module = users_module("model", name)
    except ValueError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise ValueError(f"{error}; expected {_KINDS}{_meant(source, [*LIBRARIES, 'transformers'])}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [each for each, value in vars(module).items() if callable(value)]
        raise ValueError(f"`model` is {name!r}, and {source} has no function {attribute!r}{_meant(attribute, known)}")
    made = with_torchvision(factory) if not _is_module(factory) else factory
    parts = made if isinstance(made, tuple) else (made,)
    if len(parts) > 2 or not _is_module(parts[0]):
        raise ValueError(
            f"`model` is {name!r}, which returned a {type(parts[0]).__name__}, "
            "expected a torch.nn.Module, or one and its inputs"
        )
    return ModelAndInputs(*parts) if len(parts) == 2 else made


def _drawn(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    check_fits(f"an input of {shape}", 2 * 4 * math.prod(shape))
    return rng.standard_normal(shape, np.float32)


def _is_module(value: Any) -> bool:
    return callable(getattr(value, "named_modules", None)) and callable(getattr(value, "state_dict", None))


def _inputs(module: Any, name: str, size: int | None, batch: int, rng: np.random.Generator) -> Any:
    """Draw a random input: an image, or the main input that a model of transformers names."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) is None:
        channels, side = _image(getattr(module, "default_cfg", None) or {}, size)
        return _drawn((batch, channels, side, side), rng)
    kind = module.main_input_name
    if kind == "pixel_values":
        side = size or getattr(config, "image_size", None) or SIZE
        sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        return {kind: _drawn((batch, getattr(config, "num_channels", 3), *sides), rng)}
    if kind == "input_values":  # one second of sound
        return {kind: rng.standard_normal((batch, 16_000), np.float32)}
    if kind == "input_ids":
        return {kind: rng.integers(0, config.vocab_size, (batch, 64))}
    raise ValueError(
        f"`model` is {name!r}, which takes {kind}, expected pixel_values, input_values or input_ids: "
        "write a function that returns the model and its inputs, and name it as package.module:function"
    )


def _image(about: Mapping[str, Any], size: int | None) -> tuple[int, int]:
    """Return channels and side of an image, from timm's configuration of the model."""
    channels, side, _ = about.get("input_size", (3, SIZE, SIZE))
    return channels, size or (side if about.get("fixed_input_size") else SIZE)
