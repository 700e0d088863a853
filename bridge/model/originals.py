"""The PyTorch originals of the MobileNets in `jaxdw.models`, with weights, and an image for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bridge._census.zoo import SIZE, draw_weights, model_library, set_weights
from bridge.files import open_regular, read_npy
from bridge.memory import check_fits
from bridge.weights.architectures import ARCHITECTURES, Architecture
from bridge.weights.convert import to_flax
from bridge.weights.manifest import WeightsManifest
from bridge.weights.read import load_weights
from bridge.weights.rule_lookup import choose_rules
from bridge.weights.trees import ParameterTree, empty_model

#: Mean and deviation per channel of ImageNet's images in the range 0 to 1, for which torchvision and timm train.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

#: Formats of images that are read. For some others, such as EPS, Pillow starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

#: timm's names, to which the width in hundredths is appended.
_TIMM = {
    "mobilenet_v1": "mobilenetv1",
    "mobilenet_v2": "mobilenetv2",
    "mobilenet_v3_small": "mobilenetv3_small",
    "mobilenet_v3_large": "mobilenetv3_large",
}
_TRANSFORMERS = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2"}


def architecture_of(name: str, weights: Mapping[str, np.ndarray] | None = None) -> Architecture:
    """Return the architecture of a name: "timm.mobilenet_v2", or "mobilenet_v2" of the library that the weights tell.

    Without weights that is torchvision's network, or timm's where torchvision has none.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = [each for each in ARCHITECTURES.values() if each.model == name]
    if not known:
        networks = dict.fromkeys(each.model for each in ARCHITECTURES.values())
        raise ValueError(f"`network` is {name!r}, expected one of {', '.join((*networks, *ARCHITECTURES))}")
    if weights is not None:
        return ARCHITECTURES[choose_rules(name, list(weights), ParameterTree.of({}))[0]]
    return known[0]


def original(architecture: Architecture, classes: int, width: float = 1.0) -> Any:
    """Make the PyTorch model with the library's own random weights, in eval mode.

    Raises:
      ValueError: the library cannot be imported, or has no such width.
    """
    library = architecture.library
    module = model_library(f"`network` is {architecture.name}", library)
    if library == "torchvision":
        return getattr(module, architecture.model)(num_classes=classes, width_mult=width).eval()
    if library == "transformers":
        family = _TRANSFORMERS[architecture.model]
        config = getattr(module, f"{family}Config")(num_labels=classes, depth_multiplier=width)
        return getattr(module, f"{family}ForImageClassification")(config).eval()
    own = f"{_TIMM[architecture.model]}_{round(100 * width):03d}"
    try:
        return module.create_model(own, num_classes=classes).eval()
    except RuntimeError as error:
        raise ValueError(f"`width` is {width}, and timm has no {own}: {error}") from None


class Pair(NamedTuple):
    """A PyTorch model, its Flax twin with the same weights, and the manifest of their conversion."""

    name: str
    module: Any
    model: Any
    manifest: WeightsManifest


def compared_pair(network: str, *, weights: Path | None = None, seed: int = 0, width: float = 1.0) -> Pair:
    """Make both models of a network in eval mode.

    Args:
      network: as for `architecture_of`.
      weights: a checkpoint of PyTorch, which also says the number of classes; every tensor must have its place. None:
        random weights and statistics, so that nothing hides behind 0 and 1.
      seed: of random weights.
      width: multiplier.

    Raises:
      ValueError: an unknown network, a library that is missing, weights that do not fit.
    """
    from flax import nnx

    arrays = None if weights is None else load_weights(weights)
    architecture = architecture_of(network, arrays)
    classes = 1000 if arrays is None else _classes(architecture, arrays, weights)
    module = original(architecture, classes, width)
    if arrays is None:
        draw_weights(module, np.random.default_rng(seed))
    else:
        set_weights(module, arrays, weights)
    model = empty_model(architecture.model, architecture.library, num_classes=classes, width=width)
    converted = to_flax(module, model, architecture.name)
    nnx.update(model, converted.weights)
    name = architecture.name if width == 1 else f"{architecture.name}, width {width:g}"
    return Pair(name, module, model, converted.manifest)


def _classes(architecture: Architecture, weights: Mapping[str, np.ndarray], path: Path | None) -> int:
    """Return the number of classes of the classifier that the weights have."""
    name = next(f"{rule.torch}.weight" for rule in architecture.rules() if rule.flax == "classifier")
    if name not in weights:
        raise ValueError(f"`weights` is {path}, which has no {name}, expected weights of {architecture.name}")
    return weights[name].shape[0]


def random_images(size: int, seed: int, batch: int = 1) -> np.ndarray:
    """Draw images of normalized noise, `(batch, size, size, 3)`."""
    check_fits(f"{batch} images of {size}x{size}", 2 * 4 * batch * size * size * 3)
    return np.random.default_rng((seed, 1)).standard_normal((batch, size, size, 3), np.float32)


def read_image(path: Path, size: int = SIZE) -> np.ndarray:
    """Read an image as a model takes it: `(N, H, W, 3)`, float32.

    A `.npy` of floats `(H, W, 3)` or `(N, H, W, 3)` is taken as it is. Any other image is treated as torchvision treats
    images for its weights: the shorter side is scaled to size * 256 / 224, the middle is cut out, values are divided by
    255, `MEAN` is subtracted, and the result is divided by `DEVIATION`. A `.npy` of bytes is neither scaled nor cut.

    Raises:
      ValueError: a file that is no image, or one that needs Pillow where it is not installed.
      OSError: no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"`image` is {path}, expected a file: it does not exist")
    if path.suffix != ".npy":
        return _normalized(_scaled(path, size))[None]
    try:
        array = read_npy(path)
    except ValueError as error:
        raise ValueError(f"`image` is {path}, expected an .npy file of numbers: {error}") from None
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"`image` is {path} of shape {array.shape}, expected (H, W, 3) or (N, H, W, 3)")
    if array.dtype == np.uint8:
        array = _normalized(array)
    elif not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"`image` is {path} of {array.dtype}, expected floats, or uint8 to be normalized")
    return np.ascontiguousarray(array.reshape(-1, *array.shape[-3:]), np.float32)


def _scaled(path: Path, size: int) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError(
            f"`image` is {path}, which needs Pillow: pip install pillow; or give an .npy of (H, W, 3)"
        ) from None
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as opened:
            image = opened.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"`image` is {path}, expected an .npy file or one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise ValueError(f"`image` is {path}, which is damaged: {error}") from None
    shorter = int(size * 256 / 224)
    width, height = image.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    if math.prod(scaled) > (most := Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"`image` is {path} of {width}x{height}, which is {scaled[0]}x{scaled[1]} where its shorter side is "
            f"{shorter}, expected at most {most} pixels"
        )
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _normalized(image: np.ndarray) -> np.ndarray:
    return (image.astype(np.float32) / 255 - MEAN) / DEVIATION
