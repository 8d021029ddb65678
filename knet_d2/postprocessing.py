"""From the last stage's logits to instances, a panoptic map or semantic logits: pure functions of tensors.

Masks go from the head's resolution to the image's in the order that the official numbers need: up-sample the
logits x2, sigmoid, bilinear to the padded input size, crop to the image, bilinear to the original size.
"""

from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances

from .modeling.resize import upsample_masks

# Bounds the memory of full-resolution float masks: about 64 MB in float32
MAX_MASK_ELEMENTS = 1 << 24
MASK_THRESHOLD = 0.5


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: Tuple[int, int]  # of the batch, the network's input
    image: Tuple[int, int]  # of the image in it, at the top left
    output: Tuple[int, int]  # of the result


def mask_probabilities(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[n, h, w] logits of the head -> [n, H, W] probabilities at the output size."""
    probs = upsample_masks(mask_logits[None]).sigmoid()
    probs = F.interpolate(probs, geometry.padded, mode="bilinear", align_corners=False)
    probs = probs[..., : geometry.image[0], : geometry.image[1]]
    return F.interpolate(probs, geometry.output, mode="bilinear", align_corners=False)[0]


def _chunks(count: int, geometry: ImageGeometry) -> Iterator[slice]:
    """Slices over kernels, such that a chunk's masks stay within MAX_MASK_ELEMENTS."""
    pixels = max(geometry.padded[0] * geometry.padded[1], geometry.output[0] * geometry.output[1])
    step = max(1, MAX_MASK_ELEMENTS // pixels)
    for start in range(0, count, step):
        yield slice(start, start + step)


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of bool masks: [n, H, W] -> float32 [n, 4] (x1, y1, x2, y2), 0 for an empty mask."""

    def extent(occupied: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        length = occupied.shape[1]
        index = torch.arange(length, device=occupied.device)
        first = torch.where(occupied, index, length).amin(dim=1)
        last = torch.where(occupied, index + 1, 0).amax(dim=1)
        return torch.minimum(first, last), last

    if len(masks) == 0:
        return torch.zeros(0, 4, device=masks.device)
    (x1, x2), (y1, y2) = extent(masks.any(dim=1)), extent(masks.any(dim=2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def instance_inference(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    geometry: ImageGeometry,
    *,
    max_instances: int,
    score_threshold: float = 0.0,
) -> Instances:
    """The best (kernel, class) pairs as instances.

    Args:
        class_logits: [N, T].
        mask_logits: [N, h, w], at the head's resolution.
        max_instances: number of pairs; one kernel can appear with several classes.
        score_threshold: pairs with a lower score are left out.

    Returns:
        Instances of the output size with pred_boxes, scores (falling), pred_classes and bool pred_masks; a mask can
        be empty.
    """
    num_classes = class_logits.shape[1]
    scores = class_logits.sigmoid().flatten()
    scores, pairs = scores.topk(min(max_instances, len(scores)))
    kept = scores >= score_threshold
    scores, pairs = scores[kept], pairs[kept]

    # A kernel's mask is computed once, however many classes it appears with
    kernels, owner = (pairs // num_classes).unique(return_inverse=True)
    masks = torch.zeros(len(kernels), *geometry.output, dtype=torch.bool, device=mask_logits.device)
    for chunk in _chunks(len(kernels), geometry):
        masks[chunk] = mask_probabilities(mask_logits[kernels[chunk]], geometry) > MASK_THRESHOLD

    return Instances(
        geometry.output,
        pred_boxes=Boxes(masks_to_boxes(masks)[owner]),
        scores=scores,
        pred_classes=pairs % num_classes,
        pred_masks=masks[owner],
    )


class PixelOwners(NamedTuple):
    """Which kernel wins each pixel.

    Attributes:
        owners: int64 [H, W].
        areas: int64 [N], pixels where a kernel's own mask has at least probability 0.5.
    """

    owners: torch.Tensor
    areas: torch.Tensor


def assign_pixels(scores: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry) -> PixelOwners:
    """Give each pixel to the kernel with the largest score * mask probability; a tie goes to the first one."""
    best = torch.full(geometry.output, -1.0, dtype=mask_logits.dtype, device=mask_logits.device)
    owners = torch.zeros(geometry.output, dtype=torch.int64, device=mask_logits.device)
    areas = []
    for chunk in _chunks(len(scores), geometry):
        probs = mask_probabilities(mask_logits[chunk], geometry)
        areas.append((probs >= MASK_THRESHOLD).sum(dim=(1, 2)))
        value, index = (probs * scores[chunk, None, None]).max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        owners = torch.where(better, index + chunk.start, owners)
    return PixelOwners(owners, torch.cat(areas))


def panoptic_inference(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    class_mask: torch.Tensor,
    geometry: ImageGeometry,
    *,
    num_things: int,
    category_ids: Sequence[int],
    thing_score_threshold: float = 0.3,
    overlap_threshold: float = 0.6,
) -> Tuple[torch.Tensor, List[Dict]]:
    """Merge all kernels' masks into one map without overlaps (paper, Sec. 3.3).

    Args:
        class_logits: [N, K].
        mask_logits: [N, h, w], at the head's resolution.
        class_mask: bool [N, K], the classes that each kernel can take.
        num_things: classes below this are things.
        category_ids: what to call each of the K classes.
        thing_score_threshold: a thing with a lower score is dropped. It takes part in the competition for pixels
            all the same: what it wins stays void.
        overlap_threshold: a kernel that wins a smaller part of its own mask's area is dropped.

    Returns:
        int32 [H, W] map of segment ids (0: void), and per segment "id", "isthing", "category_id", "score", "area".
    """
    scores, classes = class_logits.sigmoid().masked_fill(~class_mask, -1).max(dim=1)
    owners, mask_areas = assign_pixels(scores, mask_logits, geometry)
    areas = owners.flatten().bincount(minlength=len(scores))
    # A quotient, as float32 rounds threshold * area such that a part of exactly the threshold may seem smaller
    kept = (areas > 0) & (mask_areas > 0) & (areas / mask_areas >= overlap_threshold)
    kept &= (classes >= num_things) | (scores >= thing_score_threshold)

    order = scores.argsort(descending=True, stable=True)
    order = order[kept[order]]
    segment_of_kernel = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
    segment_of_kernel[order] = torch.arange(1, len(order) + 1, dtype=torch.int32, device=scores.device)

    columns = zip(classes[order].tolist(), scores[order].tolist(), areas[order].tolist())
    segments = [
        {"id": i, "isthing": c < num_things, "category_id": category_ids[c], "score": score, "area": area}
        for i, (c, score, area) in enumerate(columns, start=1)
    ]
    return segment_of_kernel[owners], segments


def semantic_inference(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, class_mask: torch.Tensor, geometry: ImageGeometry
) -> torch.Tensor:
    """Semantic scores of a model with a class branch: the sum over kernels of class times mask probabilities.

    Returns:
        [K, H, W].
    """
    scores = class_logits.sigmoid().masked_fill(~class_mask, 0)
    total = mask_logits.new_zeros(scores.shape[1], *geometry.output)
    for chunk in _chunks(len(scores), geometry):
        probs = mask_probabilities(mask_logits[chunk], geometry)
        total += (scores[chunk].T @ probs.flatten(1)).unflatten(1, geometry.output)
    return total
