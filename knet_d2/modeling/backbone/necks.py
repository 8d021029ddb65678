"""Necks in place of the FPN: BiFPN, and an encoder with multi-scale deformable attention; both in plain PyTorch.

Shapes: L maps of [B, C, H_l, W_l], the finest one first; Q positions of all maps that the encoder reads; A heads of
c = C / A channels; P points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from ...errors import ConfigError
from ..layers import conv_norm_relu, full_precision, no_autocast, resolve_norm
from ..static_kernels.semantic_fpn import sine_position_encoding

# The FPN, or what else the builder of the backbone makes
DEFAULT_NECK = "FPN"
# Added to the sum of the weights of a node of BiFPN (EfficientDet, Sec. 3.3)
EPSILON = 1e-4
# The encoder reads this many of the coarsest maps; finer ones are added by an FPN, as in Mask2Former
ENCODED_LEVELS = 3


class Neck(Backbone):
    """A backbone whose maps have all passed through a neck; their names are those of the maps that they replace."""

    def __init__(self, bottom_up: Backbone, names: dict[str, str], layers: NeckLayers):
        """
        Args:
            bottom_up: gives the maps.
            names: of each map of ``bottom_up`` that is used, the finest first -> the name in the result.
            layers: L maps -> L maps of ``layers.channels`` channels.
        """
        super().__init__()
        self.bottom_up = bottom_up
        self.neck = layers
        shapes = bottom_up.output_shape()
        self._names = names
        self._out_features = list(names.values())
        self._out_feature_channels = dict.fromkeys(self._out_features, layers.channels)
        self._out_feature_strides = {new: shapes[old].stride for old, new in names.items()}

    @property
    def size_divisibility(self) -> int:
        """That of the backbone; a neck takes maps of any size."""
        return self.bottom_up.size_divisibility

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {name: [B, C, H_l, W_l]}."""
        features = self.bottom_up(image)
        maps = self.neck([features[name] for name in self._names])
        return dict(zip(self._out_features, maps, strict=True))


