"""From the last stage's logits to instances, a panoptic map or semantic logits: pure functions of tensors."""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances

from .sampling import ImageGeometry, Tiles, Workspace, upsampled_probabilities

MASK_THRESHOLD = 0.5


def mask_probabilities(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[n, h, w] logits of the head -> [n, H, W] probabilities at the output size, all at once."""
    probs = upsampled_probabilities(mask_logits)[None]
    probs = F.interpolate(probs, geometry.padded, mode="bilinear", align_corners=False)
    probs = probs[..., : geometry.image[0], : geometry.image[1]]
    return F.interpolate(probs, geometry.output, mode="bilinear", align_corners=False)[0]


def _zeros(shape: Tuple[int, ...], dtype: np.dtype, device: torch.device) -> torch.Tensor:
    """Zeros for a large result. NumPy asks for huge pages: on a CPU 4 times as fast as torch.zeros for 100 masks."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=getattr(torch, dtype.name), device=device)


@torch.no_grad()
def binary_masks(mask_logits: torch.Tensor, copies: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Where probabilities are above the threshold.

    Args:
        mask_logits: [N, h, w].
        copies: int64 [M], in 0 .. N - 1: whose mask each one of the result is.

    Returns:
        bool [M, H, W].
    """
    probs = upsampled_probabilities(mask_logits)
    tiles, workspace = Tiles(probs, geometry), Workspace(probs)
    masks = _zeros((len(copies), *geometry.output), np.dtype(bool), mask_logits.device)
    low, high = tiles.bounds()
    low, high = low.amin(dim=2) > MASK_THRESHOLD, high.amax(dim=2) > MASK_THRESHOLD
    # On the CPU, so that a device is waited for once and not in every tile
    full, mixed, copies = low.cpu(), (high & ~low).cpu(), copies.cpu()
    position = mixed.cumsum(dim=0) - 1
    for t, tile in enumerate(tiles):
        tile_masks = tile.of(masks)
        tile_masks[full[copies, t].nonzero()[:, 0]] = True
        kernels = mixed[:, t].nonzero()[:, 0].to(probs.device)
        computed = tile.resize(probs, kernels, workspace) > MASK_THRESHOLD
        shown = mixed[copies, t].nonzero()[:, 0]
        tile_masks[shown] = computed[position[copies[shown], t]]
    return masks


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of bool masks: [n, H, W] -> float32 [n, 4] (x1, y1, x2, y2), 0 for an empty mask."""

    def extent(occupied: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        length = occupied.shape[1]
        index = torch.arange(length, device=occupied.device)
        first = torch.where(occupied, index, length).amin(dim=1)
        last = torch.where(occupied, index + 1, 0).amax(dim=1)
        return torch.minimum(first, last), last

    if masks.numel() == 0:
        return torch.zeros(len(masks), 4, device=masks.device)
    pixels = masks.view(torch.uint8)  # any() of bools is 20 times as slow on a CPU
    (x1, x2), (y1, y2) = extent(pixels.amax(dim=1).bool()), extent(pixels.amax(dim=2).bool())
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
    kernels, copies = (pairs // num_classes).unique(return_inverse=True)
    masks = binary_masks(mask_logits[kernels], copies, geometry)

    return Instances(
        geometry.output,
        pred_boxes=Boxes(masks_to_boxes(masks)),
        scores=scores,
        pred_classes=pairs % num_classes,
        pred_masks=masks,
    )


class PixelOwners(NamedTuple):
    """Which kernel wins each pixel.

    Attributes:
        owners: int32 [H, W].
        areas: int64 [N], pixels where a kernel's own mask has at least probability 0.5.
    """

    owners: torch.Tensor
    areas: torch.Tensor


@torch.no_grad()
def assign_pixels(scores: torch.Tensor, mask_logits: torch.Tensor, geometry: ImageGeometry) -> PixelOwners:
    """Give each pixel to the kernel with the largest score * mask probability; a tie goes to the first one."""
    probs, device = upsampled_probabilities(mask_logits), mask_logits.device
    tiles, workspace = Tiles(probs, geometry), Workspace(probs)
    low, high = tiles.bounds()
    full, empty = low.amin(dim=2) >= MASK_THRESHOLD, high.amax(dim=2) < MASK_THRESHOLD
    mixed = ~(full | empty)  # also where something is NaN, as below
    # A kernel whose best pixel is worse than the worst one of another kernel wins nothing in a cell
    best, worst = scores[:, None, None] * high, scores[:, None, None] * low
    competes = ~(best < worst.amax(dim=0)).all(dim=2) & ~mixed
    # Those whose areas have to be counted come first; a device is waited for once
    counted, others = ([tile.nonzero()[:, 0] for tile in choice.T] for choice in torch.stack([mixed, competes]).cpu())
    owners = _zeros(geometry.output, np.dtype("int32"), device)
    sizes = torch.tensor([tile.of(owners).numel() for tile in tiles], device=device)
    areas = (full * sizes).sum(dim=1)
    # Codes fall, so that of those that tie the largest is the first kernel's. On a CPU, amax is three times as fast as
    # max with indices, and counting in floats (exact up to 2^24 pixels) five times as fast as in integers.
    codes = torch.arange(len(scores), 0, -1, dtype=scores.dtype, device=device)
    table = torch.stack([scores, codes])
    for t, tile in enumerate(tiles):
        kernels = torch.cat([counted[t], others[t]]).to(device)
        masks = tile.resize(probs, kernels, workspace)
        area = masks[: len(counted[t])]
        area = torch.ge(area, MASK_THRESHOLD, out=workspace.take("area", *area.shape)).flatten(1)
        areas.index_add_(0, kernels[: len(area)], area.sum(dim=1, dtype=torch.float).long())
        kernel_scores, kernel_codes = table.index_select(1, kernels)[..., None, None]
        claims = masks.mul_(kernel_scores)
        winners = claims.ge_(claims.amax(dim=0)).mul_(kernel_codes).amax(dim=0)
        tile.of(owners).copy_(len(scores) - winners.clamp_(min=1))  # where something is NaN nobody wins
    return PixelOwners(owners, areas)


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
    return segment_of_kernel.index_select(0, owners.flatten()).view(geometry.output), segments


@torch.no_grad()
def semantic_inference(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, class_mask: torch.Tensor, geometry: ImageGeometry
) -> torch.Tensor:
    """Semantic scores of a model with a class branch: the sum over kernels of class times mask probabilities.

    Returns:
        [K, H, W].
    """
    scores = class_logits.sigmoid().masked_fill(~class_mask, 0)
    total = mask_logits.new_empty(scores.shape[1], *geometry.output)
    probs, kernels = upsampled_probabilities(mask_logits), torch.arange(len(mask_logits), device=mask_logits.device)
    workspace = Workspace(probs)
    for tile in Tiles(probs, geometry):
        masks = tile.resize(probs, kernels, workspace)
        tile.of(total).copy_((scores.T @ masks.flatten(1)).unflatten(1, masks.shape[1:]))
    return total
