"""The one resolution step between the head and the masks that are trained and returned."""

import torch
import torch.nn.functional as F

# The masks of losses and results have twice the resolution of the head (stride 4 for a head at stride 8)
SCALE = 2


def upsample_masks(mask_logits: torch.Tensor) -> torch.Tensor:
    """[B, N, H, W] -> [B, N, 2H, 2W], bilinear."""
    return F.interpolate(mask_logits, scale_factor=SCALE, mode="bilinear", align_corners=False)


def upsampled_size(mask_logits: torch.Tensor) -> tuple[int, int]:
    """Height and width of :func:`upsample_masks`'s result."""
    return SCALE * mask_logits.shape[-2], SCALE * mask_logits.shape[-1]
