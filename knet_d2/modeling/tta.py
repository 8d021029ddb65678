"""Test-time augmentation (TEST.AUG): one result from several sizes of an image and their mirror images.

Semantic models: the class probabilities of all views are averaged at every pixel, as in the official multi-scale test.
Instance and panoptic models: an instance kernel specialises in a location, so the same kernel can represent different
objects in different views. Therefore the instance kernels of each view are matched one-to-one to those of the plain
view, which is the image without augmentation, and matched kernels are averaged. Kernels that stand for a class are
matched to themselves.

Views are computed one after the other. The memory holds the plain view, one other view and the sums, at the resolution
of the head (semantic models: the sum, at the resolution of the result).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from scipy.optimize import linear_sum_assignment
from torch import nn

from ..data.augmentation import ResizeTransform
from ..data.pixels import whole_as_bytes
from ..errors import ConfigError
from ..tasks import KernelBank, get_task
from .layers import no_autocast, sample
from .postprocessing import ImageGeometry, ImageLogits

# Lowest mask IoU of two kernels that are taken for the same object
MIN_IOU = 0.5


class View(NamedTuple):
    """The size and orientation in which the model gets an image.

    Attributes:
        size: (height, width) that the image is resized to.
        flipped: whether it is mirrored, left to right.
    """

    size: tuple[int, int]
    flipped: bool


class KNetWithTTA(nn.Module):
    """A K-Net with test-time augmentation; it is called as the model is, and returns what the model returns.

    Semantic models give probabilities instead of logits.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: TEST.AUG.MIN_SIZES, MAX_SIZE and FLIP say which views there are beside the plain one, which is of
                INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.
            model: a KNet, or one wrapped for distributed training.
        """
        super().__init__()
        augmentation = cfg.TEST.AUG
        sizes = tuple(augmentation.MIN_SIZES)
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ConfigError(
                f"TEST.AUG.MIN_SIZES is {sizes}; name the lengths of the shorter side in pixels, as (400, 800)."
            )
        self.model: Any = getattr(model, "module", model)
        self._plain = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._others = [(size, augmentation.MAX_SIZE) for size in sizes]
        self._flip = augmentation.FLIP
        # Kernels that each stand for a class, without a class branch, need no merging: their results are averaged
        self._merges_kernels = get_task(cfg).has_class_branch

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: as for the model; an "image" is best given in its original size, since it is resized to
                every view's. Without "height" and "width" the result has its size.
        """
        return [self._predict(x) for x in batched_inputs]

    def views(self, height: int, width: int) -> list[View]:
        """The views of an image of this size: the plain one first, then the others, from large to small."""
        plain = View(_resized(height, width, *self._plain), False)
        sizes = [_resized(height, width, *limits) for limits in self._others]
        others = {View(size, flipped) for size in sizes for flipped in (False, True)[: 1 + self._flip]} - {plain}
        return [plain, *sorted(others, key=lambda view: (-view.size[0] * view.size[1], view))]

    def _predict(self, x: dict[str, Any]) -> dict[str, Any]:
        # Images are resized in the type of their file; Detectron2's own predictor passes floats
        pixels = whole_as_bytes(x["image"].permute(1, 2, 0).cpu().numpy())
        height, width = pixels.shape[:2]
        output_size = {"height": x.get("height", height), "width": x.get("width", width)}
        views = self.views(height, width)
        shown = ({**x, **output_size, "image": _show(pixels, view)} for view in views)
        logits = (self.model([sample], do_postprocess=False)[0] for sample in shown)
        flips = [view.flipped for view in views]
        if not self._merges_kernels:
            return {"sem_seg": self._mean_probabilities(logits, flips)}
        return self.model.postprocessor(merge_views(logits, flips, self.model.bank))

    def _mean_probabilities(self, logits: Iterator[ImageLogits], flips: list[bool]) -> torch.Tensor:
        """[K, H, W]."""
        total: Any = 0.0
        for view, flipped in zip(logits, flips):
            probs = self.model.postprocessor(view)["sem_seg"].softmax(dim=0)
            total += probs.flip(-1) if flipped else probs
        return total / len(flips)


