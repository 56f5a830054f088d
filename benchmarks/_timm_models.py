"""timm's models, one small one for each family that torchvision has not, as torch modules with random weights."""

from __future__ import annotations

from typing import Any

PREFIX = "timm-"
_NAMES = """
    beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224
    convmixer_768_32 convnextv2_atto crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_patch16_224 dla34
    dm_nfnet_f0 dpn68 eca_resnet33ts edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0
    efficientvit_b0 ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcvit_xxtiny
    ghostnet_100 ghostnetv2_100 ghostnetv3_050 gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hiera_tiny_224
    hrnet_w18_small inception_next_tiny inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet18 levit_128s
    mambaout_femto mixer_s32_224 mixnet_s mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0
    mobilevit_xxs mobilevitv2_050 nf_regnet_b1 pit_ti_224 pnasnet5large poolformer_s12 pvt_v2_b0 rdnet_tiny
    regnetz_b16 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnetv2_50 rexnet_100 selecsls42
    semnasnet_075 sequencer2d_s seresnext26t_32x4d shvit_s1 skresnet18 spnasnet_100 starnet_s1 swiftformer_xs
    tinynet_e tnt_s_patch16_224 tresnet_m visformer_tiny volo_d1_224 xception41 xcit_nano_12_p16_224
"""
MODELS = tuple(PREFIX + name for name in _NAMES.split())
SIDES = {
    PREFIX + name: side
    for side, names in {
        240: ("crossvit_tiny_240",),
        256: ("botnet26t_256", "halonet26t", "lambda_resnet26t"),
        299: ("inception_v4", "xception41"),
        331: ("pnasnet5large",),
    }.items()
    for name in names
}
"""Those whose input is not 224 pixels wide and high."""


def create(name: str) -> Any:
    """The module called `name`, without its prefix."""
    import timm

    return timm.create_model(name.removeprefix(PREFIX), pretrained=False)
