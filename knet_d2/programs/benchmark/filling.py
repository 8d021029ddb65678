"""Random weights with which a model does as much work as with trained weights, and counts of what it finds."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.modeling.roi_heads import cascade_rcnn, fast_rcnn
from torch import nn

from ...modeling.structures import StageOutput
from .models import Subject

# Weight of the last norm in each ResNet block: with 1, the activations of an untrained ResNet grow with each block,
# because norms in eval mode do not normalise, and the model finds nothing.
LAST_NORM_WEIGHT = 0.3
# Numbers of (box, class) pairs per image for the NMS of Detectron2's models; the first that gives enough detections is
# used.
NUM_CANDIDATES = (300, 400, 600, 800, 1200, 1600, 2400, 4000)
# (mean, standard deviation) of the mask logits and class logits of the kernels
MASK_LOGITS = (-6.0, 3.0)
CLASS_LOGITS = (-4.0, 1.5)


def fill(subject: Subject, inputs: list[dict[str, Any]]) -> None:
    """Set the weights and thresholds of a model so that it finds as many objects in these inputs as it may find."""
    model = subject.model
    damp_residual_blocks(model)
    with torch.no_grad():
        if subject.is_knet:
            for stage in model.cascade.stages:
                _fill_stage(model, stage, inputs)
        elif hasattr(model, "roi_heads"):
            _set_thresholds(subject, inputs)


def damp_residual_blocks(model: nn.Module) -> None:
    """Set the last norm of each residual block to LAST_NORM_WEIGHT."""
    for block in model.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            norm = (block.conv2 if isinstance(block, BasicBlock) else block.conv3).norm
            nn.init.constant_(norm.weight, LAST_NORM_WEIGHT)


def _fill_stage(model: nn.Module, stage: Any, inputs: list[dict[str, Any]]) -> None:
    """Set the weights of a stage so that its kernels differ in their pixels and in their classes."""
    seen: dict[str, torch.Tensor] = {}

    def remember(module: nn.Module, name: str):
        return module.register_forward_pre_hook(lambda module, args: seen.__setitem__(name, args[0][0].float()))

    hooks = [remember(stage, "feature"), remember(stage.mask_branch[-1], "mask")]
    if stage.class_branch is not None:
        hooks.append(remember(stage.class_branch[-1], "class"))
    model(inputs)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(seen["feature"])

    if stage.class_branch is not None:
        logits = CLASS_LOGITS[1] * normal(len(seen["class"]), stage.class_branch[-1].out_features)
        _fit(stage.class_branch[-1], seen["class"], logits, CLASS_LOGITS[0])

    pixels = stage.feature_transform(seen["feature"].flatten(1).T)
    mean = pixels.mean(0)
    dynamic_kernels = normal(len(seen["mask"]), len(mean))
    dynamic_kernels -= torch.outer(dynamic_kernels @ mean / mean.square().sum(), mean)  # logit 0 for the mean pixel
    dynamic_kernels *= MASK_LOGITS[1] / (dynamic_kernels @ pixels.T).std()
    _fit(stage.mask_branch[-1], seen["mask"], dynamic_kernels, MASK_LOGITS[0] * mean / mean.square().sum())


def _fit(linear: nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor, offset: "torch.Tensor | float") -> None:
    """Set the weights of a linear layer so that it maps inputs [N, C] to about outputs [N, D] + offset."""
    center = inputs.mean(0)
    weight = (torch.linalg.pinv(inputs - center, rtol=1e-5) @ outputs).T
    linear.weight.copy_(weight)
    linear.bias.copy_(offset - weight @ center)


def _set_thresholds(subject: Subject, inputs: list[dict[str, Any]]) -> None:
    """Lower the score threshold of the boxes until every image has the largest allowed number of detections."""
    model, wanted = subject.model, subject.cfg.TEST.DETECTIONS_PER_IMAGE
    model.combine_instances_score_thresh = 0.0  # Panoptic FPN: all detections enter the map
    _set_score_threshold(model, float("inf"))
    with candidate_scores() as scores:
        model(inputs)
    sorted_scores = [image.flatten().sort(descending=True).values for image in scores]
    for count in NUM_CANDIDATES:
        _set_score_threshold(model, min(float(image[min(count, len(image)) - 1]) for image in sorted_scores))
        if all(len(result["instances"]) == wanted for result in model(inputs)):
            return


def _set_score_threshold(model: Any, threshold: float) -> None:
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        predictor.test_score_thresh = threshold


@contextlib.contextmanager
def candidate_scores() -> Iterator[list[torch.Tensor]]:
    """Collect, per image, the scores [R, K] of all boxes and classes from which Detectron2 chooses detections."""
    collected: list[torch.Tensor] = []
    original = fast_rcnn.fast_rcnn_inference

    def collecting(boxes, scores, *args):
        collected.extend(image[:, :-1] for image in scores)
        return original(boxes, scores, *args)

    fast_rcnn.fast_rcnn_inference = cascade_rcnn.fast_rcnn_inference = collecting
    try:
        yield collected
    finally:
        fast_rcnn.fast_rcnn_inference = cascade_rcnn.fast_rcnn_inference = original


def count_findings(subject: Subject, inputs: list[dict[str, Any]]) -> dict[str, int]:
    """Count what the model finds in the first image.

    Returns:
        Those of "candidates", "kernels", "masks", "segments" and "classes" that the model has.
    """
    model, counts = subject.model, {}
    seen: list[StageOutput] = []
    hooks = [model.cascade.register_forward_hook(lambda *args: seen.extend(args[2]))] if subject.is_knet else []
    with torch.no_grad(), candidate_scores() as scores:
        results = model(inputs)
    for hook in hooks:
        hook.remove()
    if scores:
        predictors = model.roi_heads.box_predictor
        last: Any = predictors[-1] if isinstance(predictors, nn.ModuleList) else predictors
        counts["candidates"] = int((scores[0] > last.test_score_thresh).sum())
    result = results[0] if isinstance(results, list) else {}
    if "instances" in result:
        counts["masks"] = int(result["instances"].pred_masks.flatten(1).any(1).sum())
        if seen:
            logits = seen[-1].class_logits[0, : model.bank.num_matched, : model.bank.num_things]
            pairs = logits.flatten().topk(len(result["instances"])).indices
            counts["kernels"] = len((pairs // logits.shape[1]).unique())
    if "panoptic_seg" in result:
        counts["segments"] = len(result["panoptic_seg"][1])
    if list(result) == ["sem_seg"]:
        counts["classes"] = len(result["sem_seg"].argmax(0).unique())
    return counts
