"""Writes predictions as annotation files of label tools, so that people correct them instead of drawing from nothing.

The most doubtful images come first: there, a correction teaches the model most.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from PIL import Image

from ..data.classes import ClassTable
from ..data.files import IGNORE_LABEL, write_json
from ..data.segmentation import row_runs
from ..errors import ConfigError
from .prediction import Prediction
from .segment import Segment


class Annotated(NamedTuple):
    """An image file with its prediction.

    Attributes:
        path: the file.
        name: its path below the folder that all images are in, with "/".
    """

    path: str
    name: str
    prediction: Prediction

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return os.path.splitext(self.name)[0]

    @property
    def doubt(self) -> float:
        """1 if nothing was found or a score is 0.5; 0 if all scores are 0 or 1, or if segments have none."""
        if not self.prediction.segments:
            return 1.0
        scores = [x.score for x in self.prediction.segments if x.score is not None]
        return max((1 - abs(2 * score - 1) for score in scores), default=0.0)


def write_annotations(
    kind: str, images: Iterable[tuple[str, Prediction]], folder: str, classes: ClassTable, tolerance: float = 1.0
) -> int:
    """Write annotation files of a label tool, and order.csv: images without a segment, then others by falling doubt.

    The images are copied to ``images`` in the folder, so that tools can open it, and training can read it.

    Args:
        kind: one of WRITERS.
        images: (path of an image file, its prediction).
        folder: where the files are written; it is created.
        classes: classes of the model. Segments of a background class are left out, as they are no objects.
        tolerance: largest distance in pixels between a polygon and the outline of its mask. With 0, polygons follow
            every pixel. Masks with holes are written as masks.

    Returns:
        The number of images.

    Raises:
        ConfigError: the kind is unknown, or the folder has files already.
    """
    check_destination(kind, folder)
    os.makedirs(folder, exist_ok=True)
    found = [(os.path.abspath(path), _without_background(prediction)) for path, prediction in images]
    root = os.path.commonpath([os.path.dirname(path) for path, _ in found]) if found else ""
    named = (Annotated(path, os.path.relpath(path, root).replace(os.sep, "/"), x) for path, x in found)
    ordered = sorted(named, key=lambda x: (len(x.prediction.segments) > 0, -x.doubt, x.name))
    if kind in _FILE_PER_IMAGE:
        _check_stems(ordered)
    for image in ordered:
        shutil.copyfile(image.path, _place(folder, "images", image.name))
    WRITERS[kind](ordered, folder, classes, tolerance)
    with open(os.path.join(folder, "order.csv"), "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        rows = csv.writer(f)
        rows.writerow(["file_name", "doubt", "segments"])
        rows.writerows((x.name, f"{x.doubt:.3f}", len(x.prediction.segments)) for x in ordered)
    return len(ordered)


def check_destination(kind: str, folder: str) -> None:
    """Raise the ConfigError of :func:`write_annotations`, which a program can tell before a model is loaded."""
    if kind not in WRITERS:
        raise ConfigError(f"--format {kind}: use one of {', '.join(WRITERS)}.")
    if os.path.isdir(folder) and os.listdir(folder):
        raise ConfigError(f"--output {folder}: has files already, which people may have corrected. Use a new folder.")


def _without_background(prediction: Prediction) -> Prediction:
    kept = [x for x in prediction.segments if not prediction.classes.is_background(x.label)]
    return prediction._replace(segments=kept)


def outlines(segment: Segment, tolerance: float) -> list[list[tuple[float, float]]] | None:
    """The outlines of the parts of a mask as points (x, y), with fewer points than pixels; None if it has a hole."""
    _, hierarchy = cv2.findContours(segment.crop.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return None if (hierarchy[0, :, 3] >= 0).any() else outer_outlines(segment, tolerance)


def outer_outlines(segment: Segment, tolerance: float) -> list[list[tuple[float, float]]]:
    """The outlines of the parts of a mask without their holes, see :func:`outlines`."""
    found = []
    for polygon in segment.polygons():
        points = np.array(polygon, np.float32).reshape(-1, 1, 2)
        fewer = cv2.approxPolyDP(points, tolerance, closed=True) if tolerance else points
        found.append([(float(x), float(y)) for x, y in (fewer if len(fewer) >= 3 else points)[:, 0]])
    return found


def _write_labelme(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """One JSON beside each image, where the tool looks for it; parts of an object are in a group."""
    for image in images:
        shapes: list[dict[str, Any]] = []
        for number, segment in enumerate(image.prediction.segments, 1):
            common = {"label": classes.names[segment.label], "flags": {}, "description": _score_text(segment)}
            parts = outlines(segment, tolerance)
            if parts is None:
                x, y, width, height = segment.box
                corners = [[x, y], [x + width - 1, y + height - 1]]
                shape = {"shape_type": "mask", "points": corners, "group_id": None, "mask": _png_text(segment.crop)}
                shapes.append({**common, **shape})
                continue
            group = number if len(parts) > 1 else None
            shapes += [
                {**common, "shape_type": "polygon", "points": [list(p) for p in part], "group_id": group}
                for part in parts
            ]
        height, width = image.prediction.size
        content = {
            **{"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None},
            **{"imagePath": os.path.basename(image.name), "imageHeight": height, "imageWidth": width},
        }
        write_json(_place(folder, "images", f"{image.stem}.json"), content)


def _write_yolo(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """labels/NAME.txt and data.yaml; an object in several parts, or with a hole, is a row of run lengths."""
    for image in images:
        height, width = image.prediction.size
        rows = []
        for segment in image.prediction.segments:
            parts = outlines(segment, tolerance)
            if parts is None or len(parts) > 1:
                rows.append(f"{segment.label} rle {height} {width} {segment.rle()['counts']}")
            else:
                numbers = (f"{x / width:.6f} {y / height:.6f}" for x, y in parts[0])
                rows.append(f"{segment.label} {' '.join(numbers)}")
        with open(_place(folder, "labels", f"{image.stem}.txt"), "w", encoding="utf-8") as f:
            f.write("".join(f"{row}\n" for row in rows))
    with open(os.path.join(folder, "data.yaml"), "w", encoding="utf-8") as f:
        content = {"train": "images", "val": "images", "names": dict(enumerate(classes.names))}
        yaml.safe_dump(content, f, sort_keys=False, allow_unicode=True)


def _write_coco(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """One JSON; file names are relative to the folder of the images."""
    ids = list(classes.file_ids)
    content: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, classes.names, strict=True)]
    for number, image in enumerate(images, 1):
        height, width = image.prediction.size
        content["images"].append({"id": number, "file_name": image.name, "height": height, "width": width})
        for segment in image.prediction.segments:
            parts = outlines(segment, tolerance)
            polygons = None if parts is None else [[v for p in part for v in p] for part in parts]
            content["annotations"].append(
                {
                    **{"id": len(content["annotations"]) + 1, "image_id": number, "category_id": ids[segment.label]},
                    **{"iscrowd": 0, "bbox": list(segment.box), "area": segment.area, "score": segment.score},
                    "segmentation": polygons or segment.rle(),
                }
            )
    write_json(os.path.join(folder, "annotations.json"), content)


def _write_cvat(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """One XML, "CVAT for images 1.1"; names are those of the files, as in a task of uploaded images."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    for number, image in enumerate(images):
        height, width = image.prediction.size
        keys = {"id": str(number), "name": image.name, "width": str(width), "height": str(height)}
        parent = ElementTree.SubElement(root, "image", keys)
        for group, segment in enumerate(image.prediction.segments, 1):
            common = {"label": classes.names[segment.label], "source": "auto", "occluded": "0", "z_order": "0"}
            parts = outlines(segment, tolerance)
            if parts is None:
                x, y, w, h = segment.box
                place = {"left": str(x), "top": str(y), "width": str(w), "height": str(h)}
                runs = ", ".join(map(str, row_runs(segment.crop)))
                ElementTree.SubElement(parent, "mask", {**common, "rle": runs, **place})
                continue
            grouped = {"group_id": str(group)} if len(parts) > 1 else {}
            for part in parts:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part)
                ElementTree.SubElement(parent, "polygon", {**common, "points": points, **grouped})
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(os.path.join(folder, "annotations.xml"), encoding="utf-8", xml_declaration=True)


