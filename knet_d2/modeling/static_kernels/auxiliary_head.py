"""The auxiliary FCN head of semantic models."""

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ...errors import ConfigError
from ..structures import KernelBank
from .layers import Classifier, conv_norm_relu


class AuxiliaryHead(nn.Module):
    """The auxiliary FCN head on a middle backbone feature; trained only, never used at inference."""

    def __init__(self, in_feature: str, in_channels: int, conv_dim: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.in_feature = in_feature
        self.conv = conv_norm_relu(in_channels, conv_dim, 3, norm)
        self.classifier = Classifier(conv_dim, num_classes, dropout)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, K, H, W] logits at the feature's own resolution."""
        return self.classifier(self.conv(features[self.in_feature]))


def build_auxiliary_head(cfg, input_shape: dict[str, ShapeSpec], bank: KernelBank) -> AuxiliaryHead | None:
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
