"""Backbones. Importing this package registers their builders in Detectron2's BACKBONE_REGISTRY."""

from .deform_conv import DeformConv2d
from .fpn import add_fpn, build_knet_resnet_fpn_backbone, build_knet_swin_fpn_backbone
from .necks import DeformableAttention, add_neck
from .resnet import build_knet_resnet_backbone
from .swin import SwinTransformer, build_knet_swin_backbone
from .timm import build_timm_backbone, build_timm_fpn_backbone

__all__ = [
    "DeformConv2d",
    "DeformableAttention",
    "SwinTransformer",
    "add_fpn",
    "add_neck",
    "build_knet_resnet_backbone",
    "build_knet_resnet_fpn_backbone",
    "build_knet_swin_backbone",
    "build_knet_swin_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
