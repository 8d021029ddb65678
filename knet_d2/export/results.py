"""Results of a batch, with tables of constant length and no branch on values, as a graph needs them.

:mod:`..modeling.postprocessing` leaves out what can't matter in an image; a graph computes all, to the same results.
Shapes: B images, N kernels, h x w pixels of the result; n rows of a table.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..modeling.postprocessing import MASK_THRESHOLD, ImageGeometry, mask_probabilities

# Masks of full resolution that are in memory together as numbers; a constant, so that the loop can be unrolled
_KERNELS_AT_ONCE = 16


def _probabilities(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[B, N, H, W] logits of the head -> [B, N, h, w]."""
    return mask_probabilities(mask_logits.flatten(0, 1), geometry).unflatten(0, mask_logits.shape[:2])


def _chunks(count: int) -> Iterator[slice]:
    """Slices over ``count`` masks, of _KERNELS_AT_ONCE at most."""
    for start in range(0, count, _KERNELS_AT_ONCE):
        yield slice(start, min(start + _KERNELS_AT_ONCE, count))


def label_map(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[B, N, H, W] logits of kernels that are classes -> int32 [B, h, w]."""
    logits = F.interpolate(mask_logits, geometry.padded, mode="bilinear")
    logits = F.interpolate(logits[..., : geometry.image[0], : geometry.image[1]], geometry.output, mode="bilinear")
    return logits.argmax(dim=1).int()


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of bool masks: [B, n, h, w] -> float32 [B, n, 4] (x1, y1, x2, y2), 0 for an empty mask."""

    def extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = occupied.shape[-1]
        index = torch.arange(length, device=occupied.device)
        first = torch.where(occupied, index, length).amin(dim=-1)
        last = torch.where(occupied, index + 1, 0).amax(dim=-1)
        return torch.minimum(first, last), last

    (x1, x2), (y1, y2) = extent(masks.any(dim=-2)), extent(masks.any(dim=-1))
    return torch.stack([x1, y1, x2, y2], dim=-1).float()


def instances(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry, *, max_instances: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (kernel, class) pairs, however low their scores are.

    Args:
        class_logits: [B, N, T].
        mask_logits: [B, N, H, W], at the head's resolution.
        max_instances: number of pairs.

    Returns:
        scores [B, n], falling; labels int64 [B, n]; boxes [B, n, 4]; masks bool [B, n, h, w].
    """
    _, num_kernels, num_classes = class_logits.shape
    scores, pairs = class_logits.sigmoid().flatten(1).topk(min(max_instances, num_kernels * num_classes))
    kernels = (pairs // num_classes)[:, :, None, None].expand(-1, -1, *mask_logits.shape[-2:])
    owned = mask_logits.gather(1, kernels)
    parts = [_probabilities(owned[:, chunk], geometry) > MASK_THRESHOLD for chunk in _chunks(owned.shape[1])]
    masks = torch.cat(parts, dim=1)
    return scores, pairs % num_classes, boxes_of(masks), masks


def panoptic(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    class_mask: torch.Tensor,
    geometry: ImageGeometry,
    *,
    num_things: int,
    thing_score_threshold: float,
    overlap_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One map without overlaps; for the arguments see :func:`knet_d2.modeling.postprocessing.panoptic_inference`.

    Args:
        class_logits: [B, N, K].
        mask_logits: [B, N, H, W], at the head's resolution.

    Returns:
        segment map int32 [B, h, w], 1 + the row of each pixel's segment, 0: void; scores, labels and areas (pixels),
        [B, N]: the kept segments first, by falling score; the area of other rows is 0.
    """
    scores, labels = class_logits.sigmoid().masked_fill(~class_mask, -1).max(dim=2)
    owners, mask_areas = _assign_pixels(scores, mask_logits, geometry)
    flat_owners = owners.flatten(1)
    areas = torch.zeros_like(labels).scatter_add(1, flat_owners, torch.ones_like(flat_owners))
    kept = (areas > 0) & (mask_areas > 0) & (areas / mask_areas >= overlap_threshold)
    kept = kept & ((labels >= num_things) | (scores >= thing_score_threshold))
    # ONNX has no stable sorting, but a top k; scores are in -1 .. 1
    order = torch.where(kept, scores, scores - 4).topk(scores.shape[1]).indices
    rows = torch.arange(1, order.shape[1] + 1, dtype=torch.int32, device=order.device).expand_as(order)
    row_of_kernel = torch.zeros_like(rows).scatter(1, order, rows) * kept
    segment_map = row_of_kernel.gather(1, flat_owners).unflatten(1, geometry.output)
    return segment_map, scores.gather(1, order), labels.gather(1, order), (areas * kept).gather(1, order)


def _assign_pixels(
    scores: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel with the largest score * probability at each pixel, int64 [B, h, w]; areas of masks, int64 [B, N]."""
    best, owners, areas = None, None, []
    for chunk in _chunks(mask_logits.shape[1]):
        probs = _probabilities(mask_logits[:, chunk], geometry)
        areas.append((probs >= MASK_THRESHOLD).sum(dim=(2, 3)))
        value, index = (probs * scores[:, chunk, None, None]).max(dim=1)
        if best is None:
            best, owners = value, index
        else:
            owners = torch.where(value > best, index + chunk.start, owners)
            best = torch.maximum(best, value)
    return owners, torch.cat(areas, dim=1)
