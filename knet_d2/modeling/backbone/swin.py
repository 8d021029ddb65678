"""Swin transformer (Liu et al., arXiv 2103.14030) as a backbone for images of any size.

Shapes: B images, C channels, H x W positions, w window size, L = w * w positions in a window, N windows per image,
h heads.

timm's Swin (1.0.31) can't take its place: it rolls a map before it pads it to whole windows, the official one pads
first. With it, 110 of the 125 values that ``checks.references`` compares for Swin-T and Swin-L are out of tolerance.
With that order mended in timm's blocks none is, in 0.97 of the time of a training step on a CPU, 1.02 to 1.09 of that
of inference, and the same memory. torchvision's does not roll a map that fits into one window.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn
from torchvision.ops import StochasticDepth

from ...errors import ConfigError

STAGES = ("res2", "res3", "res4", "res5")
PATCH_SIZE = 4
# Added to the attention logits of two positions that are in one window only because the map was rolled.
MASKED_LOGIT = -100.0


def next_multiple(length: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``length``."""
    # Written without a remainder, so that torch.export can prove that symbolic sizes are divisible by ``multiple``.
    return (length + multiple - 1) // multiple * multiple


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad [B, H, W, C] with zeros at the bottom and right until H and W are multiples."""
    bottom, right = (next_multiple(length, multiple) - length for length in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def window_partition(x: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cut [B, H, W, C] into windows [B * N, L, C] in row-major order; H and W are multiples of the window size."""
    batch, height, width, channels = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.view(batch, rows, window_size, columns, window_size, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, window_size * window_size, channels)


