"""Converts the outputs of a model ("instances", "panoptic_seg", "sem_seg") to predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances

from ..data.classes import ClassTable
from .prediction import Prediction, Segment


class Output(NamedTuple):
    """One kind of output that a model can have.

    Attributes:
        title: name in JSON files and for the user.
        masks: function (output, classes) -> (bool mask [H, W], label, score, and of videos track id) of each segment.
        size: function output -> (height, width).
    """

    title: str
    masks: Callable[[Any, ClassTable], Iterator[tuple[Any, ...]]]
    size: Callable[[Any], tuple[int, int]]


def _panoptic_masks(output: tuple[torch.Tensor, list[dict[str, Any]]], classes: ClassTable):
    ids, segments = output[0].cpu().numpy(), output[1]
    for x in segments:
        yield ids == x["id"], classes.label_of(x["category_id"], x["isthing"]), x["score"], x.get("track_id")


def _instance_masks(output: Instances, classes: ClassTable):
    output = output.to("cpu")
    columns = [output.pred_masks.numpy(), output.pred_classes.tolist(), output.scores.tolist()]
    yield from zip(*columns, *([output.track_ids.tolist()] if output.has("track_ids") else []))


def _semantic_masks(output: torch.Tensor, classes: ClassTable):
    # Channels after the classes, such as the background, are not segments; label_masks leaves them out.
    yield from label_masks(output.argmax(dim=0).cpu().numpy(), len(classes.names))


def label_masks(labels: np.ndarray, num_classes: int) -> Iterator[tuple[np.ndarray, int, None]]:
    """Yield the mask and the label of each class below ``num_classes`` that occurs in a label map [H, W]."""
    for label in np.unique(labels):
        if label < num_classes:
            yield labels == label, int(label), None


OUTPUTS: dict[str, Output] = {
    "panoptic_seg": Output("panoptic", _panoptic_masks, lambda output: tuple(output[0].shape)),
    "instances": Output("instances", _instance_masks, lambda output: output.image_size),
    "sem_seg": Output("semantic", _semantic_masks, lambda output: tuple(output.shape[-2:])),
}


def predictions_of(outputs: Mapping[str, Any], classes: ClassTable) -> dict[str, Prediction]:
    """Convert the outputs for one image to predictions, by key, in the order of MODEL.KNET.TEST.OUTPUTS."""
    return {key: _prediction(key, output, classes) for key, output in outputs.items()}


def main_prediction(outputs: Mapping[str, Any], classes: ClassTable) -> Prediction:
    """Return the prediction of the main output, which is the first one of MODEL.KNET.TEST.OUTPUTS."""
    return _prediction(*next(iter(outputs.items())), classes)


def _prediction(key: str, output: Any, classes: ClassTable) -> Prediction:
    segments = (Segment.from_mask(*item) for item in OUTPUTS[key].masks(output, classes))
    return Prediction(OUTPUTS[key].size(output), [segment for segment in segments if segment is not None], classes)


def draw_prediction(image: np.ndarray, outputs: Mapping[str, Any], classes: ClassTable) -> np.ndarray:
    """Draw the outputs for one image over it, uint8 RGB [H, W, 3]; see :func:`main_prediction`."""
    return main_prediction(outputs, classes).draw(image)
