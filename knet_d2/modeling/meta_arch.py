"""K-Net as a Detectron2 meta architecture."""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import nn

from ..data.categories import resolve_classes
from ..errors import ConfigError, DataError
from .cascade import KernelUpdateCascade, static_predictions
from .criterion import KNetCriterion
from .fast_convolution import channels_last, fold_norms
from .postprocessing import ImageGeometry, instance_inference, panoptic_inference, semantic_inference
from .precision import no_autocast
from .resize import upsampled_size
from .static_kernels import build_auxiliary_head, build_static_kernels
from .structures import KernelBank, KernelState, StageOutput, Targets
from .targets import build_targets

# What each task can return; the first one is the default
TASK_OUTPUTS = {
    "instance": ("instances",),
    "panoptic": ("panoptic_seg", "instances", "sem_seg"),
    "semantic": ("sem_seg",),
}
# The paper tries up to 7; a typing error must not fill the memory
MOST_STAGES = 100


class ImagePrediction(NamedTuple):
    """What the network says of one image, before post-processing.

    Attributes:
        class_logits: [N, K], or None without a class branch.
        mask_logits: [N, h, w], at the head's resolution.
        geometry: sizes of the image.
    """

    class_logits: Optional[torch.Tensor]
    mask_logits: torch.Tensor
    geometry: ImageGeometry


def model_outputs(cfg) -> Tuple[str, ...]:
    """Keys of the results that a model of this config returns.

    Raises:
        ConfigError: unknown MODEL.KNET.TASK, or MODEL.KNET.TEST.OUTPUTS that the task does not have.
    """
    task, outputs = cfg.MODEL.KNET.TASK, tuple(cfg.MODEL.KNET.TEST.OUTPUTS)
    if task not in TASK_OUTPUTS:
        raise ConfigError(f"MODEL.KNET.TASK = {task!r}: use one of {list(TASK_OUTPUTS)}.")
    unknown = sorted(set(outputs) - set(TASK_OUTPUTS[task]))
    if unknown:
        raise ConfigError(f"MODEL.KNET.TEST.OUTPUTS has {unknown}: a {task} model gives {TASK_OUTPUTS[task]}.")
    return outputs or TASK_OUTPUTS[task][:1]


