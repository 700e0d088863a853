"""The census of 40 models of different families, 1 image of 224x224 each, random weights. Resumable; about 20 minutes.

python benchmarks/census.py [--out census.jsonl] [any other option of `jaxdw census`]
"""

from __future__ import annotations

import sys

from bridge import cli

MODELS = (
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:convnext_tiny",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:maxvit_t",
    "timm:mobilenetv1_100",
    "timm:mobilenetv3_large_100",
    "timm:tf_mobilenetv3_small_minimal_100",
    "timm:mobilenetv4_conv_small",
    "timm:mobilenetv4_hybrid_medium",
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_b0",
    "timm:tf_efficientnetv2_b0",
    "timm:mixnet_s",
    "timm:tf_mixnet_m",
    "timm:ghostnet_100",
    "timm:ghostnetv2_100",
    "timm:repghostnet_050",
    "timm:mobileone_s0",
    "timm:repvit_m0_9",
    "timm:convnext_atto",
    "timm:inception_next_atto",
    "timm:convformer_s18",
    "timm:edgenext_xx_small",
    "timm:fastvit_t8",
    "timm:efficientvit_b0",
    "timm:efficientvit_m0",
    "timm:efficientformerv2_s0",
    "timm:mobilevit_xs",
    "timm:coatnet_nano_rw_224",
    "timm:coat_lite_tiny",
    "timm:xcit_nano_12_p16_224",
    "timm:mvitv2_tiny",
    "timm:davit_tiny",
    "timm:mambaout_femto",
    "timm:fbnetc_100",
    "timm:rexnet_100",
    "timm:xception41",
    "timm:starnet_s1",
    "timm:cpubone_nano",
)


def main() -> None:
    sys.argv = ["jaxdw", "census", *MODELS, *sys.argv[1:]]
    cli.run()


if __name__ == "__main__":
    main()
