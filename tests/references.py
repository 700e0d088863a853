"""The PyTorch MobileNets of three libraries, with random weights, offline."""

from __future__ import annotations

import functools

import pytest

from bridge.libraries import import_library


@functools.cache
def torchvision():
    """torchvision, whose compiled operators may not load beside this PyTorch; MobileNets call none of them."""
    try:
        return import_library("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed: pip install 'jaxdw[models]'")


def _of_torchvision(name, classes, width):
    return getattr(torchvision().models, name)(num_classes=classes, width_mult=width)


def _of_timm(name, classes, width):
    torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'jaxdw[models]'")
    return timm.create_model(name, num_classes=classes)


def _of_transformers(name, classes, width):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `models`)")
    config = getattr(transformers, f"{name}Config")(num_labels=classes, depth_multiplier=width)
    return getattr(transformers, f"{name}ForImageClassification")(config)


#: What jaxdw calls them -> the library's own name and how to make one.
MODELS = {
    "torchvision.mobilenet_v2": (_of_torchvision, "mobilenet_v2"),
    "torchvision.mobilenet_v3_small": (_of_torchvision, "mobilenet_v3_small"),
    "torchvision.mobilenet_v3_large": (_of_torchvision, "mobilenet_v3_large"),
    "timm.mobilenet_v1": (_of_timm, "mobilenetv1_100"),
    "timm.mobilenet_v2": (_of_timm, "mobilenetv2_100"),
    "timm.mobilenet_v3_small": (_of_timm, "mobilenetv3_small_100"),
    "timm.mobilenet_v3_large": (_of_timm, "mobilenetv3_large_100"),
    "transformers.mobilenet_v1": (_of_transformers, "MobileNetV1"),
    "transformers.mobilenet_v2": (_of_transformers, "MobileNetV2"),
}


def reference(name, *, classes=10, width=1.0, seed=0):
    """A model in eval mode whose every parameter and statistic is random, none 0 or 1 throughout."""
    import torch

    make, own = MODELS[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = make(own, classes, width).eval()
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor_name.endswith("num_batches_tracked"):
                tensor.random_(1, 1000)
            elif tensor.ndim == 1:
                tensor.uniform_(-1, 1)
    return model


#: Classes of the models of `pair`.
CLASSES = 7


def pair(name, seed, width=1.0):
    """A PyTorch model, its Flax twin and the manifest."""
    from flax import nnx

    import jaxdw
    from bridge import to_flax

    library, network = name.split(".")
    theirs = reference(name, classes=CLASSES, width=width, seed=seed)
    options = {} if library == "timm" else {"width": width}
    ours = nnx.eval_shape(lambda: getattr(jaxdw.models, network)(CLASSES, like=library, rngs=nnx.Rngs(0), **options))
    converted = to_flax(theirs, ours)
    nnx.update(ours, converted.weights)
    return theirs, ours, converted.manifest
