"""Backbones. Importing this package registers their builders in Detectron2's BACKBONE_REGISTRY."""

from . import fpn, resnet, swin, timm
from .necks import DeformableAttention, add_neck

__all__ = ["DeformableAttention", "add_neck", "fpn", "resnet", "swin", "timm"]
