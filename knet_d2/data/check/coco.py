"""What COCO's instances and panoptic JSON have in common: images and categories with ids."""

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


def read_json(path: str, use: Use, faults: list[Fault]) -> dict[str, Any] | None:
    """The content of a COCO JSON with the lists images, annotations and categories; None where it can't be had.

    A JSON without "annotations" lists images to predict only, which is no fault unless it is trained on. Of a data set
    that is a part of the JSON's images, the others are left out with their annotations.
    """
    if not PathManager.isfile(path):
        faults.append(Fault("missing file", path, "", "does not exist"))
        return None
    try:
        content = parse_json(path)
    except DataError as error:
        faults.append(Fault("broken JSON", path, "", f"is no valid JSON ({error.__cause__})"))
        return None
    if not isinstance(content, dict):
        faults.append(Fault("missing key", path, "", f"is a {type(content).__name__}, not COCO's mapping of lists"))
        return None
    wrong = find_wrong_type({key: value for key, value in content.items() if isinstance(value, list)})
    if wrong:
        faults.append(Fault("wrong type", path, *wrong))
        return None
    if "annotations" not in content and not use.is_training:
        content = {**content, "annotations": []}
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    faults += [Fault("missing key", path, "", f"lacks the list {key!r}") for key in missing]
    if missing:
        return None
    if use.is_training and not content["annotations"]:
        faults.append(Fault("no annotations", path, "", "has an empty list of annotations"))
    return content if use.part is None else _of_part(content, use.part)


def _of_part(content: dict[str, Any], part: Part) -> dict[str, Any]:
    selected = part.select(image["file_name"] for image in content["images"] if "file_name" in image)
    others = {image.get("id") for image in content["images"] if image.get("file_name", "") not in selected}
    images = [image for image in content["images"] if image.get("id") not in others]
    annotations = [x for x in content["annotations"] if x.get("image_id") not in others]
    return {**content, "images": images, "annotations": annotations}


def lacking(items: list[dict], keys: Iterable[str], path: str, what: str, faults: list[Fault]) -> list[dict]:
    """The items that have all keys; the others are faults, at the place "<what> <id>"."""
    complete = []
    for i, item in enumerate(items):
        missing = [key for key in keys if key not in item]
        where = f"{what} {item['id']}" if "id" in item else f"{what}s[{i}]"
        faults += [Fault("missing key", path, where, f"lacks {key!r}") for key in missing]
        if not missing:
            complete.append(item)
    return complete


def check_twice(items: list[dict], what: str, key: str, path: str, faults: list[Fault]) -> None:
    """Faults for ids, and values of another key, that two of the items have.

    Args:
        items: the images or categories of a JSON, with "id" and ``key``.
        what: "image" or "category".
        key: "file_name" or "name".
    """
    for i, count in Counter(item["id"] for item in items).items():
        if count > 1:
            faults.append(Fault(f"{what} id twice", path, f"{what} {i}", f"{count} entries have this id"))
    first: dict[str, Any] = {}
    for item in items:
        other = first.setdefault(item[key], item["id"])
        if other != item["id"]:
            kind = "image file twice" if what == "image" else "category name twice"
            faults.append(Fault(kind, path, f"{what} {item['id']}", f"has the {key} {item[key]!r} of {what} {other}"))


def image_entries(images: list[dict], root: str) -> list[ImageEntry]:
    entries = []
    for image in images:
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        entries.append(ImageEntry(os.path.join(root, image["file_name"]), f"image {image['id']}", size))
    return entries


def check_image_ids(annotations: list[dict], images: dict[Any, dict], path: str, faults: list[Fault]) -> list[dict]:
    """The annotations of known images; the others are faults."""
    known = []
    as_text = {str(i) for i in images}
    for annotation in annotations:
        image_id = annotation["image_id"]
        if image_id in images:
            known.append(annotation)
            continue
        what = f"is for image_id {image_id!r}, which is not in images"
        if str(image_id) in as_text:
            what += f"; an image has this id as {'text' if isinstance(image_id, int) else 'a number'}"
        where = f"annotation {annotation['id']}" if "id" in annotation else f"image {image_id}"
        faults.append(Fault("unknown image", path, where, what))
    return known