class NeckLayers(nn.Module, ABC):
    """A neck: L maps of a backbone, the finest first -> L maps of the same sizes and C channels."""

    channels: int

    @abstractmethod
    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B, ., H_l, W_l] -> [B, C, H_l, W_l]."""


def add_neck(cfg: CfgNode, backbone: Backbone) -> Backbone:
    """Put MODEL.NECK in the place of the backbone's FPN, or behind a backbone without an FPN.

    Raises:
        ConfigError: an option of MODEL.NECK has a value that makes no sense.
    """
    options, channels = cfg.MODEL.NECK, cfg.MODEL.FPN.OUT_CHANNELS
    if options.NAME == DEFAULT_NECK:
        return backbone
    if options.NAME not in NECKS:
        raise ConfigError(f"MODEL.NECK.NAME = {options.NAME!r}: use one of {[DEFAULT_NECK, *NECKS]}.")
    for key in ("NUM_LAYERS", "NUM_HEADS", "NUM_POINTS", "FFN_DIM"):
        if options[key] < 1:
            raise ConfigError(f"MODEL.NECK.{key} = {options[key]}: use at least 1.")
    if channels % options.NUM_HEADS:
        raise ConfigError(
            f"MODEL.NECK.NUM_HEADS = {options.NUM_HEADS}: use a divisor of MODEL.FPN.OUT_CHANNELS, {channels}."
        )
    levels = {shape.stride: name for name, shape in backbone.output_shape().items()}
    names = {name: name for name in backbone.output_shape()}
    if isinstance(backbone, FPN):
        inputs, backbone = backbone.in_features, backbone.bottom_up
        names = {name: levels[backbone.output_shape()[name].stride] for name in inputs}
    shapes = [backbone.output_shape()[name] for name in names]
    if any(a.stride > b.stride for a, b in pairwise(shapes)):
        raise ConfigError("MODEL.NECK.NAME: the backbone's features must be ordered from the finest to the coarsest.")
    layers = NECKS[options.NAME]([x.channels for x in shapes], [x.stride for x in shapes], channels, options)
    return Neck(backbone, names, layers)


# ---- BiFPN -----------------------------------------------------------------------------------------------------


class BiFPN(NeckLayers):
    """Layers that pass features down and up the pyramid, and weigh them (EfficientDet, arXiv:1911.09070, Sec. 3)."""

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], channels: int, options: CfgNode):
        """
        Args:
            in_channels, strides: of the maps.
            channels: C.
            options: MODEL.NECK.
        """
        super().__init__()
        self.channels = channels
        self.laterals = nn.ModuleList(_projection(x, channels, options.NORM) for x in in_channels)
        steps = [coarse // fine for fine, coarse in pairwise(strides)]
        self.layers = nn.ModuleList(BiFPNLayer(channels, steps, options.NORM) for _ in range(options.NUM_LAYERS))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See :class:`NeckLayers`."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for layer in self.layers:
            maps = layer(maps)
        return maps


class BiFPNLayer(nn.Module):
    """From the coarsest map to the finest and back; the way back also reads the layer's input (Fig. 3d)."""

    def __init__(self, channels: int, steps: Sequence[int], norm: str):
        """
        Args:
            channels: C.
            steps: factors between the strides of neighbouring maps, the finest first.
            norm: of each node.
        """
        super().__init__()
        self.steps = list(steps)
        self.down = nn.ModuleList(FusionNode(2, channels, norm) for _ in steps)
        # The coarsest map has no node on the way down
        self.up = nn.ModuleList(FusionNode(3 if i < len(steps) - 1 else 2, channels, norm) for i in range(len(steps)))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """L maps of [B, C, H_l, W_l] -> L of the same shapes."""
        fused = [maps[-1]]
        for node, x in zip(self.down, reversed(maps[:-1]), strict=True):
            fused.insert(0, node(x, F.interpolate(fused[0], size=x.shape[-2:], mode="nearest")))
        result = [fused[0]]
        for node, step, x, y in zip(self.up, self.steps, maps[1:], fused[1:], strict=True):
            reduced = F.max_pool2d(result[-1], step + 1, step, step // 2) if step > 1 else result[-1]
            # Some backbones round half of an odd size down
            reduced = reduced[..., : x.shape[-2], : x.shape[-1]]
            result.append(node(x, reduced) if y is x else node(x, y, reduced))
        return result


class FusionNode(nn.Module):
    """Fast normalised fusion (Sec. 3.3), then Swish, a depthwise separable convolution and a norm."""

    def __init__(self, num_inputs: int, channels: int, norm: str):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = _projection(channels, channels, norm)

    def fuse(self, *maps: torch.Tensor) -> torch.Tensor:
        """The mean of maps of one shape, by weights that are not negative."""
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + EPSILON)
        return sum(weight * x for weight, x in zip(weights.unbind(), maps, strict=True))

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Maps of [B, C, H, W] -> [B, C, H, W]."""
        return self.pointwise(self.depthwise(F.silu(self.fuse(*maps))))


def _projection(in_channels: int, channels: int, norm: str) -> Conv2d:
    """A 1x1 convolution with a norm, without an activation."""
    conv = Conv2d(in_channels, channels, 1, bias=not norm, norm=get_norm(resolve_norm(norm), channels))
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


# ---- multi-scale deformable attention --------------------------------------------------------------------------


class DeformableEncoder(NeckLayers):
    """Mask2Former's pixel decoder (arXiv:2112.01527, Sec. 4.1): an encoder of Deformable DETR, and an FPN.

    The encoder reads the coarsest maps (ENCODED_LEVELS). Finer ones get its result by an FPN.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], channels: int, options: CfgNode):
        """See :class:`BiFPN`."""
        super().__init__()
        self.channels = channels
        self.laterals = nn.ModuleList(_projection(x, channels, options.NORM) for x in in_channels)
        self.num_encoded = min(ENCODED_LEVELS, len(in_channels))
        self.level_embedding = nn.Parameter(torch.randn(self.num_encoded, channels))
        self.layers = nn.ModuleList(
            EncoderLayer(channels, options.FFN_DIM, options.NUM_HEADS, self.num_encoded, options.NUM_POINTS)
            for _ in range(options.NUM_LAYERS)
        )
        num_fine = len(in_channels) - self.num_encoded
        self.outputs = nn.ModuleList(conv_norm_relu(channels, channels, 3, options.NORM) for _ in range(num_fine))
        for conv in self.outputs:
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See :class:`NeckLayers`."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        fine, coarse = maps[: -self.num_encoded], maps[-self.num_encoded :]
        result = self._encode(coarse)
        for x, conv in zip(reversed(fine), reversed(self.outputs), strict=True):
            above = F.interpolate(result[0], size=x.shape[-2:], mode="bilinear", align_corners=False)
            result.insert(0, conv(x + above))
        return result

    def _encode(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [x.shape[-2:] for x in maps]
        positions = [
            (sine_position_encoding(x) + embedding[:, None, None]).flatten(2)
            for x, embedding in zip(maps, self.level_embedding, strict=True)
        ]
        encoding = torch.cat(positions, dim=2).transpose(1, 2)
        tokens = torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)
        places = torch.cat([cell_centers(x) for x in maps])
        for layer in self.layers:
            tokens = layer(tokens, encoding, places, sizes)
        return as_maps(tokens, sizes)


