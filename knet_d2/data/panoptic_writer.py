"""Writes annotations of instances as a COCO panoptic data set, in which the rest of each image is a stuff class."""

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from panopticapi.utils import id2rgb
from PIL import Image

from ..errors import ConfigError, DataError
from .files import refuse_to_replace, write_json
from .segmentation import read_segmentation


def write_panoptic(
    content: dict[str, Any], json_file: str, png_folder: str, rest: str, inputs: Sequence[str] = ()
) -> None:
    """Write a COCO panoptic JSON, and a PNG of each image's segments.

    Where objects overlap, the smaller one is in front. An object that smaller ones hide is left out.

    Args:
        content: of a COCO instances JSON.
        json_file: file to write.
        png_folder: folder for the PNGs, which have the names of the images.
        rest: name of the stuff class of all pixels without an object.
        inputs: files that must stay as they are.

    Raises:
        ConfigError: there is a class of this name, or a PNG would replace an input.
        DataError: two images have the same name without ending, or a name leads out of the folder.
    """
    if rest in {category["name"] for category in content["categories"]}:
        raise ConfigError(f"--rest {rest}: the data set has a class of this name. Choose another one.")
    rest_id = max((category["id"] for category in content["categories"]), default=0) + 1
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    names = [_png_name(image["file_name"]) for image in content["images"]]
    refuse_to_replace(inputs, (os.path.join(png_folder, name) for name in names), f"--panoptic {png_folder}")
    annotations: dict[str, dict[str, Any]] = {}
    for image, png in zip(content["images"], names, strict=True):
        if png in annotations:
            raise DataError(f"{image['file_name']}: another image has the same name without ending. Rename it.")
        ids, segments = _segments(of_image[image["id"]], image["height"], image["width"], rest_id)
        path = os.path.join(png_folder, png)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(id2rgb(ids)).save(path, optimize=True)
        annotations[png] = {"image_id": image["id"], "file_name": png, "segments_info": segments}
    categories = [{"id": x["id"], "name": x["name"], "isthing": 1} for x in content["categories"]]
    categories.append({"id": rest_id, "name": rest, "isthing": 0})
    found = {"images": content["images"], "annotations": [*annotations.values()], "categories": categories}
    write_json(json_file, found)


def _png_name(image: str) -> str:
    """The PNG of an image, as a path below the folder of the PNGs."""
    if os.path.isabs(image) or ".." in image.split("/"):
        raise DataError(f"{image}: its PNG would be outside of the folder. Name images below their folder.")
    return os.path.splitext(image)[0] + ".png"


def _segments(
    annotations: list[dict[str, Any]], height: int, width: int, rest_id: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The map of segment ids, uint32 [height, width], and the segments of an image."""
    masks = [mask_util.decode(read_segmentation(x["segmentation"], height, width)).astype(bool) for x in annotations]
    ids = np.ones((height, width), np.uint32)  # the rest
    segments: list[dict[str, Any]] = [{"id": 1, "category_id": rest_id, "iscrowd": 0}]
    for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        segment = {"category_id": annotations[i]["category_id"], "iscrowd": annotations[i].get("iscrowd", 0)}
        segments.append({"id": len(segments) + 1, **segment})
        ids[masks[i]] = len(segments)
    for segment in segments:
        rows, columns = np.nonzero(ids == segment["id"])
        segment["area"] = len(rows)
        if len(rows):
            x, y = columns.min(), rows.min()
            segment["bbox"] = [int(v) for v in (x, y, columns.max() - x + 1, rows.max() - y + 1)]
    return ids, [segment for segment in segments if segment["area"]]
