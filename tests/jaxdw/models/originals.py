"""The PyTorch MobileNets, with what makes the equal network here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests import references

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'jaxdw[bridge]'")


@dataclasses.dataclass(frozen=True)
class Original:
    """A network of another library.

    Attributes:
      make: the network in PyTorch, of a number of classes.
      features: of that network and images, the features before they are pooled.
      name: the function in `jaxdw.models`.
      options: its arguments.
    """

    make: Callable[[int], torch.nn.Module]
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    name: str
    options: dict[str, Any]


def torchvision(name: str, *, width: float = 1.0, **options: Any) -> Original:
    def make(num_classes: int) -> torch.nn.Module:
        others = {"dilated": True} if options.get("output_stride") == 16 else {}
        if "reduced_tail" in options:
            others["reduced_tail"] = options["reduced_tail"]
        return getattr(references.torchvision().models, name)(num_classes=num_classes, width_mult=width, **others)

    return Original(make, lambda net, x: net.features(x), name, {"like": "torchvision", "width": width, **options})


def timm(pretrained_name: str, name: str, **options: Any) -> Original:
    def make(num_classes: int) -> torch.nn.Module:
        references.torchvision()  # timm imports it
        module = pytest.importorskip("timm", reason="timm is not installed: pip install 'jaxdw[models]'")
        stride = {"output_stride": options["output_stride"]} if "output_stride" in options else {}
        return module.create_model(pretrained_name, num_classes=num_classes, **stride)

    return Original(make, lambda net, x: net.forward_features(x), name, {"like": "timm", **options})


def transformers(name: str, *, width: float = 1.0, **options: Any) -> Original:
    def make(num_classes: int) -> torch.nn.Module:
        references.torchvision()  # transformers imports it where it is installed
        reason = "transformers is not installed: pip install 'jaxdw[models]'"
        module = pytest.importorskip("transformers", reason=reason)
        family = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2"}[name]
        others = {"tf_padding": options.get("padding", "SAME") == "SAME"}
        others |= {key: options[key] for key in ("output_stride", "finegrained_output") if key in options}
        config = getattr(module, f"{family}Config")(depth_multiplier=width, num_labels=num_classes, **others)
        return getattr(module, f"{family}ForImageClassification")(config)

    return Original(
        make,
        lambda net, x: net.base_model(x).last_hidden_state,
        name,
        {"like": "transformers", "width": width, **options},
    )


ORIGINALS = {
    "torchvision mobilenet_v2": torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "torchvision mobilenet_v3_large": torchvision("mobilenet_v3_large"),
    "timm mobilenetv1_100": timm("mobilenetv1_100", "mobilenet_v1"),
    "timm mobilenetv2_100": timm("mobilenetv2_100", "mobilenet_v2"),
    "timm mobilenetv3_large_100": timm("mobilenetv3_large_100", "mobilenet_v3_large"),
    "transformers MobileNetV1": transformers("mobilenet_v1"),
    "transformers MobileNetV2": transformers("mobilenet_v2"),
}

VARIANTS = {
    **{f"torchvision mobilenet_v2 {w}": torchvision("mobilenet_v2", width=w) for w in (0.25, 0.35, 0.5, 0.75, 1.4)},
    **{
        f"torchvision {name} {w}{' reduced' * reduced}{f' at {stride}' * (stride < 32)}": torchvision(
            name, width=w, reduced_tail=reduced, output_stride=stride
        )
        for name in ("mobilenet_v3_small", "mobilenet_v3_large")
        for w, reduced, stride in ((0.35, False, 32), (0.75, True, 32), (1.4, False, 16), (1.0, True, 16))
    },
    "timm mobilenetv1_100 at 8": timm("mobilenetv1_100", "mobilenet_v1", output_stride=8),
    "timm mobilenetv1_125": timm("mobilenetv1_125", "mobilenet_v1", width=1.25),
    "timm mobilenetv2_035": timm("mobilenetv2_035", "mobilenet_v2", width=0.35),
    "timm mobilenetv2_050 at 16": timm("mobilenetv2_050", "mobilenet_v2", width=0.5, output_stride=16),
    "timm mobilenetv2_140": timm("mobilenetv2_140", "mobilenet_v2", width=1.4),
    "timm mobilenetv3_small_050": timm("mobilenetv3_small_050", "mobilenet_v3_small", width=0.5),
    "timm mobilenetv3_small_075": timm("mobilenetv3_small_075", "mobilenet_v3_small", width=0.75),
    "timm mobilenetv3_large_075": timm("mobilenetv3_large_075", "mobilenet_v3_large", width=0.75),
    "timm tf_mobilenetv3_small_100": timm(
        "tf_mobilenetv3_small_100", "mobilenet_v3_small", padding="SAME", bn_epsilon=1e-3
    ),
    "transformers MobileNetV1 0.25": transformers("mobilenet_v1", width=0.25),
    "transformers MobileNetV1 0.75, PyTorch's padding": transformers("mobilenet_v1", width=0.75, padding="SYMMETRIC"),
    "transformers MobileNetV2 0.25": transformers("mobilenet_v2", width=0.25),
    "transformers MobileNetV2 0.35 at 16": transformers("mobilenet_v2", width=0.35, output_stride=16),
    "transformers MobileNetV2 0.5, coarse": transformers("mobilenet_v2", width=0.5, finegrained_output=False),
    "transformers MobileNetV2 1.4 at 8, PyTorch's padding": transformers(
        "mobilenet_v2", width=1.4, output_stride=8, padding="SYMMETRIC"
    ),
}


def with_random_values(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model in float64, with every parameter and statistic drawn: nothing hides behind 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    model.double().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for parameter, low, high in (
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 1.5),
            ):
                parameter.uniform_(low, high, generator=generator)
        elif isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            fan_in = layer.weight[0].numel()
            layer.weight.normal_(0, fan_in**-0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1, generator=generator)
    return model
