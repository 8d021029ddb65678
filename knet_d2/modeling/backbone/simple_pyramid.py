"""A feature pyramid from the only map of a plain vision transformer (Li et al., arXiv 2203.16527, Sec. 3)."""

import math
from collections.abc import Sequence

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import Backbone
from torch import nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each position of [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(Backbone):
    """Levels "p2" (stride 4), "p3" (8), ... by transposed convolutions and max-pooling of one map."""

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
