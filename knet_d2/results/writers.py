"""Writes predictions to the JSON and PNG files of the demo; demo/README.md describes their schema."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..data.classes import ClassTable, categories
from .outputs import OUTPUTS
from .prediction import Prediction
from .segment import Segment


def panoptic_png(segment_map: np.ndarray) -> np.ndarray:
    """Convert a map of segment ids [H, W] to COCO's RGB picture, uint8 [H, W, 3]: id = R + 256 G + 65536 B."""
    ids = segment_map.astype(np.uint32)
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


class JsonWriter:
    """Writes the results of each image to a JSON file, and panoptic PNGs to a folder beside it.

    The file is valid JSON after each image, so it can be read if the program ends early.
    """

    def __init__(self, path: str, info: Mapping[str, Any], classes: ClassTable):
        """
        Args:
            path: path of the JSON file.
            info: description of the model.
            classes: classes of the model.
        """
        self._png_folder = os.path.splitext(path)[0] + "_panoptic"
        self._count = 0
        self._file = open(path, "w")
        head = json.dumps({"info": dict(info), "categories": categories(classes), "images": []})
        self._file.write(head)
        self._file.flush()
        self._end = len(head) - len("]}")  # json.dumps writes ASCII, so one character is one byte

    def add(self, file_name: str, predictions: Mapping[str, Prediction]) -> None:
        """Write the predictions of one image, by output."""
        ids = next(iter(predictions.values())).classes.category_ids
        text = (", " if self._count else "") + json.dumps(image_record(file_name, predictions, ids, self._save_png))
        self._file.seek(self._end)
        self._file.write(text + "]}")
        self._file.flush()
        self._end += len(text)
        self._count += 1

    def _save_png(self, pixels: np.ndarray) -> str:
        os.makedirs(self._png_folder, exist_ok=True)
        name = f"{self._count:06d}.png"
        Image.fromarray(pixels).save(os.path.join(self._png_folder, name))
        return name

    def close(self) -> None:
        self._file.close()


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
            record[OUTPUTS[key].title] = _panoptic(prediction, ids, save_png(panoptic_png(prediction.segment_map())))
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