def _resized(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Size of a resized image; 0 for the shorter side leaves it as it is, as in Detectron2."""
    return T.ResizeShortestEdge.get_output_shape(height, width, shorter, longest) if shorter else (height, width)


def _show(pixels: np.ndarray, view: View) -> torch.Tensor:
    """[H, W, C] -> [C, h, w]."""
    resized = ResizeTransform(*pixels.shape[:2], *view.size).apply_image(pixels)
    if view.flipped:
        resized = resized[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))


# ---- instance and panoptic models ------------------------------------------------------------------------------


def merge_views(views: Iterator[ImageLogits], flips: list[bool], bank: KernelBank) -> ImageLogits:
    """The mean of the views of an image.

    Args:
        views: their logits; the plain view first, which is not flipped, then the others, the largest first.
        flips: which views show the mirrored image.

    Returns:
        The plain view's kernels, with masks as fine as the finest view's. Kernels without a match in any other view
        stay as they are.
    """
    plain = next(views)
    merged = None
    for view, flipped in zip(views, flips[1:]):
        with no_autocast(plain.mask_logits):
            if merged is None:
                finest = max(plain, view, key=lambda x: x.mask_logits[0].numel())
                merged = _MergedViews(plain, finest, bank)
            merged.add(view, flipped)
    return plain if merged is None else merged.mean()


class _MergedViews:
    """Sums over the views: for each kernel of the plain view, the classes and masks of the kernels matched to it."""

    def __init__(self, plain: ImageLogits, finest: ImageLogits, bank: KernelBank):
        self._bank = bank
        height, width = finest.mask_logits.shape[-2:]
        self._size, self._geometry = (height, width), finest.geometry
        self._plain_scores = self._thing_scores(plain)
        mask_logits = self._on_grid(plain, flipped=False)
        self._plain_masks = self._inside(mask_logits > 0)
        self._classes, self._masks = _LogitMean(plain.class_logits), _LogitMean(mask_logits)

    def add(self, view: ImageLogits, flipped: bool) -> None:
        matched = self._bank.num_matched
        mask_logits = self._on_grid(view, flipped)
        masks = self._inside(mask_logits > 0)
        rows, columns = match_kernels(
            self._plain_masks[:matched], self._plain_scores, masks[:matched], self._thing_scores(view)
        )
        fixed = torch.arange(matched, self._bank.num_kernels, device=rows.device)
        rows, columns = torch.cat([rows, fixed]), torch.cat([columns, fixed])
        self._classes.add(view.class_logits[columns], rows)
        self._masks.add(mask_logits[columns], rows)

    def mean(self) -> ImageLogits:
        return ImageLogits(self._classes.logits(), self._masks.logits(), self._geometry)

    def _thing_scores(self, view: ImageLogits) -> torch.Tensor:
        return view.class_logits[: self._bank.num_matched, : self._bank.num_things].sigmoid()

    def _on_grid(self, view: ImageLogits, flipped: bool) -> torch.Tensor:
        """[N, *size]; the values outside of the image have no meaning."""
        return resample_masks(view.mask_logits, view.geometry, self._size, self._geometry, flipped)

    def _inside(self, masks: torch.Tensor) -> torch.Tensor:
        """[N, P], only the pixels of the grid that are in the image."""
        height, width = (
            -(-count * image // padded)
            for count, image, padded in zip(self._size, self._geometry.image, self._geometry.padded)
        )
        return masks[:, :height, :width].flatten(1)


class _LogitMean:
    """Mean of probabilities that are given and returned as logits, because probabilities near 0 and 1 are rounded.

    It adds up p and 1 - p as logarithms. Their difference is the logit of the mean for any number of summands.
    """

    def __init__(self, logits: torch.Tensor):
        self._yes, self._no = F.logsigmoid(logits), F.logsigmoid(-logits)

    def add(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        self._yes[rows] = torch.logaddexp(self._yes[rows], F.logsigmoid(logits))
        self._no[rows] = torch.logaddexp(self._no[rows], F.logsigmoid(-logits))

    def logits(self) -> torch.Tensor:
        return self._yes - self._no


def match_kernels(
    masks: torch.Tensor, scores: torch.Tensor, other_masks: torch.Tensor, other_scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-to-one matches of the kernels of two views, by the IoU of their masks times the agreement of their classes.

    The agreement is the product of the class probabilities, summed over the classes. So where several kernels share an
    object, which one-to-one matching would otherwise confuse, the best one is matched to the best one.

    Args:
        masks, other_masks: bool [N, P] of the same P pixels.
        scores, other_scores: [N, T], probabilities of the thing classes.

    Returns:
        indices of matched kernels, int64 [M] each.
    """
    a, b = masks.to(scores.dtype), other_masks.to(scores.dtype)
    common = a @ b.T
    iou = common / (a.sum(dim=1)[:, None] + b.sum(dim=1) - common).clamp(min=1)
    affinity = torch.where(iou >= MIN_IOU, iou * (scores @ other_scores.T), 0.0).cpu()
    rows, columns = (torch.from_numpy(x) for x in linear_sum_assignment(affinity.numpy(), maximize=True))
    kept = affinity[rows, columns] > 0
    return rows[kept].to(masks.device), columns[kept].to(masks.device)


def resample_masks(
    mask_logits: torch.Tensor,
    source: ImageGeometry,
    size: tuple[int, ...],
    target: ImageGeometry,
    flipped: bool,
) -> torch.Tensor:
    """Masks of one view on the grid of another one.

    Args:
        mask_logits: [N, h, w].
        source: sizes of the view of the masks.
        size: (height, width) of the grid.
        target: sizes of the view of the grid.
        flipped: whether the masks are of the mirrored image.

    Returns:
        [N, *size], bilinear.
    """
    if not flipped and tuple(mask_logits.shape[-2:]) == size and source[:2] == target[:2]:
        return mask_logits
    axes = []
    for axis, mirrored in enumerate((False, flipped)):
        # Positions of the grid's points in the image, whose sides are 0 to 1
        points = (torch.arange(size[axis], dtype=torch.float64) + 0.5) / size[axis]
        points = points * target.padded[axis] / target.image[axis]
        points = 1 - points if mirrored else points
        # Positions in the grid of the masks, whose sides are also 0 to 1
        axes.append(points * source.image[axis] / source.padded[axis])
    y, x = torch.meshgrid(*axes, indexing="ij")
    return sample(mask_logits[None], torch.stack([x, y], dim=-1).to(mask_logits)[None])[0]
