"""Backbones from config options, and what several tests of backbones share."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

import knet_d2.modeling.backbone  # noqa: F401  registers the builders
from knet_d2.config import add_knet_config

RES = ["res2", "res3", "res4", "res5"]

RESNET_FPN = ["MODEL.BACKBONE.NAME", "build_knet_resnet_fpn_backbone", "MODEL.RESNETS.NORM", "EvalBN"]
RESNET_V1C = ["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", "MODEL.RESNETS.NORM", "SyncBN"]
RESNET_V1C += ["MODEL.RESNETS.STEM_TYPE", "deeplab", "MODEL.BACKBONE.FREEZE_AT", 0]
D8 = ["MODEL.RESNETS.RES4_DILATION", 2, "MODEL.RESNETS.RES5_DILATION", 4]
SWIN_L = ["MODEL.SWIN.EMBED_DIM", 192, "MODEL.SWIN.DEPTHS", [2, 2, 18, 2], "MODEL.SWIN.NUM_HEADS", [6, 12, 24, 48]]
DEFORM = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
TINY_SWIN = ["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
TINY_SWIN += ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [2, 1, 2, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4]]


def build(options):
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = RES
    cfg.merge_from_list(list(options))
    return build_backbone(cfg)


class Model(nn.Module):
    """Gives a backbone the prefix that it has in a model."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def randomise_norms(backbone):
    """Give batch norms random statistics and weights that keep the activations of residual blocks small."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in backbone.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.3 * noise if name.endswith(("mean", "bias")) else 0.4 + 0.3 * noise)


def relative_error(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())
