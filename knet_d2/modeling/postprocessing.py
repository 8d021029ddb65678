"""From the last stage's logits to instances, a panoptic map or semantic logits: pure functions of tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from ..errors import ConfigError
from ..tasks import KernelBank, get_task
from .layers import no_autocast
from .mask_cells import Cells, ImageGeometry, upsampled_probabilities

MASK_THRESHOLD = 0.5
# Bounds the memory of semantic_inference beside its result
CLASSES_AT_ONCE = 8


class ImagePrediction(NamedTuple):
    """What the network says of one image, before post-processing.

    Attributes:
        class_logits: [N, K], or None without a class branch.
        mask_logits: [N, h, w], at the head's resolution.
        geometry: sizes of the image.
    """

    class_logits: torch.Tensor | None
    mask_logits: torch.Tensor
    geometry: ImageGeometry


class ResultOptions(NamedTuple):
    """Which results are made of a prediction, and how.

    Attributes:
        outputs: keys of the results: "instances", "panoptic_seg", "sem_seg".
        stage: whose predictions these are, see :func:`knet_d2.modeling.cascade.select_stage`.
        max_instances, score_threshold: see :func:`instance_inference`.
        thing_score_threshold, overlap_threshold: see :func:`panoptic_inference`.
    """

    outputs: tuple[str, ...]
    stage: int = -1
    max_instances: int = 100
    score_threshold: float = 0.0
    thing_score_threshold: float = 0.3
    overlap_threshold: float = 0.6


class PostProcessor(nn.Module):
    """Makes the results of an image from what the network predicts for it."""

    class_mask: torch.Tensor

    @configurable
    def __init__(self, *, bank: KernelBank, category_ids: Sequence[int], options: ResultOptions):
        """
        Args:
            bank: groups of the kernels.
            category_ids: what the data set's metadata calls each of the K classes in panoptic results.
            options: those of results that are asked for without any.
        """
        super().__init__()
        self.bank = bank
        self.category_ids = list(category_ids)
        self.options = options
        self.register_buffer("class_mask", bank.class_mask(), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, bank: KernelBank) -> dict[str, Any]:
        knet, test = cfg.MODEL.KNET, cfg.MODEL.KNET.TEST
        if not -1 <= test.STAGE <= knet.NUM_STAGES:
            stages = f"-1, or 0 to {knet.NUM_STAGES} (MODEL.KNET.NUM_STAGES)"
            raise ConfigError(f"MODEL.KNET.TEST.STAGE = {test.STAGE}: use {stages}.")
        if cfg.TEST.DETECTIONS_PER_IMAGE < 0:
            raise ConfigError(f"TEST.DETECTIONS_PER_IMAGE = {cfg.TEST.DETECTIONS_PER_IMAGE}: use 0 or more.")
        options = ResultOptions(
            outputs=get_task(cfg).checked_outputs(test.OUTPUTS),
            stage=test.STAGE,
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            score_threshold=test.SCORE_THRESHOLD,
            thing_score_threshold=test.THING_SCORE_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
        )
        return {
            "bank": bank,
            "category_ids": [*knet.THING_CATEGORY_IDS, *knet.STUFF_CATEGORY_IDS],
            "options": options,
        }

    def forward(self, prediction: ImagePrediction, options: ResultOptions | None = None) -> dict[str, Any]:
        """The results of one image by their keys, see :meth:`knet_d2.modeling.meta_arch.KNet.forward`.

        Args:
            options: other ones than the model's own; their ``stage`` is not read here.
        """
        options = options or self.options
        makers = {"instances": self._instances, "panoptic_seg": self._panoptic_seg, "sem_seg": self._sem_seg}
        with no_autocast(prediction.mask_logits):
            return {key: makers[key](*prediction, options) for key in options.outputs}

    def _instances(self, class_logits, mask_logits, geometry: ImageGeometry, options: ResultOptions) -> Instances:
        matched = slice(self.bank.num_matched)
        return instance_inference(
            class_logits[matched, : self.bank.num_things],
            mask_logits[matched],
            geometry,
            max_instances=options.max_instances,
            score_threshold=options.score_threshold,
        )

    def _panoptic_seg(self, class_logits, mask_logits, geometry: ImageGeometry, options: ResultOptions):
        return panoptic_inference(
            class_logits,
            mask_logits,
            self.class_mask,
            geometry,
            num_things=self.bank.num_things,
            category_ids=self.category_ids,
            thing_score_threshold=options.thing_score_threshold,
            overlap_threshold=options.overlap_threshold,
        )

    def _sem_seg(self, class_logits, mask_logits, geometry: ImageGeometry, options: ResultOptions) -> torch.Tensor:
        if class_logits is not None:
            return semantic_inference(class_logits, mask_logits, self.class_mask, geometry)
        logits = F.interpolate(mask_logits[None], geometry.padded, mode="bilinear", align_corners=False)[0]
        return sem_seg_postprocess(logits, geometry.image, *geometry.output)


def mask_probabilities(mask_logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[n, h, w] logits of the head -> [n, H, W] probabilities at the output size, all at once."""
    return _resize(upsampled_probabilities(mask_logits), geometry)


