"""The table of readers, and the steps that follow every reader: ids, sizes, boxes, areas and checks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import DataError
from ..coco_json import check_content
from ..coco_mending import MISSING_IMAGE, Mend, leave_out_missing_images, mend_coco
from .builder import Builder, Place
from .labelme import read_labelme
from .masks import read_instance_png, read_png_per_instance, read_voc
from .via import read_via
from .yolo import read_yolo

_PATH, _NAMES = (str,), (str, list, tuple)


class Reader(NamedTuple):
    """A format of annotations of instances.

    Attributes:
        read: fills a Builder from an entry of DATASETS.CUSTOM.
        keys: the keys of an entry -> (whether it is required, its Python types).
        images: the folder of the images of an entry.
        source: the file or folder of the annotations of an entry, for messages.
    """

    read: Callable[[dict[str, Any], Builder], None]
    keys: dict[str, tuple[bool, tuple]]
    images: Callable[[dict[str, Any]], str] = lambda entry: entry["images"]
    source: Callable[[dict[str, Any]], str] = lambda entry: entry["annotations"]


_IMAGES, _CLASSES = {"images": (True, _PATH)}, {"classes": (False, _NAMES)}
READERS: dict[str, Reader] = {
    "yolo_seg": Reader(
        read_yolo, {**_IMAGES, "labels": (True, _PATH), "classes": (True, _NAMES)}, source=lambda entry: entry["labels"]
    ),
    "via": Reader(read_via, {**_IMAGES, "annotations": (True, _PATH), "attribute": (False, (str,)), **_CLASSES}),
    "labelme": Reader(
        read_labelme,
        {"annotations": (True, _PATH), "images": (False, _PATH), **_CLASSES},
        images=lambda entry: entry.get("images", entry["annotations"]),
    ),
    "instance_png": Reader(
        read_instance_png,
        {**_IMAGES, "masks": (True, _PATH), "class_divisor": (False, (int,)), **_CLASSES},
        source=lambda entry: entry["masks"],
    ),
    "png_per_instance": Reader(
        read_png_per_instance, {**_IMAGES, "masks": (True, _PATH), **_CLASSES}, source=lambda entry: entry["masks"]
    ),
    "voc": Reader(
        read_voc,
        {"root": (True, _PATH), "list": (False, _PATH), **_CLASSES},
        images=lambda entry: os.path.join(entry["root"], "JPEGImages"),
        source=lambda entry: os.path.join(entry["root"], "SegmentationObject"),
    ),
}


class Annotations(NamedTuple):
    """What was read.

    Attributes:
        content: of a COCO instances JSON, complete.
        notes: what was read in another way than it is written, with the numbers of places.
        errors: (path, place, what is wrong) of what can't be read; ``content`` leaves it out.
    """

    content: dict[str, Any]
    notes: list[Mend]
    errors: list[tuple[str, str, str]]

    def without(self, reason: str) -> Annotations:
        """The annotations without the errors for a reason, a part of what is wrong."""
        return self._replace(errors=[x for x in self.errors if reason not in x[2]])

    def checked(self, source: str) -> dict[str, Any]:
        """Return the content.

        Raises:
            DataError: something can't be read; names the first place.
        """
        if self.errors:
            more = f" ({len(self.errors) - 1} more places: knet check lists them)" * (len(self.errors) > 1)
            first = ": ".join(x for x in self.errors[0] if x).rstrip(".")
            raise DataError(f"{first}{more}. Correct or remove it.")
        check_content(self.content, source)
        return self.content


def read_annotations(entry: dict[str, Any]) -> Annotations:
    """Read the annotations of an entry of DATASETS.CUSTOM whose type is one of READERS.

    Raises:
        DataError: a file or folder is missing, or is not of this format.
    """
    reader = READERS[entry["type"]]
    builder = Builder(reader.images(entry), entry.get("classes"))
    reader.read(entry, builder)
    content = builder.content()
    source = reader.source(entry)
    if not content["images"]:
        raise DataError(f"{source}: no image is annotated here. Correct the paths in DATASETS.CUSTOM.")
    if not content["categories"]:
        raise DataError(f"{source}: no object is annotated here, so there are no classes. Add 'classes'.")
    mend_coco(content, builder.root)  # sizes, boxes and areas, which these formats do not have
    for image in leave_out_missing_images(content, builder.root):
        builder.error(Place(os.path.join(builder.root, image)), "is annotated, but does not exist. " + MISSING_IMAGE)
    return Annotations(content, builder.notes.all(), builder.errors)