def _write_via(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """One JSON. VIA has neither masks nor groups: each part is a region of its own, and holes are filled."""
    content = {}
    for image in images:
        regions = [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": [x for x, _ in p],
                    "all_points_y": [y for _, y in p],
                },
                "region_attributes": {"class": classes.names[segment.label]},
            }
            for segment in image.prediction.segments
            for p in outer_outlines(segment, tolerance)
        ]
        size = os.path.getsize(image.path)
        content[f"{image.name}{size}"] = {
            "filename": image.name,
            "size": size,
            "regions": regions,
            "file_attributes": {},
        }
    write_json(os.path.join(folder, "via_region_data.json"), content)


def _write_png(images: list[Annotated], folder: str, classes: ClassTable, tolerance: float) -> None:
    """masks/NAME.png, label maps with the values of the model's data set; and classes.txt if these are 0, 1, ...

    Pixels without a segment have the value of the background class; without one 255, or 65535 where 255 is a class.
    """
    ids = list(classes.file_ids)
    background = next((ids[i] for i in range(len(ids)) if classes.is_background(i)), None)
    void = background if background is not None else 65535 if IGNORE_LABEL in ids else IGNORE_LABEL
    values = np.array([*ids, void], np.int64)
    if ids == [*range(len(ids))]:
        with open(os.path.join(folder, "classes.txt"), "w", encoding="utf-8") as f:
            f.write("".join(f"{name}\n" for name in classes.names))
    for image in images:
        labels = values[image.prediction.class_map()]  # -1, no segment, is the last
        pixels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        Image.fromarray(pixels).save(_place(folder, "masks", f"{image.stem}.png"))


WRITERS: dict[str, Callable[[list[Annotated], str, ClassTable, float], None]] = {
    "labelme": _write_labelme,
    "cvat": _write_cvat,
    "yolo": _write_yolo,
    "coco": _write_coco,
    "via": _write_via,
    "png": _write_png,
}
# Their files are named as the images, without the ending
_FILE_PER_IMAGE = ("labelme", "yolo", "png")


def _check_stems(images: list[Annotated]) -> None:
    first: dict[str, str] = {}
    for image in images:
        if first.setdefault(image.stem, image.path) != image.path:
            raise ConfigError(f"{image.path}: has the same name as {first[image.stem]}. Rename one of them.")


def _place(*parts: str) -> str:
    """The path of a file that is written, whose folder is made."""
    path = os.path.join(*parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def _score_text(segment: Segment) -> str:
    return "" if segment.score is None else f"score {segment.score:.3f}"


def _png_text(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
