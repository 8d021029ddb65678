"""What is found in one image: segments with masks as arrays, COCO RLE or polygons."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util

from ..data.classes import ClassTable
from ..errors import ConfigError
from .pictures import draw_segments

MASK_FORMATS = ("rle", "polygons")


class Segment(NamedTuple):
    """An object, a stuff region or a semantic class of an image; its mask is kept within its bounding box only.

    Attributes:
        label: index in the model's :class:`ClassTable`.
        score: None for semantic segmentation and ground truth.
        crop: bool [h, w], the mask within its tight bounding box.
        corner: (top, left) of the crop in the image.
        size: (height, width) of the image.
    """

    label: int
    score: float | None
    crop: np.ndarray
    corner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def from_mask(
        cls,
        mask: np.ndarray,
        label: int,
        score: float | None = None,
        *,
        corner: tuple[int, int] = (0, 0),
        size: tuple[int, int] | None = None,
    ) -> Segment | None:
        """The segment of a bool mask that lies at ``corner`` of an image of ``size``; None where the mask is empty."""
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return None
        top, left = rows[0], columns[0]
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1].copy()
        return cls(label, score, crop, (corner[0] + int(top), corner[1] + int(left)), size or mask.shape)

    @property
    def mask(self) -> np.ndarray:
        """Bool [H, W]."""
        mask = np.zeros(self.size, bool)
        mask[self.window] = self.crop
        return mask

    @property
    def window(self) -> tuple[slice, slice]:
        """Where the bounding box is in the image."""
        (top, left), (height, width) = self.corner, self.crop.shape
        return slice(top, top + height), slice(left, left + width)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight bounding box (x, y, width, height)."""
        return self.corner[1], self.corner[0], self.crop.shape[1], self.crop.shape[0]

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(self.crop.sum())

    def rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed run-length encoding, with text instead of bytes."""
        rle = mask_util.encode(np.asfortranarray(self.mask.astype(np.uint8)))
        return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}

    def polygons(self) -> list[list[float]]:
        """The mask's outlines as COCO's polygons [x1, y1, x2, y2, ...], one for each connected part.

        pycocotools makes the mask from them again, but for holes: COCO's polygons have none, so they are filled.
        """
        # Each pixel as 2 x 2, whose centres the outline then goes through: the pixel's own centre lies inside of it
        enlarged = self.crop.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        left_top = np.array(self.corner[::-1])
        return [((contour[:, 0] + 0.5) / 2 + left_top).flatten().tolist() for contour in contours]


class Prediction(NamedTuple):
    """The segments of one image.

    Attributes:
        size: (height, width) of the image.
        segments: instances by falling score; panoptic segments; or the semantic classes that are in the image.
        classes: what their labels mean.
    """

    size: tuple[int, int]
    segments: list[Segment]
    classes: ClassTable

    def confident(self, threshold: float) -> Prediction:
        """Without things whose score is below a threshold."""
        things = self.classes.num_things
        kept = [x for x in self.segments if x.label >= things or x.score is None or x.score >= threshold]
        return self._replace(segments=kept)

    def masks(self) -> np.ndarray:
        """Bool [n, H, W]."""
        masks = np.zeros((len(self.segments), *self.size), bool)
        for mask, segment in zip(masks, self.segments):
            mask[segment.window] = segment.crop
        return masks

    def segment_map(self) -> np.ndarray:
        """int32 [H, W]: 1 + the index of the segment at each pixel, the best one where instances overlap; 0: none."""
        found = np.zeros(self.size, np.int32)
        for number in range(len(self.segments), 0, -1):
            segment = self.segments[number - 1]
            found[segment.window][segment.crop] = number
        return found

    def to_coco(self, masks: str = "rle") -> list[dict[str, Any]]:
        """The segments as in COCO's result format, ready for JSON; "category_id" is the one in the data set's files.

        Args:
            masks: what "segmentation" is: "rle" or "polygons" (see :meth:`Segment.polygons` for what they lose).
        """
        if masks not in MASK_FORMATS:
            raise ConfigError(f"masks = {masks!r}: use one of {MASK_FORMATS}; Prediction.masks() gives arrays.")
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

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Paint the segments over their image, uint8 [H, W, 3] RGB; a small one is enlarged."""
        return draw_segments(image, self.segments, self.classes)
