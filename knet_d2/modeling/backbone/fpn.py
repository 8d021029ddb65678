"""Backbones with a feature pyramid (FPN) of the levels p2 .. p5, without an extra level."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from ..layers import resolve_norm
from .resnet import build_knet_resnet_backbone
from .swin import build_knet_swin_backbone


def add_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build Detectron2's FPN from MODEL.FPN; it returns p2 .. p5, one level for each of MODEL.FPN.IN_FEATURES."""
    fpn = FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=resolve_norm(cfg.MODEL.FPN.NORM),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    for conv in fpn.lateral_convs + fpn.output_convs:
        nn.init.xavier_uniform_(conv.weight)
    if not cfg.MODEL.FPN.OUTPUT_CONVS:
        for name, module in list(fpn.named_children()):
            if module in fpn.output_convs:
                fpn.add_module(name, nn.Identity())
        fpn.output_convs = [nn.Identity() for _ in fpn.output_convs]
    return fpn


@BACKBONE_REGISTRY.register()
def build_knet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet (MODEL.RESNETS) with an FPN (MODEL.FPN)."""
    return add_fpn(cfg, build_knet_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_knet_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a Swin transformer (MODEL.SWIN) with an FPN (MODEL.FPN)."""
    return add_fpn(cfg, build_knet_swin_backbone(cfg, input_shape))
