"""Checks a COCO panoptic JSON, its PNGs and its images."""

import functools
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id

from ...errors import DataError
from ...tasks import Task
from ..files import read_panoptic
from .coco import check_image_ids, check_twice, image_entries, lacking, read_json
from .counts import ObjectCounts
from .faults import Fault
from .images import check_images, map_files
from .report import DatasetReport, Use

# A PNG with more unknown ids than this was probably saved with loss; the fault then states only their number.
_MOST_IDS = 5
# Tolerance for areas, as a fraction of the number of pixels and in pixels.
_AREA_PART, _AREA_PIXELS = 0.01, 4


class _Png(NamedTuple):
    """A PNG to check: its annotation and path, and (height, width) of its image, None if the image can't be read."""

    annotation: dict
    path: str
    size: tuple[int, int] | None


def check_panoptic(name: str, json_file: str, image_root: str, panoptic_root: str, use: Use) -> DatasetReport:
    """Check a COCO panoptic JSON, every segment in it, its PNGs and images.

    Args:
        name: name of the data set.
        json_file: path of the JSON.
        image_root, panoptic_root: folders of the images and the PNGs.
        use: what the data set is for; its task determines whether things and stuff are needed.
    """
    faults: list[Fault] = []
    content = read_json(json_file, image_root, use, faults)
    if content is None:
        return DatasetReport(name, faults)
    images = lacking(content["images"], ("id", "file_name"), json_file, "image", faults)
    categories = lacking(content["categories"], ("id", "name", "isthing"), json_file, "category", faults)
    check_twice(categories, "category", "name", json_file, faults)
    if len(categories) == len(content["categories"]):
        faults += _check_kinds(categories, json_file, use.task)
    check_twice(images, "image", "file_name", json_file, faults)
    facts, image_faults = check_images(image_entries(images, image_root), use.pixel_format)
    by_id = {image["id"]: image for image in images}
    keys = ("image_id", "file_name", "segments_info")
    annotations = lacking(content.get("annotations", []), keys, json_file, "annotation", faults)
    annotations = check_image_ids(annotations, by_id, json_file, faults)
    unannotated = set(by_id) - {x["image_id"] for x in annotations} if content.get("annotations") else ()
    for i in sorted(unannotated, key=str):
        what = f"{by_id[i]['file_name']} has no annotation"
        faults.append(Fault("image without annotation", json_file, f"image {i}", what))
    pngs = []
    for annotation in annotations:
        image = os.path.join(image_root, by_id[annotation["image_id"]]["file_name"])
        size = facts[image].size if image in facts else None
        pngs.append(_Png(annotation, os.path.join(panoptic_root, annotation["file_name"]), size))
    by_category = {category["id"]: category for category in content["categories"] if "id" in category}
    counts = ObjectCounts(by_category, json_file, "segment")
    results = map_files(functools.partial(_check_png, json_file=json_file), pngs, "Reading panoptic PNGs")
    for png, (found, areas) in zip(pngs, results, strict=True):
        faults += found + _check_segments(png.annotation, areas, counts, json_file)
    faults += counts.find_crowded_images(use.num_kernels, {i: image["file_name"] for i, image in by_id.items()})
    if "annotations" in content:
        faults += counts.find_absent_classes(use, image_faults + faults)
    return DatasetReport(name, image_faults + faults, len(images), counts.table(), counts.summary(), facts)


def _check_kinds(categories: list[dict], path: str, task: Task) -> list[Fault]:
    faults = []
    if task.things and not any(category["isthing"] for category in categories):
        faults.append(Fault("no things", path, "", "has no category that is a thing"))
    if task.stuff == "stuff" and all(category["isthing"] for category in categories):
        faults.append(Fault("no stuff", path, "", "has only categories that are things"))
    return faults


