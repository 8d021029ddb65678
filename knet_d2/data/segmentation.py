"""Masks in annotation files: COCO's "segmentation", checked before a library decodes it, and panoptic PNGs."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from panopticapi.utils import rgb2id

from .files import MAX_PIXELS

# The memory that a decoder takes grows with both.
_LARGEST_COORDINATE = 1e6
_LONGEST_OUTLINE = 1e7
# Most bits of a number in RLE, which come 5 at a time; no image has as many pixels
_MOST_BITS = 40
# Correct tools, too, write polygons that reach this many pixels beyond the image.
_ROUNDING = 3.0
# Tolerance for the corners of a box, in pixels and as a fraction of the box's size, because tools round them.
_BOX_PIXELS, _BOX_PART = 3.0, 0.1


class SegmentationError(ValueError):
    """A segmentation is wrong; ``kind`` is a key of knet_d2.data.check.faults.KINDS."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def check_segmentation(segmentation: Any) -> None:
    """Raise a SegmentationError if polygons or RLE can't be decoded safely; an empty segmentation is allowed."""
    if isinstance(segmentation, dict):
        read_rle(segmentation)
    elif isinstance(segmentation, list):
        for polygon in segmentation:
            check_coordinates(polygon)
    elif segmentation:
        kind = type(segmentation).__name__
        raise SegmentationError("missing segmentation", f"is of type {kind}; it must be polygons or RLE")


def check_coordinates(polygon: Any) -> None:
    """Raise a SegmentationError unless a polygon is a list of numbers [x0, y0, x1, y1, ...] within the limits."""
    if not isinstance(polygon, list):
        raise SegmentationError("bad polygon", "segmentation is not a list of polygons, which are lists of numbers")
    if not polygon:
        return
    try:
        is_finite = math.isfinite(sum(polygon))
        low, high = min(polygon), max(polygon)
    except (TypeError, OverflowError):
        is_finite = False
    if not is_finite:
        wrong = next((x for x in polygon if not is_number(x)), polygon)
        raise SegmentationError("bad polygon", f"the coordinate {str(wrong)[:40]} is not a number")
    if max(high, -low) > _LARGEST_COORDINATE:
        raise SegmentationError("bad polygon", f"it has coordinates from {low} to {high}")
    if len(polygon) * (high - low) > _LONGEST_OUTLINE:  # an upper bound of the length, which is quick to compute
        points = list(zip(polygon[0::2], polygon[1::2]))
        length = sum(max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairwise(points))
        if length > _LONGEST_OUTLINE:
            raise SegmentationError("bad polygon", f"its outline is {length:.0f} pixels long")


def is_number(x: Any) -> bool:
    """Whether a value from a file is a number that a float can hold."""
    try:
        return math.isfinite(x)
    except (TypeError, OverflowError):
        return False


