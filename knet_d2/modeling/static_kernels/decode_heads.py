"""Static kernels for semantic segmentation: a decode head's classifier (paper, Sec. 3.3)."""

from typing import Dict, Optional

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...errors import ConfigError
from ...structures import KernelBank, KernelState
from ..norm import resolve_norm


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, norm: str, *, dilation: int = 1) -> Conv2d:
    """A convolution that keeps the size, with normalisation and ReLU."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(resolve_norm(norm), out_channels),
        activation=F.relu,
    )


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


class DecodeKernelHead(nn.Module):
    """Base of the decode heads: a subclass turns the backbone's features into one feature map."""

    size_divisibility = 0

    @configurable
    def __init__(self, input_shape: Dict[str, ShapeSpec], *, num_classes: int, conv_dim: int, norm: str, dropout: float):
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
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec], bank: KernelBank):
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

    def build_layers(self, in_channels, conv_dim: int, norm: str) -> None:
        """Create the layers that :meth:`decode` uses; in_channels follow ``self.in_features``."""
        raise TypeError(f"{type(self).__name__} has to define build_layers")

    def decode(self, features) -> torch.Tensor:
        """Feature maps in the order of ``self.in_features`` -> [B, C, H, W]."""
        raise TypeError(f"{type(self).__name__} has to define decode")

    def forward(self, features: Dict[str, torch.Tensor]) -> KernelState:
        """The classifier's weights as kernels, its logits as their masks."""
        feature = self.decode([features[name] for name in self.in_features])
        kernels = self.classifier.conv.weight.flatten(1).expand(len(feature), -1, -1)
        return KernelState(feature, kernels, self.classifier(feature))


@SEM_SEG_HEADS_REGISTRY.register()
class FCNKernelHead(DecodeKernelHead):
    """FCN: two 3x3 convolutions, concatenated with their input, then one more."""

    def build_layers(self, in_channels, conv_dim: int, norm: str) -> None:
        channels = in_channels[-1]
        self.convs = nn.Sequential(
            conv_norm_relu(channels, conv_dim, 3, norm), conv_norm_relu(conv_dim, conv_dim, 3, norm)
        )
        self.fuse = conv_norm_relu(channels + conv_dim, conv_dim, 3, norm)

    def decode(self, features) -> torch.Tensor:
        x = features[-1]
        return self.fuse(torch.cat([x, self.convs(x)], dim=1))


class AuxiliaryHead(nn.Module):
    """The auxiliary FCN head on a middle backbone feature; trained only, never used at inference."""

    def __init__(self, in_feature: str, in_channels: int, conv_dim: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.in_feature = in_feature
        self.conv = conv_norm_relu(in_channels, conv_dim, 3, norm)
        self.classifier = Classifier(conv_dim, num_classes, dropout)

    def forward(self, features: Dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, K, H, W] logits at the feature's own resolution."""
        return self.classifier(self.conv(features[self.in_feature]))


def build_auxiliary_head(cfg, input_shape: Dict[str, ShapeSpec], bank: KernelBank) -> Optional[AuxiliaryHead]:
    """The auxiliary head that the config asks for, or None."""
    knet = cfg.MODEL.KNET
    if knet.LOSS.AUXILIARY_WEIGHT == 0:
        return None
    if not bank.fixed_class_ids:
        raise ConfigError("MODEL.KNET.LOSS.AUXILIARY_WEIGHT must be 0 for instance segmentation: it has no label map.")
    name = knet.AUXILIARY_HEAD.IN_FEATURE
    if name not in input_shape:
        raise ConfigError(
            f"MODEL.KNET.AUXILIARY_HEAD.IN_FEATURE = {name!r}: the backbone gives {sorted(input_shape)}; "
            "choose one of them or set MODEL.KNET.LOSS.AUXILIARY_WEIGHT 0."
        )
    return AuxiliaryHead(
        name,
        input_shape[name].channels,
        knet.AUXILIARY_HEAD.CONV_DIM,
        bank.num_classes,
        cfg.MODEL.SEM_SEG_HEAD.NORM,
        knet.DROPOUT,
    )
