"""Makes records (Detectron2's standard dicts) from JSON in COCO's format, and writes the classes into the metadata."""

import os
from collections import defaultdict
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import DataError
from .coco_json import (
    WrongType,
    check_categories,
    check_content,
    check_for_evaluation,
    check_keys,
    raise_wrong,
    read_coco_json,
)

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_ANNOTATION_KEYS = ("id", "image_id", "category_id")


def instance_records(path: str, image_root: str, name: str) -> list[dict]:
    """Read an instances JSON into the records that Detectron2's load_coco_json returns.

    The classes are written into the metadata of the data set ``name``. Where that has ``category_names``, these replace
    the names of the JSON.

    Raises:
        DataError: the JSON is wrong, or has another number of categories; names the file and the place.
    """
    return records_of_content(read_coco_json(path, image_root), path, image_root, name)


def records_of_content(content: dict[str, Any], path: str, image_root: str, name: str) -> list[dict]:
    """Do what :func:`instance_records` does, for the mended content of a JSON whose types are right."""
    check_categories(content, path)
    check_keys(content, {"images": _IMAGE_KEYS, "categories": ("id", "name"), "annotations": _ANNOTATION_KEYS}, path)
    metadata = MetadataCatalog.get(name)
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    contiguous = {category["id"]: i for i, category in enumerate(ordered)}
    metadata.thing_classes = metadata.get("category_names") or [category["name"] for category in ordered]
    if len(metadata.thing_classes) != len(ordered):
        raise DataError(
            f"{path}: the names for {name} ({', '.join(metadata.thing_classes)}) are not as many as the categories. "
            f"Name each of these, in this order: {', '.join(str(category['name']) for category in ordered)}."
        )
    metadata.thing_dataset_id_to_contiguous_id = contiguous
    of_image: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
    ids = set()
    for i, annotation in enumerate(content.get("annotations", ())):
        if annotation.get("ignore", 0):
            raise_wrong(WrongType(f"annotations[{i}].ignore", "is set, but 'ignore' is not supported"), path)
        if annotation["id"] in ids and "minival" not in path:  # COCO's own minival files repeat ids
            what = f"is {annotation['id']!r}, which an earlier annotation has, too"
            raise_wrong(WrongType(f"annotations[{i}].id", what), path)
        ids.add(annotation["id"])
        if annotation["image_id"] in of_image:
            of_image[annotation["image_id"]].append(annotation)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [x for x in (_instance(y, contiguous) for y in of_image[image["id"]]) if x],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def readable_records(content: Any, path: str, image_root: str, name: str) -> list[dict]:
    """Return the records of those images of damaged content in COCO's format that can be read without the others.

    Args:
        content: what was parsed of the file ``path``.

    Raises:
        DataError: no image can be read.
    """
    content = content if isinstance(content, dict) else {}
    lists = {key: content.get(key) for key in ("images", "annotations", "categories")}
    images, annotations, categories = (x if isinstance(x, list) else [] for x in lists.values())
    of_image = defaultdict(list)
    for annotation in annotations:
        if isinstance(annotation, dict):
            of_image[str(annotation.get("image_id"))].append(annotation)
    records = []
    for image in images:
        alone = {"images": [image], "categories": categories}
        alone["annotations"] = of_image[str(image.get("id"))] if isinstance(image, dict) else []
        try:
            check_content(alone, path)
            check_for_evaluation(alone, path)
            records += records_of_content(alone, path, image_root, name)
        except DataError:
            continue
    if not records:
        raise DataError(f"{path}: no image of this file can be read. Correct the errors that the check reports.")
    return records


def _instance(annotation: dict[str, Any], contiguous: dict[Any, int]) -> dict[str, Any] | None:
    """Convert an annotation of the JSON to one of a record; None if none of its polygons has 3 points."""
    keys = ("iscrowd", "bbox", "keypoints", "category_id")
    instance = {key: annotation[key] for key in keys if key in annotation}
    if instance.get("keypoints"):
        # COCO's keypoints are pixel indices; all other coordinates count from the corner of a pixel.
        instance["keypoints"] = [x if i % 3 == 2 else x + 0.5 for i, x in enumerate(instance["keypoints"])]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        segmentation = [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]
        if not segmentation:
            return None
    elif isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    if segmentation:
        instance["segmentation"] = segmentation
    return {**instance, "bbox_mode": BoxMode.XYWH_ABS, "category_id": contiguous[annotation["category_id"]]}


def panoptic_records(json_file: str, image_root: str, panoptic_root: str, name: str) -> list[dict]:
    """Read a COCO panoptic JSON with any categories and image types into records.

    The classes are written into the metadata of the data set ``name``. Contiguous ids number the things first, then
    the stuff, each in ascending order of the category ids.

    Raises:
        DataError: the JSON is wrong; names the file and the place.
    """
    content = read_coco_json(json_file, image_root)
    contiguous, things = set_panoptic_classes(content["categories"], json_file, name)
    images = {image["id"]: image for image in content["images"]}
    if "annotations" not in content:  # the JSON lists images for prediction only
        return [
            {**image, "file_name": os.path.join(image_root, image["file_name"]), "image_id": image["id"]}
            for image in content["images"]
        ]
    records = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            raise DataError(
                f"{json_file}: an annotation has image_id {annotation['image_id']}, which is not in images. Add the "
                "image, or remove the annotation."
            )
        image = images[annotation["image_id"]]
        segments = []
        for segment in annotation["segments_info"]:
            if "id" not in segment:
                raise DataError(
                    f"{json_file}: a segment of image_id {annotation['image_id']} lacks 'id'. Export it again."
                )
            category = segment["category_id"]
            segments.append({**segment, "category_id": contiguous[category], "isthing": category in things})
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
            "segments_info": segments,
        }
        if {"height", "width"} <= set(image):
            record.update(height=image["height"], width=image["width"])
        records.append(record)
    return records


def set_panoptic_classes(categories: list[dict], json_file: str, name: str) -> tuple[dict[int, int], set[int]]:
    """Set the classes in the metadata; returns the contiguous id of each category id, and the ids of the things."""
    for category in categories:
        for key in ("id", "name", "isthing"):
            if key not in category:
                raise DataError(
                    f"{json_file}: category {category} lacks {key!r}. Give each category id, name and isthing."
                )
    ordered = sorted(categories, key=lambda category: (not category["isthing"], category["id"]))
    contiguous = {category["id"]: i for i, category in enumerate(ordered)}
    things = {category["id"] for category in ordered if category["isthing"]}
    metadata = MetadataCatalog.get(name)
    names = [category["name"] for category in ordered]
    # Detectron2's panoptic evaluator and visualiser index both lists by the contiguous id of all classes
    metadata.set(
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={k: v for k, v in contiguous.items() if k in things},
        stuff_dataset_id_to_contiguous_id={k: v for k, v in contiguous.items() if k not in things},
    )
    if all("color" in category for category in ordered):
        colors = [category["color"] for category in ordered]
        metadata.set(thing_colors=colors, stuff_colors=colors)
    return contiguous, things
