"""Ground truth as the losses need it: padded like the batch, and resized to the masks' resolution."""

import torch
import torch.nn.functional as F

from ..data.ground_truth import GroundTruth
from .structures import Targets

# Ground truth masks of full resolution that are in memory together as numbers
MASKS_AT_ONCE = 16


def build_targets(
    truth: GroundTruth, images: torch.Tensor, mask_size: tuple[int, int] | None, ignore_value: int
) -> Targets:
    """Targets of one image.

    Args:
        truth: on the device of the images.
        images: the padded batch, [B, C, Hp, Wp], whose type the masks get.
        mask_size: height and width of the masks in the losses; None: they stay uint8 masks of full resolution.
        ignore_value: label of the pixels of the padding.
    """
    height, width = images.shape[-2:]
    padding = (0, width - truth.size[1], 0, height - truth.size[0])

    def resized(masks: torch.Tensor) -> torch.Tensor:
        """Pad with 0 to the batch's size, then bilinear to the masks' size: [G, h, w], soft at the borders."""
        if mask_size is None:
            return F.pad(masks.byte(), padding)
        if len(masks) == 0:
            return images.new_zeros(0, *mask_size)
        masks = F.pad(masks, padding).to(images.dtype)
        return F.interpolate(masks[None], mask_size, mode="bilinear", align_corners=False)[0]

    sem_seg, stuff_masks = None, resized(truth.masks()[:0])
    if truth.labels is not None:
        labels = truth.labels.long()
        stuff_masks = resized(labels == truth.stuff_classes[:, None, None])
        sem_seg = F.pad(labels, padding, value=ignore_value)
    masks = resized(truth.masks())
    rest = truth.size, truth.seed, truth.track_ids
    return Targets(truth.classes, masks, truth.stuff_classes, stuff_masks, sem_seg, *rest)


def covered_cells(masks: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Which share of each cell of a map of H x W a mask covers: [G, h, w] -> [G, H, W]."""
    # Whole masks as numbers, a few at a time
    parts = [F.adaptive_avg_pool2d(x.to(dtype), size) for x in masks.split(MASKS_AT_ONCE)]
    return torch.cat(parts) if parts else masks.new_zeros(0, *size, dtype=dtype)


def own_cells(covered: torch.Tensor) -> torch.Tensor:
    """The cells that may be an instance's centre: [G, H, W] -> bool. Cells at its border are not, if it has others."""
    return (covered > 0) & (covered >= 0.5 * covered.amax(dim=(1, 2), keepdim=True))