def read_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or RLE to compressed RLE of size height x width.

    Raises:
        SegmentationError: the segmentation is wrong; says in which way.
    """
    if isinstance(segmentation, dict):
        return read_rle(segmentation, (height, width))
    if not isinstance(segmentation, list) or not segmentation:
        raise SegmentationError("missing segmentation", f"segmentation is {segmentation!r}")
    for polygon in segmentation:
        check_coordinates(polygon)
        if len(polygon) % 2:
            raise SegmentationError("bad polygon", f"it has an odd number of coordinates, {len(polygon)}")
        if len(polygon) < 6:
            raise SegmentationError("bad polygon", f"it has {len(polygon) // 2} points, but at least 3 are needed")
    if max(max(polygon) for polygon in segmentation) <= 1.0 < max(height, width) / 2:
        raise SegmentationError("relative coordinates", "all coordinates are between 0 and 1")
    return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))


def find_outside(segmentation: Any, height: int, width: int) -> tuple[str, str] | None:
    """Return (kind of fault, what is wrong) if polygons reach beyond the image, else None."""
    if not isinstance(segmentation, list):
        return None
    points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation])
    low, high = points.min(axis=0), points.max(axis=0)
    beyond = max(*(-low), *(high - (width, height)))
    if beyond <= _ROUNDING:
        return None
    inside = np.clip(high, 0, (width, height)) - np.clip(low, 0, (width, height))
    part = 1 - inside.prod() / max((high - low).prod(), 1e-6)
    what = f"{part:.0%} of its box is outside the image of {width} x {height} pixels, by up to {beyond:.0f} pixels"
    return ("polygon outside" if part > 0.5 else "polygon over the edge"), what


def read_rle(segmentation: dict[str, Any], image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Convert compressed or uncompressed RLE to compressed RLE.

    Args:
        segmentation: RLE with "size" and "counts".
        image_size: required (height, width); None: any.

    Raises:
        SegmentationError: the RLE has another size or is damaged.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    sides = size if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(type(x) is int and 0 < x <= 2**16 for x in sides):
        raise SegmentationError("bad RLE", f"its size is {str(size)[:40]}; it must be [height, width]")
    if math.prod(sides) > MAX_PIXELS:
        raise SegmentationError("bad RLE", f"its size is {list(size)}; images of up to {MAX_PIXELS} pixels are read")
    if image_size is not None and tuple(size) != image_size:
        raise SegmentationError("bad RLE", f"its size is {list(size)}, but the image has {list(image_size)}")
    if isinstance(counts, (str, bytes)):
        numbers = decode_counts(counts)
    elif isinstance(counts, list) and all(type(x) is int for x in counts):
        numbers = counts
    else:
        raise SegmentationError("bad RLE", f"counts is {str(counts)[:40]}, neither a string nor a list of integers")
    if min(numbers, default=0) < 0 or sum(numbers) != size[0] * size[1]:
        raise SegmentationError("bad RLE", f"its counts add up to {sum(numbers)} and not to {size[0] * size[1]}")
    # frPyObjects takes "counts" only as a list; RLE whose "counts" is a string is compressed already.
    return mask_util.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask [H, W] as compressed RLE with a string, which JSON can hold."""
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def row_runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 along the rows of a mask [H, W]; the first is of 0."""
    flat = mask.reshape(-1).astype(np.int8)
    starts = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff([0, *starts, flat.size]).tolist()


def decode_counts(string: str | bytes) -> list[int]:
    """Decode the run lengths of COCO's compressed RLE, column by column: of pixels outside, inside, outside, ...

    Each character holds 5 bits of a signed number. From the fourth number on, the string holds the difference to the
    number two places before. pycocotools can't check a string: it reads beyond the end of a damaged one.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in string if isinstance(string, str) else string.decode("latin1"):
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise SegmentationError("bad RLE", f"counts has the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if shift > _MOST_BITS:
            raise SegmentationError("bad RLE", "counts has a number that is larger than any image")
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise SegmentationError("bad RLE", "counts is cut off")
    return counts


def from_kitti_step(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels of KITTI-STEP's PNGs (R: class, 256 G + B: number) to segment ids as of COCO's, uint8 [H, W, 3].

    R becomes the class + 1, so that the ids of all segments are above 0; class 255, void, becomes 0.
    """
    ids_rgb = pixels.copy()
    ids_rgb[..., 0] += 1  # 255 becomes 0
    ids_rgb[ids_rgb[..., 0] == 0] = 0
    return ids_rgb


def segment_index(ids_rgb: np.ndarray, segment_ids: list[int]) -> np.ndarray:
    """Which segment owns a pixel.

    Args:
        ids_rgb: uint8 [H, W, 3] as read_panoptic gives it.
        segment_ids: ids of M segments, each > 0.

    Returns:
        [H, W] of the smallest unsigned type that holds M + 1: position in segment_ids, M where a pixel's id is 0
        (void), M + 1 where it is an unknown id.
    """
    ids = rgb2id(ids_rgb)
    known = np.array([*segment_ids, 0], dtype=np.int64)
    order = np.argsort(known)
    # Only the first pixel of a run is looked up, as neighbours mostly belong to the same segment
    flat = ids.reshape(-1)
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    values, lengths = flat[starts], np.diff(starts, append=flat.size)
    position = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    index = np.where(known[position] == values, position, len(known)).astype(np.min_scalar_type(len(known)))
    return np.repeat(index, lengths).reshape(ids.shape)


def box_of(segmentation: Any, height: int, width: int) -> list[float]:
    """The box [x, y, width, height] of polygons or RLE, inside the image.

    Raises:
        SegmentationError: no polygon has 3 points, or one has an odd number of coordinates.
    """
    if isinstance(segmentation, dict):
        return mask_util.toBbox(read_segmentation(segmentation, height, width)).tolist()
    polygons = [x for x in segmentation if len(x) >= 6]
    if not polygons or any(len(x) % 2 for x in polygons):
        raise SegmentationError("bad polygon", "it has too few points or an odd number of coordinates")
    columns, rows = ([polygon[axis::2] for polygon in polygons] for axis in (0, 1))
    left, right = (min(max(x, 0.0), float(width)) for x in (min(map(min, columns)), max(map(max, columns))))
    top, bottom = (min(max(y, 0.0), float(height)) for y in (min(map(min, rows)), max(map(max, rows))))
    return [left, top, right - left, bottom - top]


def is_same_box(stated: Any, box: list[float]) -> bool:
    """Return whether two boxes [x, y, width, height] are equal within the tolerance for rounding."""
    if not isinstance(stated, (list, tuple)) or len(stated) != 4:
        return False
    tolerance = max(_BOX_PIXELS, _BOX_PART * max(box[2:]))
    corners = [(x, y, x + width, y + height) for x, y, width, height in (stated, box)]
    return all(abs(a - b) <= tolerance for a, b in zip(*corners, strict=True))
