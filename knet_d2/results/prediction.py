"""The prediction for one image: its segments, also as COCO records and as a picture."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..data.classes import ClassTable, categories
from ..errors import ConfigError
from .pictures import draw_segments
from .segment import Segment

MASK_FORMATS = ("rle", "polygons")


class Prediction(NamedTuple):
    """The segments of one image.

    Attributes:
        size: (height, width) of the image.
        segments: instances in descending order of score, panoptic segments, or the semantic classes of the image.
        classes: table of the classes that labels refer to.
    """

    size: tuple[int, int]
    segments: list[Segment]
    classes: ClassTable

    def confident(self, threshold: float) -> Prediction:
        """Return the prediction without things whose score is below a threshold."""
        things = self.classes.num_things
        kept = [x for x in self.segments if x.label >= things or x.score is None or x.score >= threshold]
        return self._replace(segments=kept)

    def masks(self) -> np.ndarray:
        """Return the masks of all segments, bool [n, H, W]."""
        masks = np.zeros((len(self.segments), *self.size), bool)
        for mask, segment in zip(masks, self.segments):
            mask[segment.window] = segment.crop
        return masks

    def segment_map(self) -> np.ndarray:
        """Return 1 + the index of the segment at each pixel, int32 [H, W]; 0 for pixels without a segment.

        Where instances overlap, the one with the highest score is taken.
        """
        found = np.zeros(self.size, np.int32)
        for number in range(len(self.segments), 0, -1):
            segment = self.segments[number - 1]
            found[segment.window][segment.crop] = number
        return found

    def to_coco(self, masks: str = "rle") -> list[dict[str, Any]]:
        """Return the segments in COCO's result format without "image_id"; the result can be written as JSON.

        "category_id" is the id in the data set's files, or Detectron2's contiguous id if the weights do not give it.

        Args:
            masks: format of "segmentation": "rle", or "polygons", which lose the holes of masks.

        Raises:
            ConfigError: the format is unknown.
        """
        if masks not in MASK_FORMATS:
            raise ConfigError(f"masks = {masks!r}: use one of {MASK_FORMATS}; for arrays, call Prediction.masks().")
        ids = self.classes.dataset_ids or self.classes.category_ids
        return [
            {
                "category_id": ids[segment.label],
                "category_name": self.classes.names[segment.label],
                "score": segment.score,
                "bbox": list(segment.box),
                "area": segment.area,
                "segmentation": segment.rle() if masks == "rle" else segment.polygons(),
            }
            for segment in self.segments
        ]

    def to_coco_file(self, file_name: str) -> dict[str, Any]:
        """Make the content of a COCO file for this image, which pycocotools can read; annotations have scores.

        Args:
            file_name: file name of the image.
        """
        records = enumerate(self.to_coco(), start=1)
        return {
            "images": [{"id": 1, "file_name": file_name, "height": self.size[0], "width": self.size[1]}],
            "categories": [{**x, "id": x["dataset_id"]} for x in categories(self.classes)],
            "annotations": [{"id": i, "image_id": 1, "iscrowd": 0, **record} for i, record in records],
        }

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Paint the segments over their image, uint8 RGB [H, W, 3]; a small image is enlarged."""
        return draw_segments(image, self.segments, self.classes)
