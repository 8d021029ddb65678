"""Backbones with a feature pyramid: Detectron2's FPN of the levels p2 .. p5, or one from a vision transformer's map."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
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


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each position of [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(Backbone):
    """Levels "p2" (stride 4), "p3" (8), ... of the only map of a plain vision transformer (arXiv:2203.16527, Sec. 3).

    They are made by transposed convolutions and max-pooling.
    """

    def __init__(self, bottom_up: Backbone, strides: Sequence[int], out_channels: int):
        """
        Args:
            bottom_up: a backbone with one feature map.
            strides: of the levels, powers of two.
            out_channels: of each level.
        """
        super().__init__()
        self.bottom_up = bottom_up
        ((self._in_feature, shape),) = bottom_up.output_shape().items()
        self._out_feature_strides = {f"p{int(math.log2(stride))}": stride for stride in sorted(strides)}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self.levels = nn.ModuleDict(
            {
                name: _level(shape.channels, int(math.log2(shape.stride / stride)), out_channels)
                for name, stride in self._out_feature_strides.items()
            }
        )

    @property
    def size_divisibility(self) -> int:
        """Image sides are padded to multiples of the coarsest stride."""
        return max(self._out_feature_strides.values())

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {name: [B, C, ceil(H / stride), ceil(W / stride)]}."""
        x = self.bottom_up(image)[self._in_feature]
        levels = {}
        for name, stride in self._out_feature_strides.items():
            rows, columns = ((length + stride - 1) // stride for length in image.shape[-2:])
            levels[name] = self.levels[name](x)[..., :rows, :columns]
        return levels


def _level(channels: int, doublings: int, out_channels: int) -> nn.Sequential:
    """Bring a map to a level's size, which is doubled (or halved, if negative) so many times, and its channels."""
    layers: list[nn.Module] = []
    for i in range(doublings):
        if i > 0:
            layers += [ChannelNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    layers += [nn.MaxPool2d(kernel_size=2, ceil_mode=True) for _ in range(-doublings)]
    layers.append(Conv2d(channels, out_channels, kernel_size=1, bias=False, norm=ChannelNorm(out_channels)))
    layers.append(
        Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False, norm=ChannelNorm(out_channels))
    )
    return nn.Sequential(*layers)