class EncoderLayer(nn.Module):
    """Deformable self-attention over the positions of all maps, and a feed-forward network."""

    def __init__(self, channels: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.attention = DeformableAttention(channels, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, channels))
        self.ffn_norm = nn.LayerNorm(channels)
        for linear in (self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, tokens: torch.Tensor, encoding: torch.Tensor, places: torch.Tensor, sizes: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """
        Args:
            tokens: [B, Q, C].
            encoding: of the positions, [1, Q, C].
            places: of the positions, [Q, 2].
            sizes: (H_l, W_l) of each map.
        """
        tokens = self.attention_norm(tokens + self.attention(tokens + encoding, places, tokens, sizes))
        return self.ffn_norm(tokens + self.ffn(tokens))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, Eq. 3), in full precision.

    In half precision, coordinates would be wrong by parts of a pixel.
    """

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        self.sampling_offsets = nn.Linear(channels, 2 * math.prod(self.shape))
        self.attention_weights = nn.Linear(channels, math.prod(self.shape))
        self.value_projection = nn.Linear(channels, channels)
        self.output_projection = nn.Linear(channels, channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Head i looks in direction i around a place, at its p-th point p pixels away, with equal weights (A.4)."""
        for linear in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        num_heads, num_levels, num_points = self.shape
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        offsets = directions[:, None, None] * torch.arange(1, num_points + 1)[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, num_levels, -1, -1).flatten())

    def forward(
        self, queries: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, sizes: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """
        Args:
            queries: [B, Q', C].
            places: where the queries are, [Q', 2], (x, y) from 0 to 1.
            tokens: the positions of all maps, [B, Q, C].
            sizes: (H_l, W_l) of each map.

        Returns:
            [B, Q', C].
        """
        dtype = tokens.dtype
        with no_autocast(queries):
            queries, tokens = full_precision(queries), full_precision(tokens)
            offsets = self.sampling_offsets(queries).unflatten(2, (*self.shape, 2))
            weights = self.attention_weights(queries).unflatten(2, (self.shape[0], -1)).softmax(dim=-1)
            weights = weights.unflatten(3, self.shape[1:])
            values = as_maps(self.value_projection(tokens), sizes)
            sampled = sample_values(values, places.to(queries.dtype), offsets, weights)
            return self.output_projection(sampled).to(dtype)


def sample_values(
    values: Sequence[torch.Tensor], places: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sums of bilinear samples of all maps; outside of a map is 0.

    Args:
        values: L maps [B, C, H_l, W_l].
        places: [Q, 2], (x, y) from 0 to 1.
        offsets: from there, [B, Q, A, L, P, 2], (x, y) in pixels of each map.
        weights: [B, Q, A, L, P].

    Returns:
        [B, Q, C]; head a reads the a-th part of the channels.
    """
    num_heads = offsets.shape[2]
    # [L, B, A, Q, P]
    offsets_x, offsets_y, weights = (x.permute(3, 0, 2, 1, 4) for x in (*offsets.unbind(dim=-1), weights))
    result = []
    for value, x, y, weight in zip(values, offsets_x, offsets_y, weights, strict=True):
        height, width = value.shape[-2:]
        points = torch.stack([places[:, :1] + x / width, places[:, 1:] + y / height], dim=-1)
        heads = value.unflatten(1, (num_heads, -1)).flatten(0, 1)
        sampled = F.grid_sample(heads, (2 * points - 1).flatten(0, 1), mode="bilinear", align_corners=False)
        result.append((sampled * weight.flatten(0, 1)[:, None]).sum(dim=-1))
    return sum(result).unflatten(0, (-1, num_heads)).flatten(1, 2).transpose(1, 2)


def cell_centers(x: torch.Tensor) -> torch.Tensor:
    """Centres of the cells of a map, (x, y) from 0 to 1: [B, C, H, W] -> [H W, 2], row by row."""
    height, width = x.shape[-2:]
    rows, columns = ((torch.arange(n, device=x.device, dtype=torch.float32) + 0.5) / n for n in (height, width))
    grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], dim=-1)
    return grid.flatten(0, 1)


def as_maps(tokens: torch.Tensor, sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The positions of all maps, [B, Q, C] -> L maps [B, C, H_l, W_l]."""
    parts = tokens.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
    return [part.unflatten(2, tuple(size)) for part, size in zip(parts, sizes, strict=True)]


NECKS: dict[str, type[BiFPN] | type[DeformableEncoder]] = {"BiFPN": BiFPN, "MSDeformAttn": DeformableEncoder}
