"""Reads JSON files in COCO's instances or panoptic format, once per process, and checks the types of their values.

Numbers of masks are checked as well, because wrong ones make mask decoders crash or use up the memory.
"""

import codecs
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

from ..errors import DataError
from .coco_mending import Mend, is_id, leave_out_missing_images, log_mends, mend_coco
from .segmentation import SegmentationError, check_segmentation

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LARGEST_SIDE = 2**16
# Largest total size of the files whose content is kept. In memory the content takes about five times as much.
_KEPT_BYTES = 2**26


@dataclass
class _File:
    """A JSON file that was read.

    Attributes:
        stamp: (time of the last change in nanoseconds, size in bytes).
        content: the parsed content, mended.
        mends: what was read as it is meant.
        is_checked: whether the content passed all checks.
    """

    stamp: tuple[int, int]
    content: Any
    mends: list[Mend]
    is_checked: bool = False


# Keys: path of the file and folder of the images
_files: dict[tuple[str, str | None], _File] = {}


class WrongType(NamedTuple):
    """A wrong value in a JSON.

    Attributes:
        where: place in the JSON, for example "annotations[3].bbox"; "" for the whole file.
        what: what is wrong there, as the rest of a sentence whose subject is the place.
    """

    where: str
    what: str


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e15  # false for NaN, too


Check = tuple[Callable[[Any], bool], str]
_ID: Check = (is_id, "a whole number or a string")
_NAME: Check = (lambda x: isinstance(x, str) and x.isprintable() and 0 < len(x) < 4096, "a string")
_FLAG: Check = (lambda x: isinstance(x, int) and x in (0, 1), "0 or 1")
_NUMBER: Check = (_is_number, "a number")
_NUMBERS: Check = (lambda x: isinstance(x, list) and all(map(_is_number, x)), "a list of numbers")
_SIZE: Check = (
    lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= _LARGEST_SIDE,
    f"a whole number from 1 to {_LARGEST_SIDE}",
)
_SEGMENT_ID: Check = (lambda x: isinstance(x, int) and 0 <= x < 2**24, "a whole number below 2^24")

_TYPES: dict[str, dict[str, Check]] = {
    "images": {"id": _ID, "file_name": _NAME, "height": _SIZE, "width": _SIZE},
    "categories": {"id": _ID, "name": _NAME, "isthing": _FLAG, "color": _NUMBERS},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "file_name": _NAME,
        "iscrowd": _FLAG,
        "area": _NUMBER,
        "bbox": _NUMBERS,
    },
    "segments_info": {
        "id": _SEGMENT_ID,
        "category_id": _ID,
        "iscrowd": _FLAG,
        "isthing": _FLAG,
        "area": _NUMBER,
    },
}


def read_coco_json(path: str, image_root: str | None = None) -> dict[str, Any]:
    """Read and check a JSON in COCO's format for instances or panoptic segmentation.

    Values that differ from COCO's format but have one meaning are read as they are meant, and one warning for each kind
    of them is logged; see :func:`mend_coco`. The keys that are present must have the right types, and the masks must be
    decodable. Missing keys are allowed.

    Args:
        path: path of the JSON.
        image_root: folder of the images; None: nothing is read from image files.

    Returns:
        The content. It is shared with other callers: do not change it.

    Raises:
        DataError: the file is not valid JSON, or a value is wrong; names the file and the place.
        OSError: the file can't be opened.
    """
    content, mends = parse_json(path, image_root)
    log_mends(path, mends)
    file = _files[path, image_root]
    if not file.is_checked:
        check_content(content, path)
        file.is_checked = True
    return content


def check_content(content: Any, path: str) -> None:
    """Raise a DataError unless the types of all values are right, ids differ, and masks can be decoded."""
    raise_wrong(find_wrong_type(content) or find_repeated_id(content) or find_wrong_mask(content), path)


def parse_present(path: str, image_root: str) -> tuple[dict[str, Any], list[str]]:
    """A copy of a file's mended content without the images that do not exist, and the file names of these."""
    content = dict(parse_json(path, image_root)[0])  # others share what is parsed
    return content, leave_out_missing_images(content, image_root)


def parse_json(path: str, image_root: str | None = None) -> tuple[Any, list[Mend]]:
    """Parse a JSON file and mend its content; a file that has not changed is parsed only once.

    The last file is kept in memory even if it is large, because the classes and the records of a data set are read
    one after the other from the same file.

    Returns:
        The content, which is shared with other callers: do not change it; and what was read as it is meant.
    """
    status = os.stat(PathManager.get_local_path(path))
    stamp = (status.st_mtime_ns, status.st_size)
    key = (path, image_root)
    if key not in _files or _files[key].stamp != stamp:
        with PathManager.open(path, "rb") as f:
            text = f.read()
        content = decode_json(text, path)
        marked = text.startswith(_MARKS) or b"\0" in text[:4]
        mends = [Mend("the text has a byte order mark or is UTF-16; read as such", "", 1)] if marked else []
        _files[key] = _File(stamp, content, mends + mend_coco(content, image_root))
        forget_large_files(but=key)
    return _files[key].content, _files[key].mends


