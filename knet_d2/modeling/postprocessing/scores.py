"""Scores of things that take their masks into account: how sure a mask is, and whether a better kernel has it, too.

Masks are read at the head's resolution, so that this costs little next to the results. Nothing branches on values.

Shapes: "..." stands for nothing (one image) or B; M matched kernels, T thing classes, h x w pixels of the head.
"""

import torch

from .resize import ImageGeometry

# Each round decides on all kernels whose rivals were decided on in the round before. So this bounds the length of a
# chain of masks that each overlap the next better one; a chain of more than three is hardly possible above IoU 0.5
SUPPRESSION_ROUNDS = 8
# Score of a pair that was suppressed; below that of every other
SUPPRESSED = -1.0


def thing_scores(
    scores: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry, *, exponent: float, max_iou: float
) -> torch.Tensor:
    """Scores of (kernel, class) pairs.

    Args:
        scores: [..., M, T], class probabilities.
        mask_logits: [..., M, h, w].
        geometry: sizes of the image; masks are read inside of it.
        exponent: scores are multiplied by (mean probability of the mask's pixels)^exponent; 0: not at all.
        max_iou: of two kernels whose masks have a larger IoU, the one with the lower best score is suppressed, and
            every kernel keeps its best class only; 1: nothing is suppressed.

    Returns:
        [..., M, T]; SUPPRESSED for suppressed pairs.
    """
    if exponent == 0 and max_iou == 1:
        return scores
    logits = mask_logits.flatten(-2)
    masks = ((logits > 0) & _inside(mask_logits, geometry)).to(scores.dtype)
    areas = masks.sum(dim=-1)
    if exponent != 0:
        sureness = (logits.sigmoid() * masks).sum(dim=-1) / areas.clamp(min=1)
        scores = scores * sureness[..., None] ** exponent
    if max_iou == 1:
        return scores
    best, classes = scores.max(dim=-1, keepdim=True)
    intersections = masks @ masks.transpose(-2, -1)
    unions = areas[..., :, None] + areas[..., None, :] - intersections
    shown = not_suppressed(best[..., 0], intersections > max_iou * unions)[..., None]
    is_best = torch.arange(scores.shape[-1], device=scores.device) == classes
    return scores.where(shown & is_best, SUPPRESSED)


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


def _inside(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Pixels of the head whose middle is in the image: bool [h w]."""
    rows, columns = (
        (2 * torch.arange(length, device=mask_logits.device) + 1) * padded < 2 * length * inside
        for length, padded, inside in zip(mask_logits.shape[-2:], geometry.padded, geometry.image)
    )
    return (rows[:, None] & columns).flatten()
