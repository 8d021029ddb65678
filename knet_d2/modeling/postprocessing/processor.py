"""The object that makes the results of an image, in Detectron2's forms."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import nn

from ...errors import ConfigError
from ...tasks import KernelBank, get_task
from ..layers import no_autocast
from . import cells, dense
from .resize import ImageGeometry, resize
from .rules import PixelFunctions, best_pairs, masks_to_boxes, panoptic, semantic_scores
from .scores import SUPPRESSED, thing_scores


class ImageLogits(NamedTuple):
    """The network's output for one image at one stage, before post-processing.

    Attributes:
        class_logits: [N, K], or None without a class branch.
        mask_logits: [N, h, w], at the head's resolution.
        geometry: sizes of the image.
        embeddings: [N, E], by which objects are followed: those of the network's output, else its kernels. None for the
            mean of several views (test-time augmentation).
        kernels: [N, C], of the last stage, for the memory of a video model; None likewise.
    """

    class_logits: torch.Tensor | None
    mask_logits: torch.Tensor
    geometry: ImageGeometry
    embeddings: torch.Tensor | None = None
    kernels: torch.Tensor | None = None


class ResultOptions(NamedTuple):
    """Which results are made from logits, and how.

    Attributes:
        outputs: keys of the results: "instances", "panoptic_seg", "sem_seg".
        stage: the stage whose logits are used, see :func:`knet_d2.modeling.cascade.select_stage`.
        max_instances: number of (kernel, class) pairs that become instances.
        score_threshold: pairs with a lower score are left out; None keeps all of them, for graphs and batches.
        thing_score_threshold, overlap_threshold: see :func:`.rules.panoptic`.
        score_exponent, mask_nms: ``exponent`` and ``max_iou`` of :func:`.scores.thing_scores`.
    """

    outputs: tuple[str, ...]
    stage: int
    max_instances: int
    score_threshold: float | None
    thing_score_threshold: float
    overlap_threshold: float
    score_exponent: float
    mask_nms: float


class PostProcessor(nn.Module):
    """Makes the results of an image from its logits."""

    class_mask: torch.Tensor

    @configurable
    def __init__(self, *, bank: KernelBank, category_ids: Sequence[int], options: ResultOptions):
        """
        Args:
            bank: groups of the kernels.
            category_ids: contiguous ids of the K classes in the data set's metadata, for panoptic results.
            options: the options of a call without any.
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
        for key in ("SCORE_THRESHOLD", "THING_SCORE_THRESHOLD", "OVERLAP_THRESHOLD"):
            if not 0 <= test[key] <= 1:
                raise ConfigError(f"MODEL.KNET.TEST.{key} = {test[key]}: use 0 to 1.")
        if not 0 < test.MASK_NMS <= 1:
            raise ConfigError(f"MODEL.KNET.TEST.MASK_NMS = {test.MASK_NMS}: use an IoU above 0, up to 1 (off).")
        if not test.SCORE_EXPONENT >= 0:
            raise ConfigError(f"MODEL.KNET.TEST.SCORE_EXPONENT = {test.SCORE_EXPONENT}: use 0 (off) or more.")
        options = ResultOptions(
            outputs=get_task(cfg).checked_outputs(test.OUTPUTS),
            stage=test.STAGE,
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            score_threshold=test.SCORE_THRESHOLD,
            thing_score_threshold=test.THING_SCORE_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            score_exponent=test.SCORE_EXPONENT,
            mask_nms=test.MASK_NMS,
        )
        return {
            "bank": bank,
            "category_ids": [*knet.THING_CATEGORY_IDS, *knet.STUFF_CATEGORY_IDS],
            "options": options,
        }

    def forward(self, logits: ImageLogits, options: ResultOptions | None = None) -> dict[str, Any]:
        """The results of one image by their keys, see :meth:`knet_d2.modeling.meta_arch.KNet.forward`.

        Args:
            options: replace the model's own options; their ``stage`` is not read here.
        """
        options = options or self.options
        return {output: self._result(output, logits, options)[0] for output in options.outputs}

    def with_embeddings(self, output: str, logits: ImageLogits) -> tuple[Any, torch.Tensor]:
        """Return one result, "instances" or "panoptic_seg", with the embeddings of its segments, [n, E].

        The embeddings are in the order of the instances, or of the list of segments.
        """
        result, rows = self._result(output, logits, self.options)
        count = len(result) if output == "instances" else len(result[1])
        assert logits.embeddings is not None
        return result, logits.embeddings[rows[:count]]

    def _result(self, output: str, logits: ImageLogits, options: ResultOptions) -> tuple[Any, torch.Tensor]:
        """Return a result in Detectron2's form, and which kernel each of its rows is from (except for "sem_seg")."""
        class_logits, mask_logits, geometry = logits[:3]
        with no_autocast(mask_logits):
            found = self.tensors(output, class_logits, mask_logits, geometry, options, pixel_functions(mask_logits))
        return as_result(output, found, geometry.output, self.bank.num_things, self.category_ids), found[-1]

    def tensors(
        self,
        output: str,
        class_logits: torch.Tensor | None,
        mask_logits: torch.Tensor,
        geometry: ImageGeometry,
        options: ResultOptions,
        pixels: PixelFunctions,
    ) -> tuple[torch.Tensor, ...]:
        """One result as tensors. Exported graphs call this too: what changes a result belongs here.

        "..." stands for nothing (one image), or B images of one size with functions of pixels that take them.

        Args:
            output: key of the result.
            class_logits: [..., N, K], or None without a class branch.
            mask_logits: [..., N, h, w].

        Returns:
            "instances": scores [..., n], falling, SUPPRESSED for rows to leave out; labels int64 [..., n]; boxes
                [..., n, 4]; masks bool [..., n, H, W]; kernels int64 [..., n], which kernel each is from.
            "panoptic_seg": segment map, scores, classes, areas and kernels, see :func:`.rules.panoptic`.
            "sem_seg": scores [..., K, H, W]; with class logits, of one image only.
        """
        return _TENSORS[output](self, class_logits, mask_logits, geometry, options, pixels)

    def _thing_scores(self, class_scores, mask_logits, geometry, options) -> torch.Tensor:
        matched, things = slice(self.bank.num_matched), slice(self.bank.num_things)
        return thing_scores(
            class_scores[..., matched, things],
            mask_logits[..., matched, :, :],
            geometry,
            exponent=options.score_exponent,
            max_iou=options.mask_nms,
        )

    def _instance_tensors(self, class_logits, mask_logits, geometry, options, pixels) -> tuple[torch.Tensor, ...]:
        scores = self._thing_scores(class_logits.sigmoid(), mask_logits, geometry, options)
        scores, kernels, labels = best_pairs(scores, options.max_instances)
        if options.score_threshold is not None:
            kept = ((scores >= options.score_threshold) & (scores > SUPPRESSED)).nonzero()[:, 0]
            scores, kernels, labels = scores[kept], kernels[kept], labels[kept]
        masks = pixels.binary_masks(mask_logits[..., : self.bank.num_matched, :, :], kernels, geometry)
        return scores, labels, masks_to_boxes(masks), masks, kernels

    def _panoptic_tensors(self, class_logits, mask_logits, geometry, options, pixels) -> tuple[torch.Tensor, ...]:
        class_scores = class_logits.sigmoid()
        scores = self._thing_scores(class_scores, mask_logits, geometry, options)
        # Suppressed kernels claim no pixel; the stuff classes of the matched kernels are not read
        of_things = F.pad(scores.clamp(min=0), (0, self.bank.num_classes - self.bank.num_things))
        class_scores = torch.cat([of_things, class_scores[..., self.bank.num_matched :, :]], dim=-2)
        return panoptic(
            class_scores,
            mask_logits,
            self.class_mask,
            geometry,
            pixels,
            num_things=self.bank.num_things,
            thing_score_threshold=options.thing_score_threshold,
            overlap_threshold=options.overlap_threshold,
        )

    def _semantic_tensors(self, class_logits, mask_logits, geometry, options, pixels) -> tuple[torch.Tensor, ...]:
        if class_logits is None:  # each kernel is a class
            return (resize(mask_logits.flatten(0, -3), geometry).unflatten(0, mask_logits.shape[:-2]),)
        return (semantic_scores(class_logits, mask_logits, self.class_mask, geometry),)