@META_ARCH_REGISTRY.register()
class KNet(nn.Module):
    """Unified segmentation with learned kernels (arXiv:2106.14855): backbone, static kernels, cascade, outputs."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor
    class_mask: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        cascade: KernelUpdateCascade,
        criterion: KNetCriterion,
        bank: KernelBank,
        auxiliary_head: Optional[nn.Module],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
        outputs: Sequence[str],
        output_stage: int,
        category_ids: Sequence[int],
        max_instances: int,
        score_threshold: float,
        thing_score_threshold: float,
        overlap_threshold: float,
    ):
        """
        Args:
            sem_seg_head: producer of the static kernels.
            bank: groups of the kernels.
            auxiliary_head: a second semantic head for training only, or None.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            outputs: what :meth:`forward` returns in evaluation, see TASK_OUTPUTS.
            output_stage: whose predictions these are: 0 the static kernels', 1 to S a stage's, -1 the last one's.
            category_ids: what the data set's metadata calls each of the K classes in panoptic results.
            max_instances, score_threshold: see :func:`instance_inference`.
            thing_score_threshold, overlap_threshold: see :func:`panoptic_inference`.
        """
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.cascade = cascade
        self.criterion = criterion
        self.auxiliary_head = auxiliary_head
        self.bank = bank
        self.input_format = input_format
        self.outputs = tuple(outputs)
        self.output_stage = output_stage
        self.category_ids = list(category_ids)
        self.max_instances = max_instances
        self.score_threshold = score_threshold
        self.thing_score_threshold = thing_score_threshold
        self.overlap_threshold = overlap_threshold
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("class_mask", bank.class_mask(), persistent=False)
        fold_norms(self)

    @classmethod
    def from_config(cls, cfg):
        outputs = model_outputs(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        resolve_classes(cfg)
        knet = cfg.MODEL.KNET
        least = 0 if knet.TASK == "semantic" else 1
        if not least <= knet.NUM_STAGES <= MOST_STAGES:
            stages = f"use {least} to {MOST_STAGES} for {knet.TASK} segmentation"
            raise ConfigError(f"MODEL.KNET.NUM_STAGES = {knet.NUM_STAGES}: {stages}.")
        if knet.TASK != "semantic" and knet.NUM_KERNELS < 1:
            raise ConfigError(f"MODEL.KNET.NUM_KERNELS = {knet.NUM_KERNELS}: use at least 1.")
        if not -1 <= knet.TEST.STAGE <= knet.NUM_STAGES:
            stages = f"-1, or 0 to {knet.NUM_STAGES} (MODEL.KNET.NUM_STAGES)"
            raise ConfigError(f"MODEL.KNET.TEST.STAGE = {knet.TEST.STAGE}: use {stages}.")
        bank = KernelBank.for_task(
            knet.TASK,
            num_kernels=knet.NUM_KERNELS,
            num_things=knet.NUM_THING_CLASSES,
            num_stuff=knet.NUM_STUFF_CLASSES,
        )
        if cfg.TEST.DETECTIONS_PER_IMAGE < 0:
            raise ConfigError(f"TEST.DETECTIONS_PER_IMAGE = {cfg.TEST.DETECTIONS_PER_IMAGE}: use 0 or more.")
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        return {
            "backbone": backbone,
            "sem_seg_head": build_static_kernels(cfg, shape, bank),
            "cascade": KernelUpdateCascade(cfg, bank.num_classes),
            "criterion": KNetCriterion(cfg, bank),
            "bank": bank,
            "auxiliary_head": build_auxiliary_head(cfg, shape, bank),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "outputs": outputs,
            "output_stage": knet.TEST.STAGE,
            "category_ids": [*knet.THING_CATEGORY_IDS, *knet.STUFF_CATEGORY_IDS],
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_threshold": knet.TEST.SCORE_THRESHOLD,
            "thing_score_threshold": knet.TEST.THING_SCORE_THRESHOLD,
            "overlap_threshold": knet.TEST.OVERLAP_THRESHOLD,
        }

    @property
    def device(self) -> torch.device:
        """Where images are moved to."""
        return self.pixel_mean.device

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this; 0 or 1: to the largest of the batch only."""
        return max(self.backbone.size_divisibility, self.sem_seg_head.size_divisibility)

    def forward(
        self, batched_inputs: List[Dict], do_postprocess: bool = True
    ) -> "Dict[str, torch.Tensor] | List[Dict] | List[ImagePrediction]":
        """
        Args:
            batched_inputs: per image a dict with "image" (C, H, W in the order of INPUT.FORMAT, 0 .. 255); for
                training "instances" (gt_classes, gt_masks) and / or "sem_seg" ([H, W], classes over things, then
                stuff); for inference optionally "height" and "width" of the result.
            do_postprocess: False gives an :class:`ImagePrediction` per image in evaluation, for :meth:`results`.

        Returns:
            In training a dict of weighted losses. In evaluation per image a dict with some of

            * "instances": Instances with pred_boxes, scores, pred_classes, pred_masks;
            * "panoptic_seg": int32 [H, W] map of segment ids and list of segment infos;
            * "sem_seg": [K, H, W] scores.
        """
        if not self.training and self.bank.num_matched == 0 and len({x["image"].shape for x in batched_inputs}) > 1:
            # The semantic models see no padding: an image's result must not depend on its neighbours
            return [result for x in batched_inputs for result in self([x], do_postprocess)]
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(channels_last(images.tensor))
        state = self.sem_seg_head(features)
        stages = self.cascade(state)
        if self.training:
            auxiliary_logits = None if self.auxiliary_head is None else self.auxiliary_head(features)
            targets = self.prepare_targets(batched_inputs, images, state)
            return self.criterion(state, stages, targets, auxiliary_logits)
        if not do_postprocess:
            return self.image_predictions(state, stages, batched_inputs, images)
        return self.postprocess(state, stages, batched_inputs, images)

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Normalise, then pad with 0 at the right and bottom."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        for image, x in zip(images, batched_inputs):
            if image.dim() != 3 or image.shape[0] != len(self.pixel_mean):
                raise DataError(
                    f"{x.get('file_name', 'image')}: shape {tuple(image.shape)}, expected ({len(self.pixel_mean)}, "
                    f"height, width) in the order of INPUT.FORMAT = {self.input_format}."
                )
        # In float32 also for a float64 model: pixels are bytes, and every precision then sees the same image
        mean, std = self.pixel_mean.float(), self.pixel_std.float()
        images = [((image.float() - mean) / std).to(self.pixel_mean.dtype) for image in images]
        return ImageList.from_tensors(images, self.size_divisibility)

    def prepare_targets(self, batched_inputs: List[Dict], images: ImageList, state: KernelState) -> List[Targets]:
        """Ground truth of every image at the sizes that the losses need."""
        padded_size = tuple(images.tensor.shape[-2:])
        mask_size = upsampled_size(state.mask_logits)
        ignore_value = self.criterion.ignore_value
        return [
            build_targets(x, padded_size, mask_size, self.bank, ignore_value, images.tensor) for x in batched_inputs
        ]

    def postprocess(
        self, state: KernelState, stages: List[StageOutput], batched_inputs: List[Dict], images: ImageList
    ) -> List[Dict]:
        """The results of every image, from the stage that TEST.STAGE names."""
        return [self.results(x) for x in self.image_predictions(state, stages, batched_inputs, images)]

    def image_predictions(
        self, state: KernelState, stages: List[StageOutput], batched_inputs: List[Dict], images: ImageList
    ) -> List[ImagePrediction]:
        """What the stage that TEST.STAGE names says of every image."""
        shown = self.select_stage(state, stages)
        predictions = []
        for i, x in enumerate(batched_inputs):
            image_size = tuple(images.image_sizes[i])
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            geometry = ImageGeometry(tuple(images.tensor.shape[-2:]), image_size, output_size)
            class_logits = None if shown.class_logits is None else shown.class_logits[i]
            predictions.append(ImagePrediction(class_logits, shown.mask_logits[i], geometry))
        return predictions

    def results(self, prediction: ImagePrediction) -> Dict:
        """What :meth:`forward` returns for an image in evaluation."""
        with no_autocast(prediction.mask_logits):
            return {key: self._result(key, *prediction) for key in self.outputs}

    def select_stage(self, state: KernelState, stages: List[StageOutput]) -> StageOutput:
        """The predictions that TEST.STAGE names."""
        stage = self.output_stage % (len(stages) + 1)
        return stages[stage - 1] if stage else static_predictions(state)

    def _result(self, key: str, class_logits: Optional[torch.Tensor], mask_logits: torch.Tensor, geometry):
        if key == "instances":
            matched = slice(self.bank.num_matched)
            return instance_inference(
                class_logits[matched, : self.bank.num_things],
                mask_logits[matched],
                geometry,
                max_instances=self.max_instances,
                score_threshold=self.score_threshold,
            )
        if key == "panoptic_seg":
            return panoptic_inference(
                class_logits,
                mask_logits,
                self.class_mask,
                geometry,
                num_things=self.bank.num_things,
                category_ids=self.category_ids,
                thing_score_threshold=self.thing_score_threshold,
                overlap_threshold=self.overlap_threshold,
            )
        if class_logits is not None:
            return semantic_inference(class_logits, mask_logits, self.class_mask, geometry)
        logits = F.interpolate(mask_logits[None], geometry.padded, mode="bilinear", align_corners=False)[0]
        return sem_seg_postprocess(logits, geometry.image, *geometry.output)