def _check_png(png: _Png, json_file: str) -> tuple[list[Fault], dict[int, int]]:
    """Check a PNG; returns its faults, and the number of pixels of each segment id."""
    annotation, path, size = png
    faults = []
    segments = [segment for segment in annotation["segments_info"] if "id" in segment]
    where = f"image {annotation['image_id']}"
    for i, count in Counter(segment["id"] for segment in segments).items():
        if count > 1:
            faults.append(Fault("segment id twice", json_file, f"{where}, segment {i}", f"occurs {count} times"))
        if i == 0:
            faults.append(Fault("segment id 0", json_file, f"{where}, segment 0", "has the id 0"))
    if not PathManager.isfile(path):
        return [*faults, Fault("missing file", path, where, "does not exist")], {}
    try:
        pixels = read_panoptic(path)
    except DataError as error:
        return [*faults, Fault("unreadable PNG", path, where, str(error.__cause__))], {}
    if size is not None and pixels.shape[:2] != size:
        shape = pixels.shape
        what = f"has {shape[1]} x {shape[0]} pixels (width x height), but its image has {size[1]} x {size[0]}"
        faults.append(Fault("PNG size", path, where, what))
    areas = _areas(pixels)
    expected = {segment["id"] for segment in segments} - {0}
    return faults + _compare_ids(pixels, areas, expected, path, where), areas


def _areas(pixels: np.ndarray) -> dict[int, int]:
    """Return the number of pixels of each segment id, without void."""
    ids, counts = np.unique(rgb2id(pixels), return_counts=True)
    return {i: count for i, count in zip(ids.tolist(), counts.tolist(), strict=True) if i}


def _compare_ids(pixels: np.ndarray, areas: dict[int, int], expected: set[int], path: str, where: str) -> list[Fault]:
    unknown, unpainted = sorted(set(areas) - expected), sorted(expected - set(areas))
    if unknown and (pixels == pixels[..., :1]).all():
        return [Fault("PNG without colours", path, where, "has equal red, green and blue values in every pixel")]
    if unknown and not set(_areas(pixels[..., ::-1])) - expected:
        what = "has the ids of segments_info only if red and blue are swapped"
        return [Fault("PNG with red and blue swapped", path, where, what)]
    if len(unknown) > _MOST_IDS:
        faults = [Fault("unknown segment", path, where, f"has {len(unknown)} ids that segments_info lacks")]
    else:
        faults = [
            Fault("unknown segment", path, f"{where}, segment {i}", f"{areas[i]} pixels; segments_info lacks the id")
            for i in unknown
        ]
    return faults + [
        Fault("unpainted segment", path, f"{where}, segment {i}", "is in segments_info, but has no pixel")
        for i in unpainted
    ]


def _check_segments(annotation: dict, areas: dict[int, int], counts: ObjectCounts, path: str) -> list[Fault]:
    """Check and count the segments of one image.

    Args:
        annotation: annotation of the image.
        areas: number of pixels of each segment id; empty if the PNG can't be read.
        counts: gets the segments.
        path: path of the JSON.
    """
    faults, image = [], f"image {annotation['image_id']}"
    of_stuff: Counter = Counter()
    for segment in annotation["segments_info"]:
        missing = [key for key in ("id", "category_id") if key not in segment]
        faults += [Fault("missing key", path, image, f"a segment lacks {key!r}") for key in missing]
        if missing:
            continue
        where, category = f"{image}, segment {segment['id']}", segment["category_id"]
        if category not in counts.categories:
            what = f"has category_id {category!r}, which is not in categories"
            faults.append(Fault("unknown category", path, where, what))
            continue
        area, is_crowd = areas.get(segment["id"], 0), bool(segment.get("iscrowd"))
        counts.add(annotation["image_id"], category, is_crowd, area)
        of_stuff[category] += not (is_crowd or counts.is_thing(category))
        stated = segment.get("area", area)
        if area and abs(stated - area) > max(_AREA_PIXELS, _AREA_PART * area):
            faults.append(Fault("wrong area", path, where, f"area is {stated}, but the segment has {area} pixels"))
    for category, count in of_stuff.items():
        if count > 1:
            what = f"has {count} segments of the stuff class {counts.categories[category].get('name')!r}"
            faults.append(Fault("stuff in pieces", path, image, what))
    return faults