_TENSORS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "instances": PostProcessor._instance_tensors,
    "panoptic_seg": PostProcessor._panoptic_tensors,
    "sem_seg": PostProcessor._semantic_tensors,
}


def as_result(
    output: str, tensors: Sequence[torch.Tensor], size: tuple[int, int], num_things: int, category_ids: Sequence[int]
) -> Any:
    """The tensors of a result of one image, see :meth:`PostProcessor.tensors`, in Detectron2's form.

    Args:
        size: (height, width) of the image.
        category_ids: contiguous ids of the classes in the data set's metadata; the first ``num_things`` are things.

    Returns:
        "instances": Instances with pred_boxes, scores (falling), pred_classes and bool pred_masks, maybe none.
        "panoptic_seg": int32 [H, W] map of segment ids (0: void); of each id, isthing, category_id, score, area.
        "sem_seg": the tensor as it is.
    """
    if output == "instances":
        scores, labels, boxes, masks = tensors[:4]
        return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels, pred_masks=masks)
    if output == "sem_seg":
        return tensors[0]
    segment_map, *columns = tensors[:4]
    rows = enumerate(zip(*(x.tolist() for x in columns)), start=1)
    segments = [
        {"id": i, "isthing": c < num_things, "category_id": category_ids[c], "score": score, "area": area}
        for i, (score, c, area) in rows
        if area
    ]
    return segment_map, segments


def pixel_functions(mask_logits: torch.Tensor) -> PixelFunctions:
    """The fastest implementation for the masks' device.

    A CPU is fast where few pixels are computed; an accelerator where few operations are launched.
    """
    return cells if mask_logits.device.type == "cpu" else dense
