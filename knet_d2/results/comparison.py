"""Pictures that show the ground truth beside the prediction, for images of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..data import build_mapper, load_dataset
from ..data.classes import class_table
from ..data.files import read_picture
from ..data.mapper import build_truth_mapper
from .outputs import label_masks, main_prediction
from .prediction import Prediction
from .segment import Segment
from .video import VideoDrawer

_GAP = 4
# Validation pictures do not show things below this score.
_PICTURE_SCORE = 0.3


def ground_truth(cfg: CfgNode, record: dict[str, Any]) -> Prediction:
    """Return the annotations of a record that the model of ``cfg`` learns from."""
    example, classes = build_truth_mapper(cfg, [])(record), class_table(cfg)
    found: list[Segment | None] = []
    if "sem_seg" in example:
        # label_masks takes only labels below the number of classes, so the ignore value gives no segment.
        masks = label_masks(example["sem_seg"].numpy(), len(classes.names))
        found += [Segment.from_mask(*item) for item in masks if item[1] >= classes.num_things]
    if "instances" in example:
        things = example["instances"]
        found += [Segment.from_mask(*x) for x in zip(things.gt_masks.tensor.numpy(), things.gt_classes.tolist())]
    segments = [segment for segment in found if segment is not None]
    return Prediction(tuple(example["image"].shape[-2:]), segments, classes)


def spread(records: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return at most ``number`` records, evenly spaced in the list."""
    places = np.linspace(0, len(records) - 1, min(number, len(records))).astype(int)
    return [records[i] for i in np.unique(places)]


def draw_validation_pictures(cfg: CfgNode, model: nn.Module, number: int) -> dict[str, np.ndarray]:
    """Draw the ground truth beside the prediction for ``number`` evenly spaced images of the first test set.

    Returns:
        Pictures by the names of the image files, uint8 RGB [H, W, 3].
    """
    records = spread(load_dataset(cfg.DATASETS.TEST[0], "DATASETS.TEST"), number)
    names = [os.path.basename(record["file_name"]) for record in records]
    return dict(zip(names, draw_comparisons(cfg, model, records), strict=True))


def draw_comparisons(
    cfg: CfgNode,
    model: nn.Module,
    records: Iterable[dict[str, Any]],
    min_score: float | None = None,
    size: int | None = None,
) -> Iterator[np.ndarray]:
    """Draw the ground truth beside the prediction for each record.

    Args:
        min_score: things with a lower score are not shown; None: 0.3.
        size: a fast drawing of small pictures, whose longer side has at most this number of pixels; None: a fine one.

    Yields:
        Pictures, uint8 RGB [H, W, 3].
    """
    mapper, classes = build_mapper(cfg, False), class_table(cfg)
    min_score = _PICTURE_SCORE if min_score is None else min_score
    training = model.training
    model.eval()
    try:
        for record in records:
            with torch.no_grad():
                outputs = model([mapper(record)])[0]
            image = read_picture(record["file_name"], mapper.pixel_format)
            truth, found = ground_truth(cfg, record), main_prediction(outputs, classes).confident(min_score)
            left, right = (_draw_at(image, prediction, size) for prediction in (truth, found))
            gap = np.full((left.shape[0], _GAP, 3), 255, np.uint8)
            yield np.concatenate([left, gap, right], axis=1)
    finally:
        model.train(training)


def _draw_at(image: np.ndarray, prediction: Prediction, size: int | None) -> np.ndarray:
    if size is None:
        return prediction.draw(image)
    factor = min(1.0, size / max(prediction.size))
    height, width = (max(1, round(factor * x)) for x in prediction.size)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    masks = (cv2.resize(x.mask.astype(np.uint8), (width, height)) > 0 for x in prediction.segments)
    segments = [Segment.from_mask(mask, x.label, x.score) for mask, x in zip(masks, prediction.segments)]
    shrunk = Prediction((height, width), [x for x in segments if x is not None], prediction.classes)
    return VideoDrawer(prediction.classes).draw(image, shrunk)
