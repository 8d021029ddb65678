"""Scores of things that take their masks into account: how sure a mask is, and whether a better kernel has it, too.

Nothing branches on values.

Shapes: "..." stands for nothing (one image) or B; M matched kernels, T thing classes, h x w pixels of the head.
"""

import torch
import torch.nn.functional as F

from ..layers import upsample_masks
from .resize import ImageGeometry

# Each round decides on all kernels whose rivals were decided on in the round before. So this bounds the length of a
# chain of masks that each overlap the next better one; a chain of more than three is hardly possible above IoU 0.5
SUPPRESSION_ROUNDS = 8
# Score of a pair that was suppressed; below that of every other
SUPPRESSED = -1.0
# On a CPU, masks whose expected IoU is computed at once, so that they stay in the cache
MASKS_AT_ONCE = 16


def thing_scores(
    scores: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry, *, exponent: float, max_iou: float
) -> torch.Tensor:
    """Scores of (kernel, class) pairs.

    Args:
        scores: [..., M, T], class probabilities.
        mask_logits: [..., M, h, w].
        geometry: sizes of the image; masks are read inside of it.
        exponent: scores are multiplied by (expected IoU of the mask)^exponent; 0: not at all.
        max_iou: of two kernels whose masks have a larger IoU, the one with the lower best score is suppressed, and
            every kernel keeps its best class only; 1: nothing is suppressed.

    Returns:
        [..., M, T]; SUPPRESSED for suppressed pairs.
    """
    count = mask_logits.shape[-3]
    if exponent != 0 and count:
        if mask_logits.device.type == "cpu" and not torch.compiler.is_compiling():
            count = MASKS_AT_ONCE
        parts = [expected_ious(some, geometry) for some in mask_logits.split(count, dim=-3)]
        scores = scores * torch.cat(parts, dim=-1)[..., None] ** exponent
    if max_iou == 1:
        return scores
    best, classes = scores.max(dim=-1, keepdim=True)
    # At the head's resolution, since all masks are compared with all
    masks = ((mask_logits > 0) & _inside(mask_logits, geometry)).flatten(-2).to(scores.dtype)
    areas = masks.sum(dim=-1)
    intersections = masks @ masks.transpose(-2, -1)
    unions = areas[..., :, None] + areas[..., None, :] - intersections
    shown = not_suppressed(best[..., 0], intersections > max_iou * unions)[..., None]
    is_best = torch.arange(scores.shape[-1], device=scores.device) == classes
    return scores.where(shown & is_best, SUPPRESSED)


def expected_ious(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """The IoU that each mask would have with its object, were its probabilities true; 0 for an empty mask.

    That is the expected intersection by the expected union: the sum of the probabilities inside of the mask, by its
    area and the sum outside. They are read where results are made from, at twice the head's resolution: a small mask
    has few pixels of the head.

    Args:
        mask_logits: [..., M, h, w].

    Returns:
        [..., M].
    """
    # With the masks innermost, and one type throughout, a CPU is five times as fast
    logits = mask_logits.reshape(-1, *mask_logits.shape[-3:]).contiguous(memory_format=torch.channels_last)
    probs = upsample_masks(logits).sigmoid_()
    probs = probs.mul_(_inside(probs, geometry).to(probs.dtype))
    masked = F.threshold(probs, 0.5, 0.0)
    intersections, areas = masked.sum(dim=(2, 3)), masked.sign().sum(dim=(2, 3))
    unions = areas + probs.sum(dim=(2, 3)) - intersections
    return (intersections / unions.clamp(min=torch.finfo(probs.dtype).tiny)).view(mask_logits.shape[:-2])


def not_suppressed(scores: torch.Tensor, overlaps: torch.Tensor) -> torch.Tensor:
    """Greedy non-maximum suppression: by falling score, whoever overlaps none of those that were kept is kept.

    Args:
        scores: [..., M].
        overlaps: bool [..., M, M], which pairs of masks are the same object's.

    Returns:
        bool [..., M].
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    score, other = scores[..., :, None], scores[..., None, :]
    is_better = (other > score) | ((other == score) & (index < index[:, None]))
    rivals = overlaps & is_better
    kept = torch.ones_like(scores, dtype=torch.bool)
    for _ in range(SUPPRESSION_ROUNDS):
        kept = ~(rivals & kept[..., None, :]).any(dim=-1)
    return kept


def _inside(maps: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Pixels of maps [..., h, w] over the padded input whose middle is in the image: bool [h, w]."""
    rows, columns = (
        (2 * torch.arange(length, device=maps.device) + 1) * padded < 2 * length * inside
        for length, padded, inside in zip(maps.shape[-2:], geometry.padded, geometry.image)
    )
    return rows[:, None] & columns