def decode_json(text: str | bytes, path: str) -> Any:
    """The content of a JSON file; bytes may be UTF-8, UTF-16 or UTF-32."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"{path}: is not valid JSON ({error}). The file may be cut off: download or export it again."
        raise DataError(what) from error


def forget_large_files(but: tuple[str, str | None] | None = None) -> None:
    """Free the content of the largest files until the rest takes at most _KEPT_BYTES; ``but`` is never freed."""
    while sum(file.stamp[1] for file in _files.values()) > _KEPT_BYTES and set(_files) - {but}:
        del _files[max(set(_files) - {but}, key=lambda key: _files[key].stamp[1])]


def check_for_evaluation(content: dict[str, Any], path: str) -> None:
    """Raise a DataError unless the annotations of an instances JSON have all keys that COCO's evaluation reads.

    The size of RLE masks is checked, because COCO's evaluation would silently compare masks of different sizes.
    """
    sizes = {image.get("id"): [image.get("height"), image.get("width")] for image in content.get("images", ())}
    for i, annotation in enumerate(content.get("annotations", ())):
        missing = [key for key in ("id", "image_id", "category_id", "area", "iscrowd") if key not in annotation]
        missing += [] if len(annotation.get("bbox", ())) == 4 else ["bbox [x, y, width, height]"]
        missing += [] if annotation.get("segmentation") else ["segmentation"]
        if missing:
            raise_wrong(WrongType(f"annotations[{i}]", f"lacks {missing[0]}, which the evaluation reads"), path)
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list) and len(segmentation[0]) < 5:
            # pycocotools takes a list whose first item has fewer than 5 numbers for boxes, not polygons.
            wrong = WrongType(f"annotations[{i}].segmentation", "begins with a polygon of fewer than 3 points")
            raise_wrong(wrong, path)
        size = sizes.get(annotation["image_id"], [None, None])
        if isinstance(segmentation, dict) and None not in size and list(segmentation["size"]) != size:
            what = f"is RLE of size {segmentation['size']}, but its image has [height, width] {size}"
            raise_wrong(WrongType(f"annotations[{i}].segmentation", what), path)


def raise_wrong(wrong: WrongType | None, path: str) -> None:
    """Raise a DataError that names the file and the place, unless ``wrong`` is None."""
    if wrong:
        where = f"{wrong.where}: " if wrong.where else ""
        raise DataError(f"{path}: {where}{wrong.what}. Correct it, or export the annotations again.")


def find_wrong_type(content: Any) -> WrongType | None:
    """Find the first value whose type differs from COCO's format."""
    if not isinstance(content, dict):
        return WrongType("", f"holds a {type(content).__name__}, but COCO's format is a mapping of lists")
    for key in ("images", "annotations", "categories"):
        wrong = _find_in_list(content.get(key, []), key, key)
        if wrong:
            return wrong
    return None


def _find_in_list(items: Any, kind: str, where: str) -> WrongType | None:
    if not isinstance(items, list):
        return WrongType(where, f"is {_short(items)}; it must be a list")
    types = _TYPES[kind]
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            return WrongType(f"{where}[{i}]", f"is {_short(item)}; it must be a mapping")
        for key, (is_right, description) in types.items():
            if key in item and not is_right(item[key]):
                return WrongType(f"{where}[{i}].{key}", f"is {_short(item[key])}; it must be {description}")
        if kind == "annotations" and "segments_info" in item:
            wrong = _find_in_list(item["segments_info"], "segments_info", f"{where}[{i}].segments_info")
            if wrong:
                return wrong
    return None


def find_repeated_id(content: dict[str, Any]) -> WrongType | None:
    """Find the first id that two images or two categories share; the types of content must be right."""
    for kind in ("images", "categories"):
        seen = set()
        for i, item in enumerate(content.get(kind, ())):
            if "id" in item and item["id"] in seen:
                return WrongType(f"{kind}[{i}].id", f"is {_short(item['id'])}, which an earlier entry has, too")
            seen.add(item.get("id"))
    return None


def find_wrong_mask(content: dict[str, Any]) -> WrongType | None:
    """Find the first segmentation that can't be decoded safely; the types of content must be right."""
    for i, annotation in enumerate(content.get("annotations", ())):
        try:
            check_segmentation(annotation.get("segmentation"))
        except SegmentationError as error:
            return WrongType(f"annotations[{i}].segmentation", str(error))
    return None


def check_categories(content: dict[str, Any], path: str) -> None:
    """Raise a DataError unless all annotations and segments have a category of the JSON."""
    if not content.get("categories") or "images" not in content:
        raise DataError(
            f"{path}: lacks images or categories, which COCO's format requires. Export the annotations again."
        )
    known = {category.get("id") for category in content["categories"]}
    for annotation in content.get("annotations", ()):
        for part in annotation.get("segments_info", [annotation]):
            if part.get("category_id") not in known:
                raise DataError(
                    f"{path}: an annotation of image {annotation.get('image_id')} has category_id "
                    f"{part.get('category_id')}, which is not in categories. Add the category or correct the id."
                )


def check_keys(content: dict[str, Any], keys: dict[str, tuple[str, ...]], path: str) -> None:
    """Raise a DataError unless all items of the lists of a JSON have the keys: {name of the list: keys}."""
    for kind, required in keys.items():
        for i, item in enumerate(content.get(kind, ())):
            for key in required:
                if key not in item:
                    place = f"{kind}[{i}]" + (f" (id {item['id']})" if "id" in item else "")
                    raise_wrong(WrongType(place, f"lacks {key!r}"), path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
