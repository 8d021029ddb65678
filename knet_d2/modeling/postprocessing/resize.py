"""Resizes masks from the head's resolution to that of the result."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..layers import upsample_masks


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: tuple[int, int]  # of the batch, the network's input
    image: tuple[int, int]  # of the image in it, at the top left
    output: tuple[int, int]  # of the result


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
