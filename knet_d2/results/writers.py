"""Predictions as JSON and panoptic PNGs of the demo and of bulk prediction; demo/README.md describes their schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from panopticapi.utils import id2rgb

from .outputs import OUTPUTS, segments_info, track_entry
from .prediction import Prediction


def image_record(
    file_name: str,
    predictions: Mapping[str, Prediction],
    ids: Sequence[int],
    save_png: Callable[[np.ndarray], str],
) -> dict[str, Any]:
    """The predictions of one image, by output, as they stand in JSON.

    Args:
        ids: category_id of each class.
        save_png: saves a panoptic PNG, uint8 [H, W, 3], and returns its name.
    """
    height, width = next(iter(predictions.values())).size
    record: dict[str, Any] = {"file_name": file_name, "height": height, "width": width}
    for key, prediction in predictions.items():
        if key == "panoptic_seg":
            png = save_png(id2rgb(prediction.segment_map()))
            record[OUTPUTS[key].title] = {"file_name": png, "segments_info": segments_info(prediction, ids)}
        else:
            record[OUTPUTS[key].title] = _LISTS[key](prediction, ids)
    return record


def _instances(prediction: Prediction, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"category_id": ids[x.label], "score": x.score, "bbox": list(x.box), "segmentation": x.rle(), **track_entry(x)}
        for x in prediction.segments
    ]


def _semantic(prediction: Prediction, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"category_id": ids[x.label], "area": x.area, "segmentation": x.rle()} for x in prediction.segments]


_LISTS = {"instances": _instances, "sem_seg": _semantic}
