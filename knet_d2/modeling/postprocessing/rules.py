"""The rules from logits to results. Nothing branches on values, so that a graph can be traced.

Shapes: "..." stands for nothing (one image) or B (a batch of images of one size); N kernels, h x w pixels of the head,
H x W of the result; n instances.
"""

from typing import Protocol

import torch

from .resize import ImageGeometry, resize, upsampled_probabilities

MASK_THRESHOLD = 0.5
# Bounds the memory of semantic_scores beside its result
CLASSES_AT_ONCE = 8


class PixelFunctions(Protocol):
    """The interface of :mod:`.dense`, and of :mod:`.cells`, which takes one image only."""

    def binary_masks(self, mask_logits: torch.Tensor, kernels: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
        """Masks of the pixels whose probability is above MASK_THRESHOLD.

        Args:
            mask_logits: [..., N, h, w].
            kernels: int64 [..., n], index of the kernel that each output mask shows.

        Returns:
            bool [..., n, H, W].
        """

    def assign_pixels(
        self, scores: torch.Tensor, mask_logits: torch.Tensor, candidates: torch.Tensor, geometry: ImageGeometry
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give each pixel to the kernel with the largest score * mask probability; a tie goes to the first kernel.

        Args:
            scores: [..., N].
            mask_logits: [..., N, h, w].
            candidates: bool [..., N], kernels whose mask area will be read.

        Returns:
            owners: int64 [..., H, W], kernels;
            areas: int64 [..., N], pixels that each kernel owns;
            mask areas: int64 [..., N], pixels where a kernel's own probability is at least MASK_THRESHOLD; may be 0
            for kernels that are no candidates or own nothing.
        """


def best_pairs(scores: torch.Tensor, max_instances: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (kernel, class) pairs, which become instances; one kernel can appear with several classes.

    Args:
        scores: [..., N, T].
        max_instances: number of pairs.

    Returns:
        scores, falling, kernels and classes, [..., n] each.
    """
    num_kernels, num_classes = scores.shape[-2:]
    scores, pairs = scores.flatten(-2).topk(min(max_instances, num_kernels * num_classes))
    return scores, pairs // num_classes, pairs % num_classes


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of bool masks: [..., n, H, W] -> float32 [..., n, 4] (x1, y1, x2, y2), 0 for an empty mask."""
    # A CPU takes the maximum of uint8 several times as fast as that of bool. ONNX can't express the view, which is free
    masks = masks.byte() if torch.compiler.is_exporting() else masks.view(torch.uint8)

    def extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = occupied.shape[-1]
        index = torch.arange(length, device=occupied.device)
        first = torch.where(occupied, index, length).amin(dim=-1)
        last = torch.where(occupied, index + 1, 0).amax(dim=-1)
        return torch.minimum(first, last), last

    (x1, x2), (y1, y2) = extent(masks.amax(dim=-2).bool()), extent(masks.amax(dim=-1).bool())
    return torch.stack([x1, y1, x2, y2], dim=-1).float()


def panoptic(
    class_scores: torch.Tensor,
    mask_logits: torch.Tensor,
    class_mask: torch.Tensor,
    geometry: ImageGeometry,
    pixels: PixelFunctions,
    *,
    num_things: int,
    thing_score_threshold: float,
    overlap_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge all kernels' masks into one map without overlaps (paper, Sec. 3.3).

    Args:
        class_scores: [..., N, K], 0 to 1.
        mask_logits: [..., N, h, w].
        class_mask: bool [N, K], the classes that each kernel can take.
        num_things: classes below this are things.
        thing_score_threshold: a thing with a lower score is dropped. It takes part in the competition for pixels
            all the same: what it wins stays void.
        overlap_threshold: a kernel that wins a smaller part of its own mask's area is dropped.

    Returns:
        segment map int32 [..., H, W], 1 + the row of each pixel's segment, 0: void; scores, classes, areas (pixels)
        and kernels, [..., N]: the kept segments first, by falling score; the area of other rows is 0.
    """
    scores, classes = class_scores.masked_fill(~class_mask, -1).max(dim=-1)
    candidates = (classes >= num_things) | (scores >= thing_score_threshold)
    owners, areas, mask_areas = pixels.assign_pixels(scores, mask_logits, candidates, geometry)
    # Divide: in float32, threshold * area may be rounded up, and drop a share of exactly the threshold
    kept = candidates & (areas > 0) & (mask_areas > 0) & (areas / mask_areas >= overlap_threshold)

    # The row of a kernel is the number of kernels before it: ONNX has no stable sort. Scores are in -1 .. 1, so
    # subtracting 4 sorts all dropped kernels after the kept ones
    keys, index = torch.where(kept, scores, scores - 4), torch.arange(scores.shape[-1], device=scores.device)
    key, other = keys[..., :, None], keys[..., None, :]
    rows = ((other > key) | ((other == key) & (index < index[:, None]))).sum(dim=-1)
    order = torch.zeros_like(rows).scatter(-1, rows, index.expand_as(rows))
    segment_map = ((rows + 1) * kept).int().gather(-1, owners.flatten(-2)).unflatten(-1, geometry.output)
    return segment_map, scores.gather(-1, order), classes.gather(-1, order), (areas * kept).gather(-1, order), order


@torch.no_grad()
def semantic_scores(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, class_mask: torch.Tensor, geometry: ImageGeometry
) -> torch.Tensor:
    """Semantic scores of a model with a class branch: the sum over kernels of class times mask probabilities.

    Args:
        class_logits: [N, K].
        mask_logits: [N, h, w].
        class_mask: bool [N, K], the classes that each kernel can take.

    Returns:
        [K, H, W].
    """
    scores = class_logits.sigmoid().masked_fill(~class_mask, 0)
    probs = upsampled_probabilities(mask_logits)
    # Resizing is linear, so K sums are resized instead of N masks
    sums = (scores.T @ probs.flatten(1)).unflatten(1, probs.shape[1:])
    total = mask_logits.new_empty(len(sums), *geometry.output)
    for few, part in zip(sums.split(CLASSES_AT_ONCE), total.split(CLASSES_AT_ONCE)):
        part.copy_(resize(few, geometry))
    return total
