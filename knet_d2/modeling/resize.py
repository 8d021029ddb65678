"""Resizes masks from the head's resolution to that of the losses, and to that of the result."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# The masks of losses and results have twice the resolution of the head (stride 4 for a head at stride 8)
SCALE = 2


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: tuple[int, int]  # of the batch, the network's input
    image: tuple[int, int]  # of the image in it, at the top left
    output: tuple[int, int]  # of the result


def upsample_masks(mask_logits: torch.Tensor) -> torch.Tensor:
    """[B, N, H, W] -> [B, N, 2H, 2W], bilinear."""
    return F.interpolate(mask_logits, scale_factor=SCALE, mode="bilinear", align_corners=False)


def upsampled_size(mask_logits: torch.Tensor) -> tuple[int, int]:
    """Height and width of :func:`upsample_masks`'s result."""
    return SCALE * mask_logits.shape[-2], SCALE * mask_logits.shape[-1]


def upsampled_probabilities(mask_logits: torch.Tensor) -> torch.Tensor:
    """[N, h, w] logits of the head -> [N, 2h, 2w] probabilities, from which the masks of the result are resized."""
    # The masks are the batch, since interpolate() takes a batch of 0 maps, but not 0 channels
    return upsample_masks(mask_logits[:, None])[:, 0].sigmoid_()


def resize(maps: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Resize maps of any resolution that cover the padded input, [N, h, w], to the result, [N, H, W].

    As in the official release: resize to the padded size, crop to the image, resize to the result.
    """
    maps = F.interpolate(maps[:, None], geometry.padded, mode="bilinear", align_corners=False)
    maps = maps[..., : geometry.image[0], : geometry.image[1]]
    return F.interpolate(maps, geometry.output, mode="bilinear", align_corners=False)[:, 0]


def mask_probabilities(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[N, h, w] logits of the head -> [N, H, W] probabilities in the result, all at once."""
    return resize(upsampled_probabilities(mask_logits), geometry)
