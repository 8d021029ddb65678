"""Layers that the decode heads and the auxiliary head are made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn

from ..norm import resolve_norm


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, norm: str, *, dilation: int = 1) -> Conv2d:
    """A convolution that keeps the size, with normalisation and ReLU."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(resolve_norm(norm), out_channels),
        activation=F.relu,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class Classifier(nn.Module):
    """Dropout, then a 1x1 convolution to class logits; its weights are the static kernels."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, K, H, W]."""
        return self.conv(self.dropout(feature))


def resize_like(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Bilinear resizing to another map's height and width."""
    return F.interpolate(x, target.shape[-2:], mode="bilinear", align_corners=False)


def _bin_means(length: int, num_bins: int, like: torch.Tensor) -> torch.Tensor:
    """[num_bins, length]: row i averages positions floor(i length / n) .. ceil((i + 1) length / n) - 1."""
    number = torch.arange(num_bins, device=like.device)
    start, stop = number * length // num_bins, -(-(number + 1) * length // num_bins)
    position = torch.arange(length, device=like.device)
    inside = (position >= start[:, None]) & (position < stop[:, None])
    return inside.to(like.dtype) / (stop - start)[:, None]


def adaptive_average_pool(x: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Means over a grid of bins that covers the map, [B, C, H, W] -> [B, C, n, n].

    It equals adaptive_avg_pool2d, which MPS has for sizes that are multiples of the number of bins only.
    """
    rows, columns = (_bin_means(length, num_bins, x) for length in x.shape[-2:])
    return torch.einsum("nh,bchw,mw->bcnm", rows, x, columns)


class PyramidPooling(nn.Module):
    """Pool a map to several grids, convolve each of them, and bring them back to the map's size."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, scales: Sequence[int]):
        super().__init__()
        self.scales = tuple(scales)
        self.convs = nn.ModuleList(conv_norm_relu(in_channels, out_channels, 1, norm) for _ in scales)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, C, H, W] -> a [B, C', H, W] for every scale."""
        return [resize_like(conv(adaptive_average_pool(x, scale)), x) for conv, scale in zip(self.convs, self.scales)]
