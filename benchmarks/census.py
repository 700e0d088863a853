"""The census of 40 models of different families, 1 image of 224x224 each, random weights. Resumable; about 20 minutes.

python benchmarks/census.py [--out census.jsonl] [any other option of `jaxdw census`]
"""

from __future__ import annotations

import sys

from bridge import cli

_TORCHVISION = """
    mobilenet_v2 mobilenet_v3_small convnext_tiny shufflenet_v2_x1_0 maxvit_t
"""
_TIMM = """
    mobilenetv1_100 mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small
    mobilenetv4_hybrid_medium efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 mixnet_s tf_mixnet_m
    ghostnet_100 ghostnetv2_100 repghostnet_050 mobileone_s0 repvit_m0_9 convnext_atto inception_next_atto
    convformer_s18 edgenext_xx_small fastvit_t8 efficientvit_b0 efficientvit_m0 efficientformerv2_s0 mobilevit_xs
    coatnet_nano_rw_224 coat_lite_tiny xcit_nano_12_p16_224 mvitv2_tiny davit_tiny mambaout_femto fbnetc_100
    rexnet_100 xception41 starnet_s1 cpubone_nano
"""
MODELS = (*(f"torchvision:{name}" for name in _TORCHVISION.split()), *(f"timm:{name}" for name in _TIMM.split()))


def main() -> None:
    sys.argv = ["jaxdw", "census", *MODELS, *sys.argv[1:]]
    cli.run()


if __name__ == "__main__":
    main()
