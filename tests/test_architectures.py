"""Every architecture of the configs, and K-Nets with Detectron2's own backbones: the outcome expected of each."""

import re

import timm_helpers  # noqa: F401  registers small networks
from architecture_base import CONFIGS, ArchitectureTests, read_config
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from helpers import neck

from knet_d2.modeling.backbone.fpn import add_fpn

PYRAMID = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
STAGES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
DILATED = {"res2": 4, "res3": 8, "res4": 8, "res5": 8}
STEM_AND_RES2 = ("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")


class Detection(ArchitectureTests):
    """Instance and panoptic K-Nets: a ResNet-FPN whose first layers and statistics stay those of ImageNet."""

    strides = PYRAMID
    frozen = STEM_AND_RES2
    updates_statistics = False
    has_windows = False


class TestR50Instance(Detection):
    config = "coco/instance/knet_r50_fpn_1x.yaml"


class TestR50InstanceModern(Detection):
    config = "coco/instance/knet_r50_fpn_1x_modern.yaml"


class TestR101Instance(Detection):
    config = "coco/instance/knet_r101_fpn_3x.yaml"


class TestR101DcnInstance(Detection):
    config = "coco/instance/knet_r101_dcn_fpn_3x.yaml"


class TestR50Panoptic(Detection):
    config = "coco/panoptic/knet_r50_fpn_1x.yaml"


class TestR50PanopticModern(Detection):
    config = "coco/panoptic/knet_r50_fpn_1x_modern.yaml"


class TestR101Panoptic(Detection):
    config = "coco/panoptic/knet_r101_fpn_3x.yaml"


class TestR101DcnPanoptic(Detection):
    config = "coco/panoptic/knet_r101_dcn_fpn_3x.yaml"


class TestSwinLPanoptic(Detection):
    config = "coco/panoptic/knet_swin_l_fpn_3x.yaml"
    frozen = ()
    has_windows = True


class TestR18Instance(Detection):
    config = "shapes/instance.yaml"
    frozen = ()
    updates_statistics = True


class TestR18Panoptic(TestR18Instance):
    config = "shapes/panoptic.yaml"


class TestR18InstanceModern(TestR18Instance):
    config = "shapes/instance_modern.yaml"


class TestR18PanopticModern(TestR18Instance):
    config = "shapes/panoptic_modern.yaml"


class Semantic(ArchitectureTests):
    """Semantic K-Nets: a backbone that is trained as a whole, and a decode head."""

    strides = DILATED
    frozen = ()
    updates_statistics = True
    has_windows = False


class TestR50Fcn(Semantic):
    config = "ade20k/semantic/knet_fcn_r50_d8_80k.yaml"


class TestR50Psp(Semantic):
    config = "ade20k/semantic/knet_pspnet_r50_d8_80k.yaml"


class TestR50DeepLabV3(Semantic):
    config = "ade20k/semantic/knet_deeplabv3_r50_d8_80k.yaml"


class TestR50Uper(Semantic):
    config = "ade20k/semantic/knet_upernet_r50_80k.yaml"
    strides = STAGES


class TestSwinTUper(Semantic):
    config = "ade20k/semantic/knet_upernet_swin_t_80k.yaml"
    strides = STAGES
    has_windows = True


class TestSwinLUper(TestSwinTUper):
    config = "ade20k/semantic/knet_upernet_swin_l_80k.yaml"


# ---- K-Net Lite


class TestLiteInstance(ArchitectureTests):
    config = "lite/instance_lite0.yaml"
    strides = PYRAMID
    frozen = ()
    updates_statistics = False
    has_windows = False


class TestLitePanoptic(TestLiteInstance):
    config = "lite/panoptic_lite0.yaml"


class TestLiteSemantic(TestLiteInstance):
    config = "lite/semantic_lite0.yaml"
    strides = STAGES


# ---- networks of timm of other kinds


class OfTimm(ArchitectureTests):
    config = "lite/instance_lite0.yaml"
    strides = PYRAMID
    frozen = ()
    updates_statistics = False
    has_windows = False


class TestTimmResNet(OfTimm):
    options = {"MODEL.TIMM.NAME": "test_resnet", "MODEL.TIMM.NORM": "BN"}
    updates_statistics = True


