"""Collects images and objects from a reader, and makes the content of a COCO instances JSON of them."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from detectron2.utils.file_io import PathManager

from ...errors import DataError
from ..coco_mending import MendLog
from ..files import ARRAY_TYPE, IMAGE_TYPES, files_below
from ..segmentation import encode_mask

ONE_CLASS = "object"


class Place(NamedTuple):
    """A file, and a place in it, for example "region 3"; "" for the whole file."""

    path: str
    place: str = ""

    def __str__(self) -> str:
        return ": ".join(x for x in self if x)


class Builder:
    """The images and objects of a data set, in the order in which a reader adds them.

    Attributes:
        errors: what can't be read, as (path, place, what is wrong), see :meth:`error`.
        notes: what is read in another way than it is written.
    """

    def __init__(self, images: str, classes: Sequence[str] | str | None = None) -> None:
        """
        Args:
            images: folder of the images.
            classes: names of the classes in their order, or a file with them (see class_names); None: the names that
                occur, sorted.
        """
        if not os.path.isdir(images):
            raise DataError(f"{images}: this folder of images does not exist. Correct the path in DATASETS.CUSTOM.")
        self.root = images
        self.classes = None if classes is None else class_names(classes)
        self.errors: list[tuple[str, str, str]] = []
        self.notes = MendLog()
        self._images: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []

    def error(self, where: Place, what: Any) -> None:
        """Add a place that can't be read; ``what`` is the rest of a sentence whose subject is the place."""
        self.errors.append((*where, str(what)))

    def image_files(self) -> list[tuple[str, str]]:
        """The images as (path below the folder without ending, path below the folder).

        Raises:
            DataError: there is no image, or two images differ only in the ending.
        """
        found: dict[str, str] = {}
        for stem, path in files_below(self.root, (*IMAGE_TYPES, ARRAY_TYPE)):
            other = found.setdefault(stem, path)
            if other != path:
                raise DataError(f"{path}: has the same name as {other}. Rename or remove one of them.")
        if not found:
            raise DataError(f"{self.root}: this folder has no images ({', '.join(IMAGE_TYPES)}). Correct the path.")
        return [(stem, os.path.relpath(path, self.root)) for stem, path in found.items()]

    def add_image(self, file_name: str, size: tuple[int, int] | None = None) -> int:
        """Add an image by its file name below the folder, and (height, width) if it is known; returns its id."""
        image: dict[str, Any] = {"id": len(self._images) + 1, "file_name": file_name}
        if size is not None:
            image.update(height=size[0], width=size[1])
        self._images.append(image)
        return image["id"]

    def add_object(self, image_id: int, name: str | None, segmentation: Any, where: Place) -> None:
        """Add an object.

        Args:
            image_id: id of its image.
            name: name of its class; None if the annotations name no classes: it is the one in ``classes``, or "object".
            segmentation: polygons [[x0, y0, ...], ...], RLE, or a mask, bool [H, W].
            where: its place.
        """
        if name is None:
            name = self.classes[0] if self.classes and len(self.classes) == 1 else ONE_CLASS
        if self.classes is not None and name not in self.classes:
            self.error(where, f"has the class {name!r}, which is not among classes ({', '.join(self.classes)})")
            return
        if isinstance(segmentation, np.ndarray):
            segmentation = encode_mask(segmentation)
        self._objects.append({"image_id": image_id, "class": name, "segmentation": segmentation})

    def content(self) -> dict[str, Any]:
        """The content of a COCO instances JSON, without boxes and areas."""
        names = self.classes if self.classes is not None else sorted({x["class"] for x in self._objects})
        ids = {name: i for i, name in enumerate(names, 1)}
        annotations = [
            {
                "id": i,
                "image_id": x["image_id"],
                "category_id": ids[x["class"]],
                "iscrowd": 0,
                "segmentation": x["segmentation"],
            }
            for i, x in enumerate(self._objects, 1)
        ]
        return {
            "info": {},
            "images": self._images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
        }


def class_names(classes: Sequence[str] | str) -> list[str]:
    """Names of classes: a list, a text file with one name per line, or a YAML file with "names", as YOLO's data.yaml.

    Raises:
        DataError: the file does not exist or has no names, or a name occurs twice.
    """
    where = classes if isinstance(classes, str) else "classes"
    if isinstance(classes, str):
        if not PathManager.isfile(classes):
            raise DataError(
                f"{classes}: this file of class names does not exist. Correct 'classes' in DATASETS.CUSTOM."
            )
        if classes.lower().endswith((".yaml", ".yml")):
            classes = _yaml_names(classes)
        else:
            classes = [line.strip() for line in read_text(classes).strip().splitlines()]
    is_list = isinstance(classes, (list, tuple)) and all(type(x) in (str, int, float) for x in classes)
    names = [str(x) for x in classes or ()] if is_list else []
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{where}: holds the class names {classes}. Give one or more different names; in YAML, words such as no "
            "and on need quotes."
        )
    return names


def _yaml_names(path: str) -> Any:
    """The value of "names"; of {index: name}, the names by their indices."""
    content = read_yaml(path)
    names, count = (content.get("names"), content.get("nc")) if isinstance(content, dict) else (None, None)
    if isinstance(names, dict):
        by_index = {str(index): name for index, name in names.items()}
        missing = next((i for i in range(len(names)) if str(i) not in by_index), None)
        if missing is not None:
            raise DataError(f"{path}: names has the keys {[*names]}, without {missing}. Number the classes from 0.")
        names = [by_index[str(i)] for i in range(len(names))]
    if isinstance(names, list) and isinstance(count, int) and count != len(names):
        raise DataError(f"{path}: nc = {count}, but names has {len(names)} names. Correct one of them.")
    return names


def read_text(path: str) -> str:
    """Read a text file as UTF-8 with or without byte order mark, or as UTF-16 if it begins with its mark."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}). Correct the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 or UTF-16. Save it as UTF-8.") from error


def read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not valid YAML ({str(error).splitlines()[0]}). Correct it.") from error


def rectangle(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """A box as one polygon."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def ellipse(x: float, y: float, rx: float, ry: float, theta: float = 0.0) -> list[list[float]]:
    """An ellipse as one polygon; theta: rotation in radians, from x towards y."""
    angles = [2 * math.pi * i / 64 for i in range(64)]
    cos, sin = math.cos(theta), math.sin(theta)
    corners = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return [[v for dx, dy in corners for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]]


def flat(points: Iterable[Sequence[float]]) -> list[float]:
    """[[x, y], ...] as [x, y, ...]; a ValueError unless these are pairs of finite numbers."""
    numbers = [float(v) for x, y in points for v in (x, y)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a coordinate is not a finite number")
    return numbers
