"""The prediction for one image: its segments, also as COCO records and as a picture."""

from __future__ import annotations

import io
import os
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.classes import ClassTable, categories
from ..errors import ConfigError, DataError
from .pictures import draw_segments
from .segment import Segment

MASK_FORMATS = ("rle", "polygons")


class Prediction(NamedTuple):
    """The segments of one image.

    Attributes:
        size: (height, width) of the image.
        segments: instances in descending order of score, panoptic segments, or the semantic classes of the image.
        classes: table of the classes that labels refer to.
        picture: the image to look at, uint8 RGB [H, W, 3]; None where it was not kept.
    """

    size: tuple[int, int]
    segments: list[Segment]
    classes: ClassTable
    picture: np.ndarray | None = None

    def __repr__(self) -> str:
        counts = Counter(self.classes.names[x.label] for x in self.segments)
        found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        return f"Prediction({self.size[0]} x {self.size[1]}: {found})"

    def named(self) -> Prediction:
        """Return the prediction with the names of the classes in the segments."""
        return self._replace(segments=[x._replace(name=self.classes.names[x.label]) for x in self.segments])

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

        Where instances overlap, the one with the highest score is taken. For classes, see :meth:`class_map`.
        """
        found = np.zeros(self.size, np.int32)
        for number in range(len(self.segments), 0, -1):
            segment = self.segments[number - 1]
            found[segment.window][segment.crop] = number
        return found

    def class_map(self, void: int = -1) -> np.ndarray:
        """Return the class at each pixel, int32 [H, W]: an index of ``classes.names``.

        Args:
            void: value of pixels without a segment; label maps of data sets often have 255.
        """
        labels = np.array([void, *(x.label for x in self.segments)], np.int32)
        return labels[self.segment_map()]

    def to_coco(self, masks: str = "rle", image_id: int = 0) -> list[dict[str, Any]]:
        """Return the segments in COCO's result format; the result can be written as JSON.

        "category_id" is the id in the data set's files, or Detectron2's contiguous id if the weights do not give it.

        Args:
            masks: format of "segmentation": "rle", or "polygons", which lose the holes of masks.
            image_id: id of the image in the data set's files.

        Raises:
            ConfigError: the format is unknown.
        """
        if masks not in MASK_FORMATS:
            raise ConfigError(f"masks = {masks!r}: use one of {MASK_FORMATS}; for arrays, call Prediction.masks().")
        ids = self.classes.file_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[segment.label],
                "category_name": self.classes.names[segment.label],
                "score": segment.score,
                "bbox": list(segment.box),
                "area": segment.area,
                "segmentation": segment.rle() if masks == "rle" else segment.polygons(),
            }
            for segment in self.segments
        ]

    def to_coco_file(self, file_name: str, masks: str = "rle") -> dict[str, Any]:
        """Make the content of a COCO file for this image, which pycocotools can read; annotations have scores.

        Args:
            file_name: file name of the image.
            masks: see :meth:`to_coco`.
        """
        records = enumerate(self.to_coco(masks, image_id=1), start=1)
        return {
            "images": [{"id": 1, "file_name": file_name, "height": self.size[0], "width": self.size[1]}],
            "categories": [{**x, "id": x["dataset_id"]} for x in categories(self.classes)],
            "annotations": [{"id": i, "iscrowd": 0, **record} for i, record in records],
        }

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Paint the segments over their image, uint8 RGB [H, W, 3]; a small image is enlarged."""
        return draw_segments(image, self.segments, self.classes)

    def drawn(self) -> np.ndarray:
        """The segments over the picture, uint8 RGB [H, W, 3].

        Raises:
            DataError: the picture was not kept.
        """
        if self.picture is None:
            raise DataError("This prediction has no picture: call draw(image), with the image as uint8 RGB [H, W, 3].")
        return self.draw(self.picture)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the drawn picture to an image file."""
        try:
            Image.fromarray(self.drawn()).save(path)
        except ValueError as error:
            raise DataError(f"{os.fspath(path)}: {error}. Use a name that ends in .png or .jpg.") from error

    def show(self) -> None:
        """Show the drawn picture in the viewer of the system."""
        Image.fromarray(self.drawn()).show()

    def _repr_png_(self) -> bytes | None:
        """What notebooks display."""
        if self.picture is None:
            return None
        file = io.BytesIO()
        Image.fromarray(self.drawn()).save(file, "PNG")
        return file.getvalue()

    def to_supervision(self) -> Any:
        """Return the segments as Detections of the package supervision.

        Raises:
            ConfigError: the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ConfigError("to_supervision needs a package: pip install supervision.") from error
        boxes = np.array([x.box for x in self.segments], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([np.nan if x.score is None else x.score for x in self.segments], np.float32)
        return supervision.Detections(
            xyxy=boxes,
            mask=self.masks(),
            confidence=scores,
            class_id=np.array([x.label for x in self.segments], int),
            data={"class_name": np.array([self.classes.names[x.label] for x in self.segments], str)},
        )