def window_merge(windows: torch.Tensor, window_size: int, height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`window_partition`: [B * N, L, C] -> [B, H, W, C]."""
    rows, columns = height // window_size, width // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, height, width, windows.shape[-1])


def relative_position_index(window_size: int) -> torch.Tensor:
    """Return the row of the bias table for query i and key j, [L, L]; it depends only on their displacement."""
    y, x = (p.flatten() for p in torch.meshgrid(*[torch.arange(window_size)] * 2, indexing="ij"))
    dy = y[:, None] - y[None, :] + window_size - 1
    dx = x[:, None] - x[None, :] + window_size - 1
    return dy * (2 * window_size - 1) + dx


def shifted_window_mask(
    height: int, width: int, window_size: int, shift: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the mask that is added to the attention logits of a rolled map.

    Rolling by -shift moves the first rows and columns to the end, so the last windows contain up to four regions that
    are far apart in the image. The mask prevents attention between different regions.

    Returns:
        [N, L, L]: 0 for two positions of one region, MASKED_LOGIT for positions of different regions.
    """

    def regions(length: int) -> torch.Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - window_size).int() + (position >= length - shift).int()

    region = 3 * regions(height)[:, None] + regions(width)[None, :]
    region = window_partition(region[None, :, :, None], window_size)[..., 0]
    return (region[:, :, None] != region[:, None, :]) * MASKED_LOGIT


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias per displacement and head."""

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            windows: [B * N, L, C].
            mask: [N, L, L], added to the logits of each image and each head.

        Returns:
            [B * N, L, C].
        """
        num_windows, length, dim = windows.shape
        qkv = self.qkv(windows).view(num_windows, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(num_windows // mask.shape[0], 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Window attention and a two-layer MLP, each after a layer norm and with a residual."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float, drop_path: float):
        """
        Args:
            dim: channels C.
            num_heads: number of attention heads.
            window_size: side of a window in positions.
            shift: number of positions by which the map is rolled before it is cut into windows; 0 = not rolled.
            mlp_ratio: hidden channels of the MLP, divided by C.
            drop_path: probability of skipping a residual branch for an image in training.
        """
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, int(dim * mlp_ratio)), nn.GELU(), nn.Linear(int(dim * mlp_ratio), dim))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: torch.Tensor, shift_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [B, H, W, C].
            shift_mask: mask for the padded map, [N, L, L]; used only if this block rolls the map.

        Returns:
            [B, H, W, C].
        """
        x = x + self.drop_path(self._attend(self.norm1(x), shift_mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: torch.Tensor, shift_mask: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, self.window_size)
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window_size)
        windows = self.attention(windows, shift_mask if self.shift else None)
        x = window_merge(windows, self.window_size, padded_height, padded_width)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]


class PatchMerging(nn.Module):
    """Halves the resolution: 2x2 neighbours become one position with twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]."""
        x = pad_to_multiple(x, 2)
        batch, height, width, channels = x.shape
        # Group the four neighbours of each channel, in row-major order, like OpenMMLab's checkpoints. (The Swin
        # release has another order.)
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 5, 2, 4).flatten(3)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Patch merging (except in the first stage), then blocks at one resolution; every second one shifts its windows."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        merge_from: int | None = None,
    ):
        """
        Args:
            dim, num_heads, window_size, mlp_ratio: see SwinBlock.
            drop_paths: drop path probability of each block; its length is the number of blocks.
            merge_from: channels of the previous stage, whose output is merged; None for the first stage.
        """
        super().__init__()
        self.window_size = window_size
        self.shift = window_size // 2
        self.merging = None if merge_from is None else PatchMerging(merge_from)
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, self.shift * (i % 2), mlp_ratio, drop_path)
            for i, drop_path in enumerate(drop_paths)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H', W', C']."""
        if self.merging is not None:
            x = self.merging(x)
        height, width = (next_multiple(length, self.window_size) for length in x.shape[1:3])
        mask = shifted_window_mask(height, width, self.window_size, self.shift, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x


class PatchEmbedding(nn.Module):
    """Maps each patch of 4x4 pixels to a vector by a convolution and a layer norm."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]."""
        bottom, right = (next_multiple(length, PATCH_SIZE) - length for length in image.shape[2:])
        x = self.projection(F.pad(image, (0, right, 0, bottom)))
        return self.norm(x.permute(0, 2, 3, 1))


class SwinTransformer(Backbone):
    """A Swin transformer that returns "res2" .. "res5" at strides 4, 8, 16 and 32, each after its own layer norm."""

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] = STAGES,
        freeze_at: int = 0,
    ):
        """
        Args:
            in_channels: channels of the image.
            embed_dim: channels of the first stage; each later stage doubles them.
            depths, num_heads: number of blocks, and of attention heads, of each stage.
            window_size, mlp_ratio: see SwinBlock.
            drop_path_rate: drop path probability of the last block; it increases linearly from 0 in the first block.
            out_features: names of the stages to return; stages after the last of them are not built.
            freeze_at: 0 freezes nothing, 1 the patch embedding, 2 also the first stage, and so on.
        """
        super().__init__()
        num_stages = max(STAGES.index(name) for name in out_features) + 1
        self._out_features = [name for name in STAGES if name in out_features]
        self._out_feature_channels = {name: embed_dim * 2**i for i, name in enumerate(STAGES)}
        self._out_feature_strides = {name: PATCH_SIZE * 2**i for i, name in enumerate(STAGES)}

        drop_paths = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.patch_embed = PatchEmbedding(in_channels, embed_dim)
        self.stages = nn.ModuleList(
            SwinStage(
                embed_dim * 2**i,
                num_heads[i],
                window_size,
                mlp_ratio,
                list(islice(drop_paths, depths[i])),
                merge_from=embed_dim * 2 ** (i - 1) if i > 0 else None,
            )
            for i in range(num_stages)
        )
        self.out_norms = nn.ModuleDict({n: nn.LayerNorm(self._out_feature_channels[n]) for n in self._out_features})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in [self.patch_embed, *self.stages][:freeze_at]:
            module.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        swin = cfg.MODEL.SWIN
        _check_config(swin)
        return {
            "in_channels": input_shape.channels,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "out_features": swin.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {name: [B, C, ceil(H / stride), ceil(W / stride)]}."""
        x = self.patch_embed(image)
        outputs = {}
        for name, stage in zip(STAGES, self.stages):
            x = stage(x)
            if name in self._out_features:
                outputs[name] = self.out_norms[name](x).permute(0, 3, 1, 2).contiguous()
        return outputs


def _check_config(swin: CfgNode) -> None:
    """Raise a ConfigError if MODEL.SWIN has values that do not describe a Swin transformer."""
    unknown = [name for name in swin.OUT_FEATURES if name not in STAGES]
    if unknown or not swin.OUT_FEATURES:
        raise ConfigError(f"MODEL.SWIN.OUT_FEATURES = {swin.OUT_FEATURES}: use names of {list(STAGES)}.")
    for key in ("DEPTHS", "NUM_HEADS"):
        if len(swin[key]) != len(STAGES):
            raise ConfigError(f"MODEL.SWIN.{key} = {swin[key]}: give {len(STAGES)} numbers, one per stage.")
    for i, heads in enumerate(swin.NUM_HEADS):
        if heads < 1 or swin.EMBED_DIM * 2**i % heads:
            raise ConfigError(
                f"MODEL.SWIN.NUM_HEADS = {swin.NUM_HEADS}: use a divisor of the {swin.EMBED_DIM * 2**i} channels of "
                f"{STAGES[i]} instead of {heads} (MODEL.SWIN.EMBED_DIM = {swin.EMBED_DIM})."
            )
    if not 0 <= swin.DROP_PATH_RATE < 1:
        raise ConfigError(f"MODEL.SWIN.DROP_PATH_RATE = {swin.DROP_PATH_RATE}: use a probability from 0 to below 1.")


@BACKBONE_REGISTRY.register()
def build_knet_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Build a Swin transformer from MODEL.SWIN."""
    return SwinTransformer(cfg, input_shape)
