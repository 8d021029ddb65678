"""The functions of pixels by plain interpolation of every mask: few operations, none of which waits for a value.

For accelerators and exported graphs; see :class:`.rules.PixelFunctions`.
"""

import math
from collections.abc import Iterator

import torch

from .resize import ImageGeometry, mask_probabilities
from .rules import MASK_THRESHOLD

# Masks of full resolution, of an image, that are in memory together as numbers. A constant, so that a tracer can unroll
# the loop
MASKS_AT_ONCE = 16
# On an accelerator as many more as have this number of pixels together (256 MB in float32): launches cost more there
PIXELS_AT_ONCE = 1 << 26


def binary_masks(mask_logits: torch.Tensor, kernels: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """See :meth:`.rules.PixelFunctions.binary_masks`."""
    index = kernels[..., None, None].expand(*kernels.shape, *mask_logits.shape[-2:])
    shown = mask_logits.gather(-3, index)
    return torch.cat([probs > MASK_THRESHOLD for _, probs in _chunks(shown, geometry)], dim=-3)


def assign_pixels(
    scores: torch.Tensor, mask_logits: torch.Tensor, candidates: torch.Tensor, geometry: ImageGeometry
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :meth:`.rules.PixelFunctions.assign_pixels`."""
    best = owners = None
    mask_areas = []
    for chunk, probs in _chunks(mask_logits, geometry):
        mask_areas.append((probs >= MASK_THRESHOLD).sum(dim=(-2, -1)))
        value, index = (probs * scores[..., chunk, None, None]).max(dim=-3)
        if best is None:
            best, owners = value, index
        else:
            owners = torch.where(value > best, index + chunk.start, owners)
            best = torch.maximum(best, value)
    pixels = owners.flatten(-2)
    areas = torch.zeros_like(scores, dtype=torch.int64).scatter_add(-1, pixels, torch.ones_like(pixels))
    return owners, areas, torch.cat(mask_areas, dim=-1)


def _chunks(mask_logits: torch.Tensor, geometry: ImageGeometry) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some of the masks at a time, and their probabilities: [..., N, h, w] -> [..., n, H, W]."""
    count, at_once = mask_logits.shape[-3], MASKS_AT_ONCE
    if mask_logits.device.type != "cpu" and not torch.compiler.is_exporting():
        pixels = max(math.prod(size) for size in geometry) * math.prod(mask_logits.shape[:-3])
        at_once = max(at_once, PIXELS_AT_ONCE // pixels)
    for start in range(0, max(count, 1), at_once):
        chunk = slice(start, min(start + at_once, count))
        some = mask_logits[..., chunk, :, :]
        yield chunk, mask_probabilities(some.flatten(0, -3), geometry).unflatten(0, some.shape[:-2])