def _resize(maps: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """[n, 2h, 2w] -> [n, H, W]: what follows the sigmoid."""
    maps = F.interpolate(maps[None], geometry.padded, mode="bilinear", align_corners=False)
    maps = maps[..., : geometry.image[0], : geometry.image[1]]
    return F.interpolate(maps, geometry.output, mode="bilinear", align_corners=False)[0]


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: torch.device) -> torch.Tensor:
    """Zeros for a large result. NumPy asks for huge pages: on a CPU up to 4 times as fast as torch.zeros."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=getattr(torch, dtype.name), device=device)


@torch.no_grad()
def binary_masks(mask_logits: torch.Tensor, copies: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Where probabilities are above the threshold.

    Args:
        mask_logits: [N, h, w].
        copies: int64 [M], in 0 .. N - 1: index of the kernel that each output mask shows.

    Returns:
        bool [M, H, W].
    """
    cells = Cells(mask_logits, geometry)
    masks = _zeros((len(copies), *geometry.output), np.dtype(bool), mask_logits.device)
    full = cells.low > MASK_THRESHOLD
    cells.fill(masks, full[copies])
    kernels, mixed = ((cells.high > MASK_THRESHOLD) & ~full).nonzero(as_tuple=True)
    for part in cells.chunks([1] * len(mixed)):
        computed = cells.resize(kernels[part, None], mixed[part])[:, 0] > MASK_THRESHOLD
        shown, chosen = (copies[:, None] == kernels[part]).nonzero(as_tuple=True)
        pixels = cells.pixels(mixed[part][chosen], shown)
        masks.view(-1).scatter_(0, pixels.flatten(), computed[chosen].flatten())
    return masks


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of bool masks: [n, H, W] -> float32 [n, 4] (x1, y1, x2, y2), 0 for an empty mask."""

    def extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


@torch.no_grad()
def assign_pixels(scores: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Give each pixel to the kernel with the largest score * mask probability; a tie goes to the first one.

    Returns:
        int32 [H, W], kernels.
    """
    # A kernel whose best pixel is worse than the worst one of another kernel wins nothing in a cell
    best, worst = scores[:, None] * cells.high, scores[:, None] * cells.low
    competes = ~(best < worst.amax(dim=0))
    kernels_by_cell = competes.T.nonzero()[:, 1]
    counts, stops = competes.sum(dim=0), competes.sum(dim=0).cumsum(dim=0)
    # Cells with about as many kernels are computed together
    counts, order = counts.sort()
    counts_list = counts.tolist()
    owners = _zeros(cells.output, np.dtype("int32"), scores.device)
    for part in cells.chunks(counts_list):
        chosen, most = order[part], counts_list[part.stop - 1]
        # Shorter lists repeat their last kernel, which changes no maximum
        place = torch.arange(most, device=scores.device).minimum(counts[part, None] - 1)
        kernels = kernels_by_cell[stops[chosen, None] - counts[part, None] + place]
        claims = cells.resize(kernels, chosen, scores[kernels])
        # Descending codes make amax() pick the first kernel on ties; on a CPU, amax() is ten times as fast as max()
        # with indices
        codes = torch.arange(most, 0, -1, dtype=torch.float, device=scores.device)
        winning = claims.ge_(claims.amax(dim=1, keepdim=True)).float()
        winners = most - winning.mul_(codes[:, None]).amax(dim=1).clamp_(min=1)  # where something is NaN nobody wins
        pixels = cells.pixels(chosen, torch.zeros_like(chosen))
        owners.view(-1).scatter_(0, pixels.flatten(), kernels.gather(1, winners.long()).int().flatten())
    return owners


@torch.no_grad()
def mask_areas(kernels: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Pixels where a kernel's own mask has at least probability 0.5: int64 [n] -> int64 [n]."""
    full = cells.low[kernels] >= MASK_THRESHOLD
    rows, mixed = ((cells.high[kernels] >= MASK_THRESHOLD) & ~full).nonzero(as_tuple=True)
    areas = (full * cells.areas).sum(dim=1)
    for part in cells.chunks([1] * len(mixed)):
        covered = cells.resize(kernels[rows[part], None], mixed[part])[:, 0] >= MASK_THRESHOLD
        # On a CPU, counting in floats, which are exact here, is five times as fast as in integers
        covered = (covered & cells.inside(mixed[part])).sum(dim=1, dtype=torch.float)
        areas.index_add_(0, rows[part], covered.long())
    return areas


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
) -> tuple[torch.Tensor, list[dict]]:
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
    cells = Cells(mask_logits, geometry)
    owners = assign_pixels(scores, cells)
    areas = owners.flatten().bincount(minlength=len(scores))
    order = scores.argsort(descending=True, stable=True)
    candidates = (areas > 0) & ((classes >= num_things) | (scores >= thing_score_threshold))
    order = order[candidates[order]]
    own_areas = mask_areas(order, cells)
    # A quotient, as float32 rounds threshold * area such that a part of exactly the threshold may seem smaller
    order = order[(own_areas > 0) & (areas[order] / own_areas >= overlap_threshold)]
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
    probs = upsampled_probabilities(mask_logits)
    # Resizing is linear, so that sums take the place of masks
    sums = (scores.T @ probs.flatten(1)).unflatten(1, probs.shape[1:])
    total = mask_logits.new_empty(len(sums), *geometry.output)
    for few, part in zip(sums.split(CLASSES_AT_ONCE), total.split(CLASSES_AT_ONCE)):
        part.copy_(_resize(few, geometry))
    return total
