"""Converts the results of a model to predictions, by output ("instances", "panoptic_seg", "sem_seg")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..data.classes import ClassTable
from .prediction import Prediction
from .segment import Segment


class Output(NamedTuple):
    """A kind of result.

    Attributes:
        title: name in JSON files and for the user.
        masks: function (result, classes) -> (bool mask [H, W], label, score, and of videos track id) of each segment.
        size: function result -> (height, width).
    """

    title: str
    masks: Callable[[Any, ClassTable], Iterator[tuple[Any, ...]]]
    size: Callable[[Any], tuple[int, int]]


def _panoptic_masks(result: tuple[torch.Tensor, list[dict[str, Any]]], classes: ClassTable):
    ids, segments = result[0].cpu().numpy(), result[1]
    for x in segments:
        yield ids == x["id"], classes.label_of(x["category_id"], x["isthing"]), x["score"], x.get("track_id")


def _instance_masks(result: Instances, classes: ClassTable):
    result = result.to("cpu")
    columns = [result.pred_masks.numpy(), result.pred_classes.tolist(), result.scores.tolist()]
    yield from zip(*columns, *([result.track_ids.tolist()] if result.has("track_ids") else []))


def _semantic_masks(result: torch.Tensor, classes: ClassTable):
    # Scores [K, H, W], or the label map of an exported model. Channels after the classes, such as the background, are
    # not segments; label_masks leaves them out.
    labels = result if result.dim() == 2 else result.argmax(dim=0)
    yield from label_masks(labels.cpu().numpy(), len(classes.names))


def label_masks(labels: np.ndarray, num_classes: int) -> Iterator[tuple[np.ndarray, int, None]]:
    """Yield the mask and the label of each class below ``num_classes`` that occurs in a label map [H, W]."""
    for label in np.unique(labels):
        if label < num_classes:
            yield labels == label, int(label), None


OUTPUTS: dict[str, Output] = {
    "panoptic_seg": Output("panoptic", _panoptic_masks, lambda result: tuple(result[0].shape)),
    "instances": Output("instances", _instance_masks, lambda result: result.image_size),
    "sem_seg": Output("semantic", _semantic_masks, lambda result: tuple(result.shape[-2:])),
}


def predictions_of(results: Mapping[str, Any], classes: ClassTable) -> dict[str, Prediction]:
    """Convert the results for one image to predictions, by output, in the order of MODEL.KNET.TEST.OUTPUTS."""
    return {output: _prediction(output, result, classes) for output, result in results.items()}


def main_prediction(results: Mapping[str, Any], classes: ClassTable) -> Prediction:
    """Return the prediction of the main output, which is the first one of MODEL.KNET.TEST.OUTPUTS."""
    return _prediction(*next(iter(results.items())), classes)


def _prediction(output: str, result: Any, classes: ClassTable) -> Prediction:
    segments = (Segment.from_mask(*item) for item in OUTPUTS[output].masks(result, classes))
    found = [segment for segment in segments if segment is not None]
    return Prediction(OUTPUTS[output].size(result), found, classes).named()


def result_of(output: str, prediction: Prediction) -> Any:
    """The opposite: a prediction in Detectron2's form, as evaluators take it.

    Instances have "rles" in place of "pred_masks", because the image may be large; semantic results are label maps.
    """
    return _RESULTS[output](prediction)


def _as_instances(prediction: Prediction) -> Instances:
    segments = prediction.segments
    boxes = torch.tensor([x.box for x in segments], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        prediction.size,
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([x.score for x in segments], dtype=torch.float32),
        pred_classes=torch.tensor([x.label for x in segments], dtype=torch.int64),
        rles=[x.rle() for x in segments],
    )


def _as_panoptic(prediction: Prediction) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    return torch.from_numpy(prediction.segment_map()), segments_info(prediction, prediction.classes.category_ids)


def segments_info(prediction: Prediction, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The segments of a panoptic map as COCO's "segments_info"; ids: category_id of each class."""
    return [
        {
            "id": i,
            "category_id": ids[x.label],
            "isthing": x.label < prediction.classes.num_things,
            "score": x.score,
            "area": x.area,
            **track_entry(x),
        }
        for i, x in enumerate(prediction.segments, start=1)
    ]


def track_entry(segment: Segment) -> dict[str, int]:
    """The id of a segment in a video, as an entry of its record; nothing for images."""
    return {} if segment.track_id is None else {"track_id": segment.track_id}


_RESULTS: dict[str, Callable[[Prediction], Any]] = {
    "panoptic_seg": _as_panoptic,
    "instances": _as_instances,
    "sem_seg": lambda prediction: torch.from_numpy(prediction.class_map(void=len(prediction.classes.names))),
}


def draw_prediction(image: np.ndarray, results: Mapping[str, Any], classes: ClassTable) -> np.ndarray:
    """Draw the main result for an image over it, uint8 RGB [H, W, 3]; see :func:`main_prediction`."""
    return main_prediction(results, classes).draw(image)
