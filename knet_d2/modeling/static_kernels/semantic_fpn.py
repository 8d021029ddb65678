"""Static kernels for instance and panoptic segmentation: semantic FPN and learned kernels (paper, Sec. 3.3)."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...errors import ConfigError
from ...tasks import KernelBank
from ..cascade import PRIOR_PROBABILITY, gather_group_features, pooled_level
from ..layers import conv_norm_relu, full_precision, mask_convolution, no_autocast
from ..structures import KernelState, MaskInputs, Places

POSITION_ENCODINGS = ("sine", "coordinates", "none")
# Base of the frequencies of the sine encoding
TEMPERATURE = 10000


def _normalised_positions(length: int, x: torch.Tensor) -> torch.Tensor:
    """Positions 1 .. length, scaled to (0, 2 pi]: [length]."""
    eps = 1e-6
    positions = torch.arange(1, length + 1, device=x.device, dtype=torch.float32)
    return positions / (length + eps) * (2 * math.pi)


def _sine_features(positions: torch.Tensor, num_features: int) -> torch.Tensor:
    """Interleaved sines and cosines of falling frequency: [length] -> [length, num_features]."""
    index = torch.arange(num_features, device=positions.device)
    exponent = 2 * index.div(2, rounding_mode="floor").to(positions.dtype) / num_features
    angles = positions[:, None] / TEMPERATURE**exponent
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def sine_position_encoding(x: torch.Tensor) -> torch.Tensor:
    """Normalised sine encoding of a map's own size, computed in float32 for every type of map.

    Args:
        x: [B, C, H, W], C even; only shape, type and device are used.

    Returns:
        [1, C, H, W]: the first C / 2 channels depend on y, the others on x.
    """
    _, channels, height, width = x.shape
    y_features = _sine_features(_normalised_positions(height, x), channels // 2).T[:, :, None]
    x_features = _sine_features(_normalised_positions(width, x), channels // 2).T[:, None, :]
    encoding = torch.cat([y_features.expand(-1, height, width), x_features.expand(-1, height, width)])
    return encoding[None].to(x.dtype)


def coordinate_channels(x: torch.Tensor) -> torch.Tensor:
    """Two channels (x, y) that run from -1 to 1 over the map: [B, C, H, W] -> [B, 2, H, W]."""
    batch, _, height, width = x.shape
    ys = _coordinates(height, x)[:, None].expand(height, width)
    xs = _coordinates(width, x)[None, :].expand(height, width)
    return torch.stack([xs, ys]).expand(batch, -1, -1, -1)


def _coordinates(length: int, x: torch.Tensor) -> torch.Tensor:
    """Evenly from -1 to 1: [length]. Not by torch.linspace, which an exported graph would fix to one length."""
    # In a half type, neighbouring columns of a wide map would have the same index
    index = torch.arange(length, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    # "dim" is there for the export to ONNX
    return (2 * index / index.amax(dim=0).clamp(min=1) - 1).to(x.dtype)


class SemanticFPN(nn.Module):
    """Bring all FPN levels to one stride by convolutions and bilinear up-sampling, and sum them."""

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int,
        common_stride: int,
        norm: str,
        position_encoding: str = "sine",
    ):
        """
        Args:
            input_shape: channels and strides of the levels that are used.
            conv_dim: C.
            common_stride: stride of the result; finer levels get there by one strided convolution.
            norm: normalisation of all convolutions.
            position_encoding: what the coarsest level gets: "sine" (added), "coordinates" (two more channels), "none".
        """
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in levels]
        self.coarsest_stride = levels[-1][1].stride
        self.position_encoding = position_encoding
        self.levels = nn.ModuleDict()
        for name, shape in levels:
            channels = shape.channels
            if name == self.in_features[-1] and position_encoding == "coordinates":
                channels += 2
            self.levels[name] = self._build_level(channels, shape.stride, conv_dim, common_stride, norm)

    @staticmethod
    def _build_level(channels: int, stride: int, conv_dim: int, common_stride: int, norm: str) -> nn.Sequential:
        if stride <= common_stride:
            return nn.Sequential(conv_norm_relu(channels, conv_dim, 3, norm, stride=common_stride // stride))
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(stride // common_stride))):
            layers.append(conv_norm_relu(channels, conv_dim, 3, norm))
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            channels = conv_dim
        layers.append(conv_norm_relu(channels, conv_dim, 3, norm))
        return nn.Sequential(*layers)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of all levels: [B, C, H, W]."""
        outputs = []
        for name in self.in_features:
            x = features[name]
            if name == self.in_features[-1]:
                x = self._encode_position(x)
            outputs.append(self.levels[name](x))
        return sum(outputs[1:], outputs[0])

    def _encode_position(self, x: torch.Tensor) -> torch.Tensor:
        if self.position_encoding == "sine":
            return x + sine_position_encoding(x)
        if self.position_encoding == "coordinates":
            return torch.cat([x, coordinate_channels(x)], dim=1)
        return x


class FirstMasks(NamedTuple):
    """What instance kernels give.

    Attributes:
        kernels: [N, C] or [B, N, C].
        mask_logits: M_0, [B, N, H, W].
        center_logits, places, mask_inputs: see :class:`KernelState`.
    """

    kernels: torch.Tensor
    mask_logits: torch.Tensor
    center_logits: torch.Tensor | None = None
    places: Places | None = None
    mask_inputs: MaskInputs | None = None


