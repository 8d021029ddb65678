"""The producer of static kernels and the auxiliary head that a config names."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...errors import ConfigError
from ...tasks import KernelBank
from .decode_heads import AuxiliaryHead
from .image_kernels import ImageKernelHead


def build_static_kernels(cfg, input_shape: dict[str, ShapeSpec], bank: KernelBank) -> nn.Module:
    """The producer MODEL.SEM_SEG_HEAD.NAME for the features of a backbone.

    Producers are registered as Detectron2's semantic heads; they take (cfg, input_shape, bank), return a
    :class:`~knet_d2.modeling.structures.KernelState` and have a ``size_divisibility``.

    Raises:
        ConfigError: there is no producer of this name, or the backbone lacks a feature that it needs.
    """
    name, in_features = cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES
    producers = {key: head for key, head in SEM_SEG_HEADS_REGISTRY if hasattr(head, "size_divisibility")}
    if name not in producers:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.NAME = {name!r} gives no static kernels: use one of {sorted(producers)}."
        )
    learns_centers = issubclass(producers[name], ImageKernelHead)
    if (cfg.MODEL.KNET.LOSS.CENTER_WEIGHT != 0) != learns_centers:
        weight = "a value above 0, such as 1.0" if learns_centers else "0, or the head 'ImageKernelHead'"
        raise ConfigError(
            f"MODEL.KNET.LOSS.CENTER_WEIGHT = {cfg.MODEL.KNET.LOSS.CENTER_WEIGHT} with MODEL.SEM_SEG_HEAD.NAME = "
            f"{name!r}: use {weight}."
        )
    width = cfg.MODEL.KNET.MASK_NETWORK_WIDTH
    if width < 0 or (width and not learns_centers):
        number = "0, or more with the head 'ImageKernelHead', whose kernels have places"
        raise ConfigError(f"MODEL.KNET.MASK_NETWORK_WIDTH = {width}: use {number}.")
    missing = [feature for feature in in_features if feature not in input_shape]
    if missing:
        raise ConfigError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES has {missing}: the backbone gives {sorted(input_shape)}.")
    return producers[name](cfg, input_shape, bank)


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
