"""What a check says of one COCO "segmentation"."""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..segmentation import SegmentationError, check_coordinates, read_rle

# Polygons of careful tools end up to this many pixels outside.
_ROUNDING = 3.0


def read_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The mask of polygons or RLE as compressed RLE of height x width.

    Raises:
        SegmentationError: says what is wrong with it.
    """
    if isinstance(segmentation, dict):
        return read_rle(segmentation, (height, width))
    if not isinstance(segmentation, list) or not segmentation:
        raise SegmentationError("missing segmentation", f"segmentation is {segmentation!r}")
    for polygon in segmentation:
        _check_polygon(polygon)
    if max(max(polygon) for polygon in segmentation) <= 1.0 < max(height, width) / 2:
        raise SegmentationError("relative coordinates", "all coordinates are between 0 and 1")
    return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))


def find_outside(segmentation: Any, height: int, width: int) -> tuple[str, str] | None:
    """The kind of fault and what it is where polygons reach beyond the image."""
    if not isinstance(segmentation, list):
        return None
    points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation])
    low, high = points.min(axis=0), points.max(axis=0)
    beyond = max(*(-low), *(high - (width, height)))
    if beyond <= _ROUNDING:
        return None
    inside = np.clip(high, 0, (width, height)) - np.clip(low, 0, (width, height))
    part = 1 - inside.prod() / max((high - low).prod(), 1e-6)
    what = f"{part:.0%} of its box is outside the image of {width} x {height}, by up to {beyond:.0f} pixels"
    return ("polygon outside" if part > 0.5 else "polygon over the edge"), what


def _check_polygon(polygon: list) -> None:
    check_coordinates(polygon)
    if len(polygon) % 2:
        raise SegmentationError("bad polygon", f"it has {len(polygon)} numbers, which is odd")
    if len(polygon) < 6:
        raise SegmentationError("bad polygon", f"it has {len(polygon) // 2} points, at least 3 are needed")
