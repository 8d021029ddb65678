"""Splits a data set into two: a held-out part of its images for validation, and the other images for training."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from detectron2.data import MetadataCatalog

from ..errors import DataError


class Part(NamedTuple):
    """One of the two parts of a data set.

    The split depends only on the file names, so it is the same everywhere. Adding an image moves at most one other
    image to the other part. All versions of a photo (see :func:`photo_of`) are in the same part.

    Attributes:
        fraction: share of the photos for validation, between 0 and 1; each part has at least one photo.
        is_validation: whether this is the validation part.
    """

    fraction: float
    is_validation: bool

    def select(self, names: Iterable[str]) -> set[str]:
        """Return the names that belong to this part."""
        names = set(names)
        ordered = sorted({photo_of(x) for x in names}, key=lambda name: hashlib.sha256(name.encode()).digest())
        number = min(max(round(self.fraction * len(ordered)), 1), len(ordered) - 1)
        photos = set(ordered[:number] if self.is_validation else ordered[number:])
        return {name for name in names if photo_of(name) in photos}


def photo_of(name: str) -> str:
    """Return what the file names of all augmented versions of a photo share.

    Roboflow writes several versions of a photo, as "NAME_jpg.rf.HASH.jpg".
    """
    return re.sub(r"\.rf\.[0-9A-Za-z]{8,}(?=\.\w+$)", "", name)


def load_part(load: Callable[[], list[dict]], name: str) -> list[dict]:
    """Return the records of one part of a data set.

    If the records have image ids, the ids are written into the metadata as "image_ids", because evaluation must be
    limited to these images.

    Args:
        load: function that returns the records of the whole data set.
        name: name of the part; its metadata has "part" and "image_root".

    Raises:
        DataError: the data set has fewer than two photos.
    """
    metadata, records = MetadataCatalog.get(name), load()
    names = [os.path.relpath(record["file_name"], metadata.image_root).replace(os.sep, "/") for record in records]
    photos = len({photo_of(x) for x in names})
    if photos < 2:
        raise DataError(
            f"Data set {name} can't be split: it has images of {photos} photos. Remove 'validation' or add images."
        )
    selected = metadata.part.select(names)
    records = [record for record, name_ in zip(records, names, strict=True) if name_ in selected]
    if all("image_id" in record for record in records):
        metadata.image_ids = [record["image_id"] for record in records]
    return records
