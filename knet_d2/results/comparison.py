"""Pictures that show the ground truth beside the prediction, for images of a data set."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

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
    mapper, classes = build_mapper(cfg, False), class_table(cfg)
    pictures = {}
    training = model.training
    model.eval()
    try:
        for record in spread(load_dataset(cfg.DATASETS.TEST[0], "DATASETS.TEST"), number):
            with torch.no_grad():
                outputs = model([mapper(record)])[0]
            image = read_picture(record["file_name"], mapper.pixel_format)
            truth = ground_truth(cfg, record).draw(image)
            drawn = main_prediction(outputs, classes).confident(_PICTURE_SCORE).draw(image)
            gap = np.full((truth.shape[0], _GAP, 3), 255, np.uint8)
            pictures[os.path.basename(record["file_name"])] = np.concatenate([truth, gap, drawn], axis=1)
    finally:
        model.train(training)
    # Matplotlib's figures contain reference cycles, so Python would free them only after hundreds of pictures.
    gc.collect()
    return pictures
