"""Static kernels for semantic segmentation: a decode head's classifier (paper, Sec. 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...errors import ConfigError
from ...tasks import KernelBank
from ..layers import conv_norm_relu
from ..structures import KernelState

# Bins per side of pyramid pooling (PSPNet)
POOLING_SCALES = (1, 2, 3, 6)
# Dilations of atrous pyramid pooling for a feature at stride 8 (DeepLabV3); 1 is a 1x1 convolution
ASPP_DILATIONS = (1, 12, 24, 36)


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, *, dilation: int = 1) -> Conv2d:
    """A convolution with normalisation and ReLU, initialised as those of the official decode heads."""
    conv = conv_norm_relu(in_channels, out_channels, kernel_size, norm, dilation=dilation)
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
        self.convs = nn.ModuleList(_conv(in_channels, out_channels, 1, norm) for _ in scales)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, C, H, W] -> a [B, C', H, W] for every scale.

        Raises:
            ConfigError: batch norm has one value of a channel to learn from.
        """
        if any(type(conv.norm) is nn.BatchNorm2d and conv.norm.training for conv in self.convs) and len(x) == 1:
            raise ConfigError(
                "SOLVER.IMS_PER_BATCH leaves one image for a process, which batch norm after pooling can't learn from: "
                'use two images or more for each, or MODEL.SEM_SEG_HEAD.NORM "GN".'
            )
        return [resize_like(conv(adaptive_average_pool(x, scale)), x) for conv, scale in zip(self.convs, self.scales)]


class DecodeKernelHead(nn.Module):
    """Base of the decode heads: a subclass turns the backbone's features into one feature map."""

    size_divisibility = 0

    @configurable
    def __init__(
        self, input_shape: dict[str, ShapeSpec], *, num_classes: int, conv_dim: int, norm: str, dropout: float
    ):
        """
        Args:
            input_shape: channels and strides of the backbone features that are used.
            num_classes: K; one kernel per class.
            conv_dim: C.
            norm: normalisation of all convolutions.
            dropout: probability before the classifier.
        """
        super().__init__()
        self.in_features = sorted(input_shape, key=lambda name: (input_shape[name].stride, name))
        self.build_layers([input_shape[name].channels for name in self.in_features], conv_dim, norm)
        self.classifier = Classifier(conv_dim, num_classes, dropout)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec], bank: KernelBank):
        head = cfg.MODEL.SEM_SEG_HEAD
        if bank.num_matched:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.NAME = {head.NAME!r} is for MODEL.KNET.TASK = 'semantic'.")
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": bank.num_classes,
            "conv_dim": head.CONVS_DIM,
            "norm": head.NORM,
            "dropout": cfg.MODEL.KNET.DROPOUT,
        }

    def build_layers(self, in_channels: Sequence[int], conv_dim: int, norm: str) -> None:
        """Create the layers that :meth:`decode` uses; in_channels follow ``self.in_features``."""
        raise TypeError(f"{type(self).__name__} has to define build_layers")

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Feature maps in the order of ``self.in_features`` -> [B, C, H, W]."""
        raise TypeError(f"{type(self).__name__} has to define decode")

    def forward(self, features: dict[str, torch.Tensor], image_sizes: torch.Tensor | None = None) -> KernelState:
        """The classifier's weights as kernels, its logits as their masks; padding is not told from the images."""
        feature = self.decode([features[name] for name in self.in_features])
        kernels = self.classifier.conv.weight.flatten(1).expand(feature.shape[0], -1, -1)
        return KernelState(feature, kernels, self.classifier(feature))


@SEM_SEG_HEADS_REGISTRY.register()
class FCNKernelHead(DecodeKernelHead):
    """FCN: two 3x3 convolutions, concatenated with their input, then one more."""

    def build_layers(self, in_channels: Sequence[int], conv_dim: int, norm: str) -> None:
        channels = in_channels[-1]
        self.convs = nn.Sequential(_conv(channels, conv_dim, 3, norm), _conv(conv_dim, conv_dim, 3, norm))
        self.fuse = _conv(channels + conv_dim, conv_dim, 3, norm)

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        x = features[-1]
        return self.fuse(torch.cat([x, self.convs(x)], dim=1))


@SEM_SEG_HEADS_REGISTRY.register()
class PSPKernelHead(DecodeKernelHead):
    """PSPNet: the last feature beside its averages over 1, 4, 9 and 36 regions, fused by a 3x3 convolution."""

    def build_layers(self, in_channels: Sequence[int], conv_dim: int, norm: str) -> None:
        channels = in_channels[-1]
        self.pooling = PyramidPooling(channels, conv_dim, norm, POOLING_SCALES)
        self.fuse = _conv(channels + len(POOLING_SCALES) * conv_dim, conv_dim, 3, norm)

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        x = features[-1]
        return self.fuse(torch.cat([x, *self.pooling(x)], dim=1))


@SEM_SEG_HEADS_REGISTRY.register()
class ASPPKernelHead(DecodeKernelHead):
    """DeepLabV3: the last feature's mean and convolutions of several dilations, fused by a 3x3 convolution."""

    def build_layers(self, in_channels: Sequence[int], conv_dim: int, norm: str) -> None:
        channels = in_channels[-1]
        self.image_pooling = PyramidPooling(channels, conv_dim, norm, (1,))
        self.branches = nn.ModuleList(
            _conv(channels, conv_dim, 1 if dilation == 1 else 3, norm, dilation=dilation) for dilation in ASPP_DILATIONS
        )
        self.fuse = _conv((1 + len(ASPP_DILATIONS)) * conv_dim, conv_dim, 3, norm)

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        x = features[-1]
        branches = [branch(x) for branch in self.branches]
        return self.fuse(torch.cat([*self.image_pooling(x), *branches], dim=1))


@SEM_SEG_HEADS_REGISTRY.register()
class UPerKernelHead(DecodeKernelHead):
    """UPerNet: PSP on the last feature, a top-down pyramid over all of them, fused at the first one's resolution."""

    def build_layers(self, in_channels: Sequence[int], conv_dim: int, norm: str) -> None:
        *lower, last = in_channels
        self.pooling = PyramidPooling(last, conv_dim, norm, POOLING_SCALES)
        self.pooling_fuse = _conv(last + len(POOLING_SCALES) * conv_dim, conv_dim, 3, norm)
        self.lateral_convs = nn.ModuleList(_conv(channels, conv_dim, 1, norm) for channels in lower)
        self.output_convs = nn.ModuleList(_conv(conv_dim, conv_dim, 3, norm) for _ in lower)
        self.fuse = _conv(len(in_channels) * conv_dim, conv_dim, 3, norm)

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        *lower, last = features
        top = self.pooling_fuse(torch.cat([last, *self.pooling(last)], dim=1))
        outputs = [top]
        for x, lateral, output in reversed(list(zip(lower, self.lateral_convs, self.output_convs))):
            top = lateral(x) + resize_like(top, x)
            outputs.insert(0, output(top))
        return self.fuse(torch.cat([resize_like(x, outputs[0]) for x in outputs], dim=1))


class AuxiliaryHead(nn.Module):
    """The auxiliary FCN head on a middle backbone feature; trained only, never used at inference."""

    def __init__(self, in_feature: str, in_channels: int, conv_dim: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.in_feature = in_feature
        self.conv = _conv(in_channels, conv_dim, 3, norm)
        self.classifier = Classifier(conv_dim, num_classes, dropout)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, K, H, W] logits at the feature's own resolution."""
        return self.classifier(self.conv(features[self.in_feature]))
