"""One COCO "segmentation", checked from the format before any library decodes it."""

import math
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

# Polygons of careful tools end up to this many pixels outside.
_ROUNDING = 3.0


class SegmentationError(ValueError):
    """kind: as in faults.KINDS."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def read_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The mask of polygons or RLE as compressed RLE of height x width.

    Raises:
        SegmentationError: says what is wrong with it.
    """
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise SegmentationError("missing segmentation", f"segmentation is {segmentation!r}")
    if not all(isinstance(polygon, list) for polygon in segmentation):
        raise SegmentationError("bad polygon", "segmentation is a list of numbers, not of polygons")
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
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in polygon):
        wrong = next(x for x in polygon if not (isinstance(x, (int, float)) and math.isfinite(x)))
        raise SegmentationError("bad polygon", f"the coordinate {wrong!r} is not a number")
    if len(polygon) % 2:
        raise SegmentationError("bad polygon", f"it has {len(polygon)} numbers, which is odd")
    if len(polygon) < 6:
        raise SegmentationError("bad polygon", f"it has {len(polygon) // 2} points, at least 3 are needed")


def _read_rle(segmentation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or list(size) != [height, width]:
        raise SegmentationError("bad RLE", f"its size is {size} and the image's [{height}, {width}]")
    if isinstance(counts, str):
        numbers = _decode_counts(counts)
    elif isinstance(counts, list) and all(isinstance(x, int) for x in counts):
        numbers = counts
    else:
        raise SegmentationError("bad RLE", f"counts is {str(counts)[:40]}, neither a string nor a list of integers")
    if min(numbers, default=0) < 0 or sum(numbers) != height * width:
        raise SegmentationError("bad RLE", f"its counts add up to {sum(numbers)} and not to {height * width}")
    # "counts" must be a list for frPyObjects, and a string is one already.
    return segmentation if isinstance(counts, str) else mask_util.frPyObjects(segmentation, height, width)


def _decode_counts(string: str) -> list[int]:
    """The run lengths in COCO's compressed form: 5 bits a character, signed, from the fourth on differences.

    pycocotools would read beyond the end of a damaged string.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in string:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise SegmentationError("bad RLE", f"counts has the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise SegmentationError("bad RLE", "counts is cut off")
    return counts
