"""Checks a COCO instances JSON and its images."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pycocotools.mask as mask_util

from ...errors import DataError
from ..formats import Annotations
from ..segmentation import SegmentationError, box_of, find_outside, is_same_box, read_segmentation
from .coco import check_image_ids, check_twice, image_entries, lacking, read_json, restrict
from .counts import ObjectCounts
from .faults import Fault, counted
from .images import check_images
from .report import DatasetReport, Use

# Tolerance for areas, as a factor and in pixels: the area of a small polygon differs from its number of pixels.
_AREA_FACTOR, _AREA_PIXELS = 2.0, 32


def check_instances(name: str, json_file: str, image_root: str, use: Use) -> DatasetReport:
    """Check a COCO instances JSON, every annotation in it, and its images.

    Args:
        name: name of the data set.
        json_file: path of the JSON.
        image_root: folder of the images.
        use: what the data set is for.
    """
    faults: list[Fault] = []
    content = read_json(json_file, image_root, use, faults)
    if content is None:
        return DatasetReport(name, faults)
    return _check_content(name, content, json_file, image_root, use, faults)


def check_annotations(
    name: str, source: str, read: Callable[[], Annotations], image_root: str, use: Use
) -> DatasetReport:
    """Check annotations of a label tool, and their images.

    Args:
        name: name of the data set.
        source: file or folder of the annotations.
        read: reads them.
        image_root: folder of the images.
        use: what the data set is for.
    """
    try:
        annotations = read()
    except DataError as error:
        return DatasetReport(name, [Fault("unusable", source, "", str(error))])
    faults = [Fault("unusable annotation", *error) for error in annotations.errors]
    faults += [Fault("read as meant", source, "", str(note)) for note in annotations.notes]
    content = restrict(annotations.content, use, source, faults)
    return _check_content(name, content, source, image_root, use, faults)


def _check_content(
    name: str, content: dict[str, Any], json_file: str, image_root: str, use: Use, faults: list[Fault]
) -> DatasetReport:
    images = lacking(content["images"], ("id", "file_name", "height", "width"), json_file, "image", faults)
    categories = lacking(content["categories"], ("id", "name"), json_file, "category", faults)
    check_twice(categories, "category", "name", json_file, faults)
    check_twice(images, "image", "file_name", json_file, faults)
    facts, image_faults = check_images(image_entries(images, image_root), use.pixel_format)
    annotations = _check_annotations(content.get("annotations", []), json_file, faults)
    by_id = {image["id"]: image for image in content["images"] if "id" in image}
    known = {category["id"]: {"name": category["name"]} for category in categories}
    counts, seen = ObjectCounts(known, json_file, "instance"), {}
    for annotation in check_image_ids(annotations, by_id, json_file, faults):
        where, category = f"annotation {annotation['id']}", annotation["category_id"]
        image = by_id[annotation["image_id"]]
        if category not in known:
            what = f"has category_id {category!r}, which is not in categories"
            faults.append(Fault("unknown category", json_file, where, what))
            continue
        if not {"file_name", "height", "width"} <= set(image):
            continue  # "missing key" is already reported for this image
        area, problems = _check_mask(annotation, image, seen)
        faults += [Fault(kind, json_file, where, f"{what} (image {image['file_name']})") for kind, what in problems]
        if area:
            counts.add(image["id"], category, bool(annotation.get("iscrowd")), area)
    faults += counts.find_crowded_images(use.num_kernels, {i: image.get("file_name") for i, image in by_id.items()})
    faults += counts.find_crowds()
    if "annotations" in content:
        faults += counts.find_absent_classes(use, image_faults + faults)
    summary = f"{counts.summary()}, {counted(len(by_id) - len(counts.per_image), 'image')} without"
    return DatasetReport(name, image_faults + faults, len(images), counts.table(), summary, facts)


def _check_annotations(annotations: list[dict], path: str, faults: list[Fault]) -> list[dict]:
    """Check keys and ids; returns the annotations whose masks can be checked."""
    lacking(annotations, ("iscrowd", "area", "bbox"), path, "annotation", faults)
    annotations = lacking(annotations, ("id", "image_id", "category_id"), path, "annotation", faults)
    for i, count in Counter(annotation["id"] for annotation in annotations).items():
        if count > 1:
            faults.append(Fault("annotation id twice", path, f"annotation {i}", f"{count} annotations have this id"))
        if i == 0:
            faults.append(Fault("annotation id 0", path, "annotation 0", "has the id 0"))
    for annotation in annotations:
        if annotation.get("ignore"):
            where = f"annotation {annotation['id']}"
            faults.append(Fault("ignored annotation", path, where, f"has ignore = {annotation['ignore']!r}"))
    return annotations


def _check_mask(annotation: dict, image: dict, seen: dict[tuple, Any]) -> tuple[int, list[tuple[str, str]]]:
    """Check the mask, box and area of an annotation.

    Args:
        annotation: annotation of the JSON.
        image: its image, with "height" and "width".
        seen: annotation ids by (image, class, mask); this annotation is added.

    Returns:
        The number of pixels of the mask, and a list of (kind of fault, what is wrong).
    """
    size = (image["height"], image["width"])
    try:
        rle = read_segmentation(annotation.get("segmentation"), *size)
    except SegmentationError as error:
        return 0, [(error.kind, str(error))]
    outside = find_outside(annotation["segmentation"], *size)
    problems = [outside] if outside else []
    area = int(mask_util.area(rle))
    if not area:
        if not (outside and outside[0] == "polygon outside"):
            problems.append(("empty mask", "its mask has no pixel"))
        return 0, problems
    # Of polygons, as the mending of boxes has it; that of their pixels may be a pixel smaller
    stated, box = annotation.get("bbox"), box_of(annotation["segmentation"], *size)
    if stated is not None and not is_same_box(stated, box):
        problems.append(("wrong bbox", f"bbox is {stated}, but the box of its mask is {box}"))
    stated = annotation.get("area", area)
    ratio = max(stated / area, area / stated) if stated > 0 else float("inf")
    if stated <= 0 or (ratio > _AREA_FACTOR and abs(stated - area) > _AREA_PIXELS):
        problems.append(("wrong area", f"area is {stated}, but its mask has {area} pixels"))
    first = seen.setdefault((annotation["image_id"], annotation["category_id"], rle["counts"]), annotation["id"])
    if first != annotation["id"]:
        problems.append(("annotation twice", f"has the same mask and class as annotation {first}"))
    return area, problems
