"""Checks that COCO's instances JSON and panoptic JSON share: their lists of images and categories, and ids."""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from detectron2.utils.file_io import PathManager

from ...errors import DataError
from ..coco_json import find_wrong_type, parse_json
from ..split import Part
from .faults import Fault
from .images import ImageEntry
from .report import Use


def read_json(path: str, image_root: str, use: Use, faults: list[Fault]) -> dict[str, Any] | None:
    """Read a COCO JSON with the lists images, annotations and categories; None if it can't be read.

    A JSON without the key "annotations" lists images for prediction only, which is a fault only in a training set. If
    the data set is a part of the JSON's images (Use.part), only these images and their annotations are returned.

    Args:
        path: path of the JSON.
        image_root: folder of the images.
        use: what the data set is for.
        faults: gets the faults that are found, and what was read as it is meant.
    """
    if not PathManager.isfile(path):
        faults.append(Fault("missing file", path, "", "does not exist"))
        return None
    try:
        content, mends = parse_json(path, image_root)
    except DataError as error:
        faults.append(Fault("broken JSON", path, "", f"is not valid JSON ({error.__cause__})"))
        return None
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__}, but COCO's format is a mapping of lists"
        faults.append(Fault("missing key", path, "", what))
        return None
    faults += [Fault("read as meant", path, "", str(mend)) for mend in mends]
    wrong = find_wrong_type({key: value for key, value in content.items() if isinstance(value, list)})
    if wrong:
        faults.append(Fault("wrong type", path, *wrong))
        return None
    is_for_prediction = "annotations" not in content and not use.is_training
    required = ("images", "categories") if is_for_prediction else ("images", "annotations", "categories")
    missing = [key for key in required if not isinstance(content.get(key), list)]
    faults += [Fault("missing key", path, "", f"lacks the list {key!r}") for key in missing]
    if missing:
        return None
    return restrict(content, use, path, faults)


def restrict(content: dict[str, Any], use: Use, path: str, faults: list[Fault]) -> dict[str, Any]:
    """Return the content for the part of the images that is used; a list of annotations must not be empty."""
    if content.get("annotations") == []:
        faults.append(Fault("no annotations", path, "", "has an empty list of annotations"))
    return content if use.part is None else _of_part(content, use.part)


def _of_part(content: dict[str, Any], part: Part) -> dict[str, Any]:
    selected = part.select(image["file_name"] for image in content["images"] if "file_name" in image)
    others = {image.get("id") for image in content["images"] if image.get("file_name", "") not in selected}
    images = [image for image in content["images"] if image.get("id") not in others]
    lists = {"images": images}
    if "annotations" in content:
        lists["annotations"] = [x for x in content["annotations"] if x.get("image_id") not in others]
    return {**content, **lists}


def lacking(items: list[dict], keys: Iterable[str], path: str, what: str, faults: list[Fault]) -> list[dict]:
    """Return the items that have all keys, and add a fault at the place "<what> <id>" for each other item."""
    complete = []
    for i, item in enumerate(items):
        missing = [key for key in keys if key not in item]
        where = f"{what} {item['id']}" if "id" in item else f"{what}s[{i}]"
        faults += [Fault("missing key", path, where, f"lacks {key!r}") for key in missing]
        if not missing:
            complete.append(item)
    return complete


def check_twice(items: list[dict], what: str, key: str, path: str, faults: list[Fault]) -> None:
    """Add a fault for each id, and for each value of ``key``, that occurs in more than one item.

    Args:
        items: images or categories of a JSON, with "id" and ``key``.
        what: "image" or "category".
        key: "file_name" or "name".
        path: path of the JSON.
        faults: gets the faults that are found.
    """
    for i, count in Counter(item["id"] for item in items).items():
        if count > 1:
            faults.append(Fault(f"{what} id twice", path, f"{what} {i}", f"{count} entries have this id"))
    first: dict[str, Any] = {}
    for item in items:
        other = first.setdefault(item[key], item["id"])
        if other != item["id"]:
            kind = "image file twice" if what == "image" else "category name twice"
            same = f"has the same {key} {item[key]!r} as {what} {other}"
            faults.append(Fault(kind, path, f"{what} {item['id']}", same))


def image_entries(images: list[dict], root: str) -> list[ImageEntry]:
    entries = []
    for image in images:
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        entries.append(ImageEntry(os.path.join(root, image["file_name"]), f"image {image['id']}", size))
    return entries


def check_image_ids(annotations: list[dict], images: dict[Any, dict], path: str, faults: list[Fault]) -> list[dict]:
    """Return the annotations whose image is listed, and add a fault for each other annotation."""
    known = []
    as_text = {str(i) for i in images}
    for annotation in annotations:
        image_id = annotation["image_id"]
        if image_id in images:
            known.append(annotation)
            continue
        what = f"is for image_id {image_id!r}, which is not in images"
        if str(image_id) in as_text:
            what += f"; an image has this id as {'a string' if isinstance(image_id, int) else 'a number'}"
        where = f"annotation {annotation['id']}" if "id" in annotation else f"image {image_id}"
        faults.append(Fault("unknown image", path, where, what))
    return known