class TestTimmConvNeXt(OfTimm):
    options = {"MODEL.TIMM.NAME": "test_convnext", "MODEL.BACKBONE.FREEZE_AT": 2}
    frozen = ("backbone.bottom_up.network.stem.", "backbone.bottom_up.network.stages.0.")


class TestTimmMobileNetV4(OfTimm):
    options = {"MODEL.TIMM.NAME": "mobilenetv4_conv_small"}


class TestTimmSwin(OfTimm):
    options = {"MODEL.TIMM.NAME": "knet_test_swin"}
    has_windows = True


class TestTimmViT(OfTimm):
    options = {"MODEL.TIMM.NAME": "test_vit"}


# ---- other necks than the FPN


class TestBiFPN(TestR18Panoptic):
    options = neck("BiFPN")


class TestMSDeformAttn(TestR18Instance):
    options = neck("MSDeformAttn")


class TestBiFPNSemantic(TestLiteSemantic):
    """Behind a backbone without an FPN."""

    options = TestBiFPN.options


# ---- backbones of others


@BACKBONE_REGISTRY.register()
def build_regnet_fpn_backbone(cfg, input_shape):
    """Detectron2's RegNet, which has no builder of its own, with a block of 8, 16, 32 and 64 channels per stage."""
    regnet = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=4,
        w_a=14,
        w_0=8,
        w_m=2,
        group_width=8,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm="FrozenBN",
        out_features=cfg.MODEL.FPN.IN_FEATURES,
    )
    return add_fpn(cfg, regnet)


class TestDetectron2ResNet(Detection):
    """A pyramid with an additional level, which no head reads."""

    config = "coco/panoptic/knet_r50_fpn_1x.yaml"
    options = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.RESNETS.NORM": "FrozenBN"}
    strides = {**PYRAMID, "p6": 64}


class TestDetectron2RegNet(Detection):
    config = "coco/instance/knet_r50_fpn_1x.yaml"
    options = {
        "MODEL.BACKBONE.NAME": "build_regnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 1,
        "MODEL.FPN.IN_FEATURES": ["s1", "s2", "s3", "s4"],
    }
    frozen = ("backbone.bottom_up.stem.",)


class TestDetectron2ResNetWithBiFPN(Detection):
    """The neck replaces the FPN of a builder that knows nothing of it."""

    config = "coco/instance/knet_r50_fpn_1x.yaml"
    options = {**TestDetectron2ResNet.options, **TestBiFPN.options}


# ---- none is left out

CLASSES = [x for x in list(globals().values()) if isinstance(x, type) and x.__name__.startswith("Test")]


def architecture(cfg):
    """Return the options that distinguish architectures; widths and numbers of kernels do not."""
    model = cfg.MODEL
    resnet = [model.RESNETS[key] for key in ("DEPTH", "STEM_TYPE", "RES4_DILATION", "RES5_DILATION")]
    swin = [tuple(model.SWIN[key]) for key in ("DEPTHS", "NUM_HEADS")]
    kind = swin if "swin" in model.BACKBONE.NAME else [*resnet, tuple(model.RESNETS.DEFORM_ON_PER_STAGE)]
    if "timm" in model.BACKBONE.NAME:  # EfficientNet-Lite0 and Lite2 differ in width and depth alone
        kind = [re.sub(r"\d+$", "", model.TIMM.NAME)]
    return (model.KNET.TASK, model.BACKBONE.NAME, model.SEM_SEG_HEAD.NAME, *kind)


def test_every_architecture_of_the_configs_has_a_class():
    files = [p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "base"]
    tested = {architecture(read_config(cls.config)) for cls in CLASSES if not cls.options}
    assert {architecture(read_config(path)) for path in files} == tested
    assert len(tested) == sum(not cls.options for cls in CLASSES)


def test_every_backbone_of_the_package_has_a_class():
    own = {name for name, builder in BACKBONE_REGISTRY if builder.__module__.startswith("knet_d2.")}
    assert own == {read_config(cls.config).MODEL.BACKBONE.NAME for cls in CLASSES if not cls.options}
