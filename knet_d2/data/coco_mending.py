"""Reads a COCO JSON as it is meant where it differs from COCO's format, and counts what was changed.

Training, evaluation and the check of data sets read JSON files with these changes, so all of them see the same data.
Only what has one meaning is changed; everything else stays as it is and is an error of the reader.
"""

import contextlib
import contextvars
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager

from ..errors import DataError
from .files import image_size
from .segmentation import (
    SegmentationError,
    box_of,
    check_segmentation,
    encode_mask,
    is_number,
    is_same_box,
    read_rle,
    read_segmentation,
)

logger = logging.getLogger(__name__)

_reported_by_caller = contextvars.ContextVar("_reported_by_caller", default=False)
# Warnings that were logged
_logged: set[tuple[str, str]] = set()
# Digits of an id or a size that is text
_WHOLE = re.compile(r"\d{1,15}", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")
# A box with a margin around its mask: the largest margin of a side, in pixels and as a fraction of the mask's side.
_MARGIN_PIXELS, _MARGIN_PART = 20.0, 0.5
_SIDES = ("height", "width")
# What to do about an image that is annotated and has no file
MISSING_IMAGE = (
    "Add the file, or correct its name or the folder of images. To train without such images, add --leave-out-missing "
    "to knet train --data; knet check --fix FILE.json writes annotations without them."
)


class Mend(NamedTuple):
    """One way in which values of a file were read as they are meant.

    Attributes:
        what: what was found and how it is read, for example "iscrowd is null; read as 0".
        first: first place, for example "annotation 7"; "" for the whole file.
        places: number of places.
    """

    what: str
    first: str
    places: int

    def __str__(self) -> str:
        number = f"{self.places} place{'s' * (self.places > 1)}" + (
            f", the first is {self.first}" if self.first else ""
        )
        return f"{self.what} ({number})"


def log_mends(path: str, mends: Iterable[Mend]) -> None:
    """Log a warning for each mend of a file, once in each process."""
    for mend in mends:
        if (path, str(mend)) not in _logged and not _reported_by_caller.get():
            _logged.add((path, str(mend)))
            logger.warning("%s: %s.", path, mend)


@contextlib.contextmanager
def mends_not_logged() -> Iterator[None]:
    """Do not log what is mended, because the caller reports it."""
    token = _reported_by_caller.set(True)
    try:
        yield
    finally:
        _reported_by_caller.reset(token)


class MendLog:
    """Collects changes, and counts those with the same description."""

    def __init__(self) -> None:
        self._mends: dict[str, Mend] = {}

    def add(self, what: str, first: str) -> None:
        earlier = self._mends.get(what, Mend(what, first, 0))
        self._mends[what] = earlier._replace(places=earlier.places + 1)

    def all(self) -> list[Mend]:
        return list(self._mends.values())


def mend_coco(content: Any, image_root: str | None) -> list[Mend]:
    """Change the content of a COCO instances or panoptic JSON in place to what it means.

    Args:
        content: a parsed JSON, with values of any types.
        image_root: folder of the images; None: nothing is read from image files, and file names stay.

    Returns:
        The changes, by kind.
    """
    if not isinstance(content, dict):
        return []
    log = MendLog()
    images, annotations, categories = (_mappings(content.get(key)) for key in ("images", "annotations", "categories"))
    segments = [x for annotation in annotations for x in _mappings(annotation.get("segments_info"))]
    kinds = {"image": images, "category": categories, "annotation": annotations, "segment": segments}
    for what, items in kinds.items():
        for item in items:
            _mend_floats(item, what, log)
    _mend_references(annotations, "image_id", images, log)
    _mend_references([*annotations, *segments], "category_id", categories, log)
    is_panoptic = any("segments_info" in x for x in annotations)
    for what in ("annotation", "segment"):
        for item in kinds[what]:
            _mend_crowd(item, what, log, required=what == "annotation" and not is_panoptic)
    if image_root is not None:
        _mend_names(images, image_root, log)
    for image in images:
        _mend_size(image, image_root, log)
    if isinstance(content.get("images"), list) and len(images) == len(content["images"]):
        _merge_images(content, images, annotations, is_panoptic, log)
    if not is_panoptic:
        sizes = _hashable({x.get("id"): (x.get("height"), x.get("width")) for x in images if is_id(x.get("id"))})
        annotations = _mappings(content.get("annotations"))
        _mend_swapped_sizes(annotations, sizes, log)
        for annotation in annotations:
            _mend_polygons(annotation, log)
            _complete(annotation, sizes, log)
    return log.all()


def _mappings(items: Any) -> list[dict[str, Any]]:
    return [x for x in items if isinstance(x, dict)] if isinstance(items, list) else []


def _hashable(sizes: dict[Any, tuple[Any, Any]]) -> dict[Any, tuple[int, int]]:
    return {i: (h, w) for i, (h, w) in sizes.items() if type(h) is int and type(w) is int and 0 < h * w <= 2**32}


def is_id(x: Any) -> bool:
    """Whether a value is of a type of ids: a whole number or text."""
    return isinstance(x, (int, str)) and not isinstance(x, bool)


def _place(item: dict[str, Any], what: str) -> str:
    return f"{what} {str(item.get('id', item.get('file_name', '?')))[:60]}"


def _whole(x: Any) -> Any:
    """A whole number that is written as a float or as text, else x itself."""
    if isinstance(x, float) and x.is_integer() and abs(x) < 2**53:
        return int(x)
    if isinstance(x, str) and _WHOLE.fullmatch(x):
        return int(x)
    return x


def _mend_floats(item: dict[str, Any], what: str, log: MendLog) -> None:
    for key in ("id", "image_id", "category_id"):
        value = item.get(key)
        if isinstance(value, float) and _whole(value) is not value:
            item[key] = _whole(value)
            log.add("an id is a number with a decimal point; read as a whole number", _place(item, what))


def _mend_references(items: Iterable[dict[str, Any]], key: str, named: list[dict[str, Any]], log: MendLog) -> None:
    """Where ids are text in one place and numbers in another, read a reference as the id that it names."""
    ids = {x["id"] for x in named if is_id(x.get("id"))}
    by_number: dict[Any, Any] = {}
    for i in ids:
        by_number[_whole(i)] = None if _whole(i) in by_number else i  # None: 7 and "07" are two ids
    for item in items:
        value = item.get(key)
        if is_id(value) and value not in ids and by_number.get(_whole(value)) is not None:
            item[key] = by_number[_whole(value)]
            what = f"{key} and the id that it names are text and number; read as the same id"
            log.add(what, _place(item, "annotation"))


def _mend_crowd(item: dict[str, Any], what: str, log: MendLog, required: bool) -> None:
    crowd = item.get("iscrowd", 0 if not required else None)
    if crowd is None or isinstance(crowd, bool):
        item["iscrowd"] = int(bool(crowd))
        log.add("iscrowd is missing, null, true or false; read as 0 or 1", _place(item, what))


def _mend_size(image: dict[str, Any], image_root: str | None, log: MendLog) -> None:
    for side in _SIDES:
        value = image.get(side)
        if isinstance(value, (str, float)) and type(_whole(value)) is int:
            image[side] = _whole(value)
            log.add("height or width is text or has a decimal point; read as a whole number", _place(image, "image"))
    name = image.get("file_name")
    if image_root is None or not isinstance(name, str) or all(image.get(side) is not None for side in _SIDES):
        return
    try:
        image["height"], image["width"] = image_size(os.path.join(image_root, name))
    except (DataError, ValueError):
        return  # the reader reports the missing key, or the image
    log.add("height or width is missing; read from the image file", _place(image, "image"))


def _mend_names(images: list[dict[str, Any]], image_root: str, log: MendLog) -> None:
    """Find files whose names have backslashes, %-codes, or folders of another computer."""
    names = {x["file_name"] for x in images if isinstance(x.get("file_name"), str)}
    found = {}
    for name in names:
        if "\0" not in name and not PathManager.isfile(os.path.join(image_root, name)):
            found[name] = next((x for x in _other_names(name) if PathManager.isfile(os.path.join(image_root, x))), None)
    taken = [x for x in found.values() if x] + [x for x in names if x not in found]
    for image in images:
        other = found.get(name) if isinstance(name := image.get("file_name"), str) else None
        if other and taken.count(other) == 1:
            image["file_name"] = other
            what = f"file_name is not a path below {image_root}, but the same file is there; read as that file"
            log.add(what, _place(image, "image"))


def _other_names(name: str) -> Iterator[str]:
    """What a file name may mean: with / for \\ and %-codes decoded, then without its first folders."""
    if len(name) > 4096:
        return
    for text in dict.fromkeys((name, unquote(name))):
        parts = [x for x in re.split(r"[\\/]+", text) if x not in ("", ".", "..") and not _DRIVE.fullmatch(x)]
        if "\0" not in text:
            yield from ("/".join(parts[i:]) for i in range(len(parts)))


def _merge_images(
    content: dict[str, Any], images: list[dict], annotations: list[dict], is_panoptic: bool, log: MendLog
) -> None:
    """Make one image of entries with the same file and size; their annotations become those of the first entry."""
    first: dict[tuple, dict[str, Any]] = {}
    names_of_id: dict[Any, set] = {}
    for image in images:
        if is_id(image.get("id")) and isinstance(image.get("file_name"), str):
            names_of_id.setdefault(image["id"], set()).add(image["file_name"])
    kept, same = [], {}
    for image in images:
        name, i = image.get("file_name"), image.get("id")
        if isinstance(name, str) and is_id(i) and len(names_of_id[i]) == 1:
            earlier = first.setdefault((name, *(str(image.get(side)) for side in _SIDES)), image)
            if earlier is not image and (earlier["id"] == i or not is_panoptic):
                same[i] = earlier["id"]
                log.add("an image is listed more than once; read as one image", _place(image, "image"))
                continue
        kept.append(image)
    if len(kept) == len(images):
        return
    content["images"] = kept
    moved = {i: target for i, target in same.items() if i != target}
    if not moved:
        return
    targets, seen, remaining = set(moved.values()), set(), []
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and is_id(annotation.get("image_id")):
            annotation["image_id"] = moved.get(annotation["image_id"], annotation["image_id"])
            if annotation["image_id"] in targets:
                key = str([annotation.get(x) for x in ("image_id", "category_id", "segmentation")])
                if key in seen:
                    continue
                seen.add(key)
        remaining.append(annotation)
    content["annotations"] = remaining


def _mend_polygons(annotation: dict[str, Any], log: MendLog) -> None:
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not all(isinstance(x, list) for x in polygons):
        return
    whole = [x for x in polygons if len(x) >= 6 or len(x) % 2]  # an odd number of coordinates stays an error
    if whole and len(whole) < len(polygons):
        annotation["segmentation"] = whole
        what = "a polygon has fewer than 3 points, and other polygons of the object are whole; left out"
        log.add(what, _place(annotation, "annotation"))


def _mend_swapped_sizes(annotations: list[dict[str, Any]], sizes: dict[Any, tuple[int, int]], log: MendLog) -> None:
    """Read RLE whose size is [width, height] of its image, if the boxes tell which mask is meant.

    Either the runs are those of the mask and only the size is swapped, or the whole mask is transposed. The runs fit
    both sizes. What is meant is the one reading whose boxes are the stated ones in the whole file.
    """
    swapped = [x for x in annotations if _has_swapped_size(x, sizes)]
    readings = {_with_size: "its size is swapped", _transposed: "its mask is transposed"}
    try:
        fitting = [
            (read, how)
            for read, how in readings.items()
            if all(
                is_same_box(x["bbox"], mask_util.toBbox(read(x["segmentation"])).tolist())
                for x in swapped
                if _is_box(x.get("bbox"))
            )
        ]
        if not swapped or len(fitting) != 1:
            return
        ((read, how),) = fitting
        for annotation in swapped:
            annotation["segmentation"] = read(annotation["segmentation"])
            what = f"RLE of size [width, height]; by the boxes, {how}; read as such"
            log.add(what, _place(annotation, "annotation"))
    except SegmentationError:
        return  # the reader reports it


def _has_swapped_size(annotation: dict[str, Any], sizes: dict[Any, tuple[int, int]]) -> bool:
    size = sizes.get(annotation["image_id"]) if is_id(annotation.get("image_id")) else None
    segmentation = annotation.get("segmentation")
    if size is None or size[0] == size[1] or not isinstance(segmentation, dict):
        return False
    return segmentation.get("size") == [size[1], size[0]]


def _with_size(segmentation: dict[str, Any]) -> dict[str, Any]:
    """RLE with the same runs and the sides of its size exchanged."""
    return encode_mask(mask_util.decode(read_rle({**segmentation, "size": segmentation["size"][::-1]})))


def _transposed(segmentation: dict[str, Any]) -> dict[str, Any]:
    return encode_mask(mask_util.decode(read_rle(segmentation)).T)


def _complete(annotation: dict[str, Any], sizes: dict[Any, tuple[int, int]], log: MendLog) -> None:
    """Compute the box and the area from the mask where they are missing, and the box where it has a margin."""
    size = sizes.get(annotation["image_id"]) if is_id(annotation.get("image_id")) else None
    segmentation = annotation.get("segmentation")
    if size is None or not segmentation:
        return
    try:
        check_segmentation(segmentation)
        if annotation.get("area") is None:
            annotation["area"] = int(mask_util.area(read_segmentation(segmentation, *size)))
            log.add("area is missing; computed from the mask", _place(annotation, "annotation"))
        box = box_of(segmentation, *size)
    except SegmentationError:
        return  # the reader reports it
    what = _fault_of_box(annotation.get("bbox"), box)
    if what:
        annotation["bbox"] = box
        log.add(f"{what}; computed from the mask", _place(annotation, "annotation"))


def _is_box(x: Any) -> bool:
    numbers = isinstance(x, list) and len(x) == 4 and all(type(side) in (int, float) for side in x)
    return numbers and all(map(is_number, x))


def _fault_of_box(stated: Any, box: list[float]) -> str:
    """What is wrong with a stated box whose meaning is clear; "" if nothing is, or if it means something else."""
    if stated is None or stated == []:
        return "bbox is missing"
    if not _is_box(stated) or is_same_box(stated, box) or not min(box[2:]) > 0:
        return ""
    x, y, right, bottom = stated
    if is_same_box([x, y, right - x, bottom - y], box):
        return "bbox is two corners instead of [x, y, width, height]"
    margins = (box[0] - x, x + right - box[0] - box[2], box[1] - y, y + bottom - box[1] - box[3])
    limits = [max(_MARGIN_PIXELS, _MARGIN_PART * side) for side in (box[2], box[2], box[3], box[3])]
    if all(-1 <= margin <= limit for margin, limit in zip(margins, limits, strict=True)):
        return "bbox has a margin around the mask"
    return ""


def leave_out_missing_images(content: dict[str, Any], image_root: str) -> list[str]:
    """Remove the images whose files do not exist, and their annotations, in place; returns their file names."""
    missing = {
        x["id"]: x["file_name"]
        for x in _mappings(content.get("images"))
        if is_id(x.get("id"))
        and isinstance(x.get("file_name"), str)
        and not PathManager.isfile(os.path.join(image_root, x["file_name"]))
    }
    for key, image_id in (("images", "id"), ("annotations", "image_id")):
        if missing and isinstance(content.get(key), list):
            content[key] = [x for x in content[key] if x.get(image_id) not in missing]
    return list(missing.values())


def for_other_programs(content: dict[str, Any]) -> dict[str, Any]:
    """Return mended content as pycocotools and panopticapi need it: with "info", and annotation ids from 1."""
    annotations = content.get("annotations", [])
    ids = [x.get("id") for x in annotations]
    if not any("segments_info" in x for x in annotations):
        if not all(type(i) is int and i > 0 for i in ids) or len(set(ids)) < len(ids):
            annotations = [{**x, "id": i} for i, x in enumerate(annotations, 1)]
    has_annotations = {"annotations": annotations} if "annotations" in content else {}
    return {"info": {}, **content, **has_annotations}
