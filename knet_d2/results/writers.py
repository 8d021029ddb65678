"""Predictions as JSON and panoptic PNGs of the demo and of bulk prediction; demo/README.md describes their schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from panopticapi.utils import id2rgb

from .outputs import OUTPUTS
from .prediction import Prediction
from .segment import Segment


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
            record[OUTPUTS[key].title] = _panoptic(prediction, ids, save_png(id2rgb(prediction.segment_map())))
        else:
            record[OUTPUTS[key].title] = _LISTS[key](prediction, ids)
    return record


def _instances(prediction: Prediction, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"category_id": ids[x.label], "score": x.score, "bbox": list(x.box), "segmentation": x.rle(), **_track(x)}
        for x in prediction.segments
    ]


def _semantic(prediction: Prediction, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"category_id": ids[x.label], "area": x.area, "segmentation": x.rle()} for x in prediction.segments]


def _panoptic(prediction: Prediction, ids: Sequence[int], png: str) -> dict[str, Any]:
    segments = [
        {
            "id": i,
            "category_id": ids[x.label],
            "isthing": x.label < prediction.classes.num_things,
            "score": x.score,
            "area": x.area,
            **_track(x),
        }
        for i, x in enumerate(prediction.segments, start=1)
    ]
    return {"file_name": png, "segments_info": segments}


def _track(segment: Segment) -> dict[str, int]:
    """The id of a segment in a video."""
    return {} if segment.track_id is None else {"track_id": segment.track_id}


_LISTS = {"instances": _instances, "sem_seg": _semantic}
