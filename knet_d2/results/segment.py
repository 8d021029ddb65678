"""A segment of an image: its mask, class and score, and the mask as COCO RLE or polygons."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util


class Segment(NamedTuple):
    """An object, a stuff region or a semantic class of an image. Only the mask inside the bounding box is stored.

    Attributes:
        label: index in the model's :class:`ClassTable`.
        score: 0 to 1; None for semantic segmentation and ground truth.
        crop: mask inside its tight bounding box, bool [h, w].
        corner: (top, left) of the bounding box in the image.
        size: (height, width) of the image.
        track_id: the same for one object in all frames of a video; None for images.
        name: of its class; "" where nobody has named it.
    """

    label: int
    score: float | None
    crop: np.ndarray
    corner: tuple[int, int]
    size: tuple[int, int]
    track_id: int | None = None
    name: str = ""

    @classmethod
    def from_mask(
        cls,
        mask: np.ndarray,
        label: int,
        score: float | None = None,
        track_id: int | None = None,
        *,
        corner: tuple[int, int] = (0, 0),
        size: tuple[int, int] | None = None,
    ) -> Segment | None:
        """Make a segment from a mask; None if the mask is empty.

        Args:
            mask: bool [h, w], a part of the image or the whole image.
            label, score, track_id: see the class.
            corner: (top, left) of the mask in the image.
            size: (height, width) of the image; None: size of the mask.
        """
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return None
        top, left = rows[0], columns[0]
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1].copy()
        return cls(label, score, crop, (corner[0] + int(top), corner[1] + int(left)), size or mask.shape, track_id)

    @property
    def mask(self) -> np.ndarray:
        """Mask of the whole image, bool [H, W]."""
        mask = np.zeros(self.size, bool)
        mask[self.window] = self.crop
        return mask

    @property
    def window(self) -> tuple[slice, slice]:
        """Slices of the bounding box in the image."""
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

    @property
    def polygon(self) -> np.ndarray:
        """Outline of the largest connected part, float [n, 2] of (x, y); all parts: :meth:`polygons`."""
        outlines = [np.array(x).reshape(-1, 2) for x in self.polygons()]
        return max(outlines, key=lambda x: cv2.contourArea(x.astype(np.float32)))

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.2f}"
        return f"Segment({self.name or self.label!r}{score}, box {self.box}, {self.area} pixels)"

    def rle(self) -> dict[str, Any]:
        """Encode the mask as COCO's compressed run-length encoding, with a string instead of bytes."""
        height, width = self.size
        # Only the columns of the box are looked at, since an image may be much larger
        columns = np.zeros((self.crop.shape[1], height), bool)
        columns[:, self.window[0]] = self.crop.T
        borders = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + height * self.corner[1]
        counts = np.diff(borders, prepend=0, append=height * width).tolist()
        runs = {"size": [height, width], "counts": counts if counts[-1] else counts[:-1]}
        rle = mask_util.frPyObjects(runs, height, width)
        return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}

    def polygons(self) -> list[list[float]]:
        """Return the outlines of the mask as COCO's polygons [x1, y1, x2, y2, ...], one for each connected part.

        pycocotools decodes them to the same mask, except that holes are filled: COCO's polygons have no holes.
        """
        # Enlarge each pixel to 2 x 2, because findContours draws through pixel centres: the outline then encloses the
        # centre of the original pixel.
        enlarged = self.crop.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        left_top = np.array(self.corner[::-1])
        return [((contour[:, 0] + 0.5) / 2 + left_top).flatten().tolist() for contour in contours]