class InstanceKernels(Protocol):
    """The N instance kernels of a semantic FPN head: a module, built from (C, N, norm of convolutions, stride of F)."""

    def init_weights(self) -> None:
        """Initialise what differs from the head's other convolutions."""

    def localize(self, localization_feature: torch.Tensor) -> torch.Tensor:
        """F_loc as masks and cascade read it, from the localization branch's result: [B, C, H, W] -> [B, C, H, W]."""

    def first_masks(
        self, fused: torch.Tensor, localization_feature: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> FirstMasks:
        """
        Args:
            fused: the semantic FPN's sum, [B, C, H, W].
            localization_feature: F_loc, [B, C, H, W].
            image_sizes: see :meth:`SemanticFPNKernelHead.forward`.
        """


class LearnedKernels(nn.Conv2d):
    """The same N kernels for every image, which are parameters (paper, Sec. 3.3)."""

    def __init__(self, dim: int, num_kernels: int, norm: str, stride: int):
        super().__init__(dim, num_kernels, 1, bias=False)

    def init_weights(self) -> None:
        """See :class:`InstanceKernels`."""
        nn.init.normal_(self.weight, std=1.0)

    def localize(self, localization_feature: torch.Tensor) -> torch.Tensor:
        """See :class:`InstanceKernels`."""
        return localization_feature

    def first_masks(
        self, fused: torch.Tensor, localization_feature: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> FirstMasks:
        """See :class:`InstanceKernels`."""
        return FirstMasks(self.weight.flatten(1), mask_convolution(self, localization_feature))


@SEM_SEG_HEADS_REGISTRY.register()
class SemanticFPNKernelHead(nn.Module):
    """Learned instance kernels and, for panoptic segmentation, the semantic classifier's stuff kernels.

    The features under the mask of an instance kernel are added to it, which gives its K_0.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        bank: KernelBank,
        conv_dim: int,
        common_stride: int,
        norm: str,
        instance_kernels: Callable[[int, int, str, int], InstanceKernels] = LearnedKernels,
        position_encoding: str = "sine",
        pooled_level: str | None = None,
    ):
        """
        Args:
            input_shape: channels and strides of the FPN levels.
            bank: the kernels to provide.
            conv_dim: C.
            common_stride, position_encoding: see :class:`SemanticFPN`.
            norm: normalisation of all convolutions.
            instance_kernels: builds the instance kernels.
            pooled_level: name of the feature that the state hands on, see :func:`..cascade.pooled_level`.
        """
        super().__init__()
        self.semantic_fpn = SemanticFPN(
            input_shape,
            conv_dim=conv_dim,
            common_stride=common_stride,
            norm=norm,
            position_encoding=position_encoding,
        )
        self.pooled_level = pooled_level
        self.localization_branch = self._branch(conv_dim, norm)
        self.semantic_branch = self._branch(conv_dim, norm)
        self.instance_kernels = instance_kernels(conv_dim, bank.num_matched, norm, common_stride)
        self.classifier = nn.Conv2d(conv_dim, bank.num_classes, 1)
        # A list as index would be copied to the device every time
        self.register_buffer("fixed_class_ids", torch.tensor(bank.fixed_class_ids, dtype=torch.int64), persistent=False)
        self._init_weights()

    @staticmethod
    def _branch(conv_dim: int, norm: str) -> nn.Sequential:
        return nn.Sequential(*(conv_norm_relu(conv_dim, conv_dim, 1, norm) for _ in range(2)))

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.instance_kernels.init_weights()
        nn.init.constant_(self.classifier.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec], bank: KernelBank):
        head, encoding = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.KNET.POSITION_ENCODING
        if encoding not in POSITION_ENCODINGS:
            raise ConfigError(f"MODEL.KNET.POSITION_ENCODING = {encoding!r}: use one of {POSITION_ENCODINGS}.")
        if bank.num_matched == 0:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.NAME = {head.NAME!r} is for instance and panoptic tasks.")
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "bank": bank,
            "conv_dim": head.CONVS_DIM,
            "common_stride": head.COMMON_STRIDE,
            "norm": head.NORM,
            "position_encoding": encoding,
            "pooled_level": pooled_level(cfg, input_shape),
        }

    @property
    def size_divisibility(self) -> int:
        """Image sides must be multiples of this for the levels to add up."""
        return self.semantic_fpn.coarsest_stride

    def forward(self, features: dict[str, torch.Tensor], image_sizes: torch.Tensor | None = None) -> KernelState:
        """The static kernels, their masks, and the semantic logits of all classes.

        Args:
            features: the backbone's.
            image_sizes: see :meth:`knet_d2.modeling.meta_arch.KNet.network`.
        """
        fused = self.semantic_fpn(features)
        localization_feature = self.instance_kernels.localize(self.localization_branch(fused))
        semantic_feature = self.semantic_branch(fused)
        feature = localization_feature + semantic_feature
        first = self.instance_kernels.first_masks(fused, localization_feature, image_sizes)
        mask_logits = first.mask_logits
        semantic_logits = mask_convolution(self.classifier, semantic_feature)

        with no_autocast(feature):
            masks = (mask_logits > 0).to(full_precision(feature).dtype)
            kernels = gather_group_features(masks, full_precision(feature))
            kernels = first.kernels + kernels
            fixed = self.fixed_class_ids
            if len(fixed):
                stuff_kernels = self.classifier.weight[fixed].flatten(1).expand(kernels.shape[0], -1, -1)
                kernels = torch.cat([kernels, stuff_kernels], dim=1)
                mask_logits = torch.cat([mask_logits, semantic_logits[:, fixed]], dim=1)
        return KernelState(
            feature,
            kernels,
            mask_logits,
            semantic_logits,
            first.center_logits,
            first.places,
            localization_feature if self.training else None,
            first.mask_inputs,
            None if self.pooled_level is None else features[self.pooled_level],
        )
