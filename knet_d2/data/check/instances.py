"""COCO instances JSON with its images."""

from collections import Counter, defaultdict
from typing import Any

import pycocotools.mask as mask_util

from ..segmentation import SegmentationError, find_outside, read_segmentation
from .coco import check_image_ids, check_twice, image_entries, lacking, read_json
from .faults import Fault
from .images import check_images
from .report import DatasetReport, Use, size_name

# Differences of a box's corners from its mask's, in pixels and as a part of its size, that rounding explains.
_BOX_PIXELS, _BOX_PART = 3.0, 0.1
# The same for areas: factor and pixels. Areas of polygons differ from those of their pixels in small objects.
_AREA_FACTOR, _AREA_PIXELS = 2.0, 32


def check_instances(name: str, json_file: str, image_root: str, use: Use) -> DatasetReport:
    """Check a COCO instances JSON, every annotation in it, and its images.

    Args:
        name: of the data set.
        json_file, image_root: its paths.
        use: what the data set is for.
    """
    faults: list[Fault] = []
    content = read_json(json_file, use, faults)
    if content is None:
        return DatasetReport(name, faults)
    images = lacking(content["images"], ("id", "file_name", "height", "width"), json_file, "image", faults)
    categories = lacking(content["categories"], ("id", "name"), json_file, "category", faults)
    check_twice(categories, "category", "name", json_file, faults)
    check_twice(images, "image", "file_name", json_file, faults)
    facts, image_faults = check_images(image_entries(images, image_root))
    annotations = _check_annotations(content["annotations"], json_file, faults)
    by_id = {image["id"]: image for image in content["images"] if "id" in image}
    masks = _Masks(by_id, {category["id"]: category["name"] for category in categories}, json_file)
    for annotation in check_image_ids(annotations, by_id, json_file, faults):
        masks.add(annotation)
    faults += masks.faults
    faults += masks.find_crowded_images(use.num_kernels)
    faults += masks.find_crowds()
    if use.is_training:
        faults += masks.find_unused_classes()
    return DatasetReport(name, image_faults + faults, len(images), masks.table(), masks.summary(), facts)


def _check_annotations(annotations: list[dict], path: str, faults: list[Fault]) -> list[dict]:
    """Keys and ids; returns the annotations that can be looked at further."""
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


class _Masks:
    """Looks at masks one after the other, and counts."""

    def __init__(self, images: dict[Any, dict], class_names: dict[Any, str], path: str) -> None:
        self.faults: list[Fault] = []
        self._images = images
        self._class_names = class_names
        self._path = path
        self._seen: dict[tuple, Any] = {}
        self._per_image: Counter = Counter()
        self._counts: dict[Any, Counter] = defaultdict(Counter)
        self._images_of: dict[Any, set] = defaultdict(set)

    def add(self, annotation: dict) -> None:
        where, category = f"annotation {annotation['id']}", annotation["category_id"]
        if category not in self._class_names:
            what = f"has category_id {category!r}, which is not in categories"
            self.faults.append(Fault("unknown category", self._path, where, what))
            return
        image = self._images[annotation["image_id"]]
        if not {"file_name", "height", "width"} <= set(image):
            return  # said already
        size = (image["height"], image["width"])
        try:
            rle = read_segmentation(annotation.get("segmentation"), *size)
        except SegmentationError as error:
            self.faults.append(Fault(error.kind, self._path, where, f"{error} (image {image['file_name']})"))
            return
        found = find_outside(annotation["segmentation"], *size)
        if found:
            self.faults.append(Fault(found[0], self._path, where, f"{found[1]} (image {image['file_name']})"))
        area = int(mask_util.area(rle))
        if not area:
            if not (found and found[0] == "polygon outside"):
                what = f"its mask has no pixel (image {image['file_name']})"
                self.faults.append(Fault("empty mask", self._path, where, what))
            return
        self._compare(annotation, where, area, mask_util.toBbox(rle).tolist())
        key = (annotation["image_id"], category, rle["counts"])
        first = self._seen.setdefault(key, annotation["id"])
        if first != annotation["id"]:
            what = f"is the same as annotation {first} (image {image['file_name']})"
            self.faults.append(Fault("annotation twice", self._path, where, what))
        self._count(annotation, area)

    def _compare(self, annotation: dict, where: str, area: int, box: list[float]) -> None:
        """The mask's area and box with those that the annotation states."""
        stated = annotation.get("bbox")
        if stated is not None and not _is_near(stated, box):
            what = f"bbox is {stated}, but its mask's is {box}"
            self.faults.append(Fault("wrong bbox", self._path, where, what))
        stated = annotation.get("area", area)
        ratio = max(stated / area, area / stated) if stated > 0 else float("inf")
        if stated <= 0 or (ratio > _AREA_FACTOR and abs(stated - area) > _AREA_PIXELS):
            what = f"area is {stated}, but its mask has {area} pixels"
            self.faults.append(Fault("wrong area", self._path, where, what))

    def _count(self, annotation: dict, area: int) -> None:
        category = annotation["category_id"]
        if annotation.get("iscrowd"):
            self._counts[category]["crowds"] += 1
            return
        self._per_image[annotation["image_id"]] += 1
        self._counts[category]["instances"] += 1
        self._counts[category][size_name(area)] += 1
        self._images_of[category].add(annotation["image_id"])

    def find_crowded_images(self, num_kernels: int) -> list[Fault]:
        return [
            Fault(
                "more instances than kernels",
                self._path,
                f"image {i}",
                f"{self._images[i]['file_name']} has {count} instances, the model {num_kernels} kernels for them",
            )
            for i, count in self._per_image.items()
            if count > num_kernels
        ]

    def find_crowds(self) -> list[Fault]:
        crowds, instances = (sum(x[key] for x in self._counts.values()) for key in ("crowds", "instances"))
        if crowds <= instances:
            return []
        return [Fault("mostly crowds", self._path, "", f"has {crowds} crowds and {instances} instances")]

    def find_unused_classes(self) -> list[Fault]:
        if not self._counts:
            return []  # nothing was read at all
        return [
            Fault("unused class", self._path, f"category {i}", f"{name!r} has no instance")
            for i, name in self._class_names.items()
            if not self._counts[i]["instances"]
        ]

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for i, name in sorted(self._class_names.items(), key=lambda item: str(item[0])):
            counts = self._counts[i]
            columns = ("instances", "small", "medium", "large", "crowds")
            row = {column: counts[column] for column in columns}
            rows.append({"class": name, "images": len(self._images_of[i]), **row})
        return rows

    def summary(self) -> str:
        most = max(self._per_image.values(), default=0)
        without = len(self._images) - len(self._per_image)
        return f"at most {most} instances in an image, {without} images without"


def _is_near(stated: Any, box: list[float]) -> bool:
    """Whether two boxes [x, y, width, height] are the same but for rounding."""
    if not isinstance(stated, (list, tuple)) or len(stated) != 4:
        return False
    tolerance = max(_BOX_PIXELS, _BOX_PART * max(box[2:]))
    corners = [(x, y, x + width, y + height) for x, y, width, height in (stated, box)]
    return all(abs(a - b) <= tolerance for a, b in zip(*corners, strict=True))
