"""One data set as two: a part of its images for validation, the others for training."""

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from detectron2.data import MetadataCatalog

from ..errors import DataError


class Part(NamedTuple):
    """Which images of a data set belong to one of its two parts.

    It depends on the names of the files alone: neither on their order nor on the machine. A new image moves at most
    one other from one part to the other.

    Attributes:
        fraction: of the images that is for validation, between 0 and 1; each part has at least one image.
        is_validation: whether this is that part.
    """

    fraction: float
    is_validation: bool

    def select(self, names: Iterable[str]) -> set[str]:
        """Those of the names that belong to this part."""
        ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
        number = min(max(round(self.fraction * len(ordered)), 1), len(ordered) - 1)
        return set(ordered[:number] if self.is_validation else ordered[number:])


def load_part(load: Callable[[], list[dict]], name: str) -> list[dict]:
    """The records of the part that the metadata of name describes; sets "image_ids", which evaluation is limited to.

    Args:
        load: gives the records of the whole data set.
        name: of the part; its metadata has "part" and "image_root".
    """
    metadata, records = MetadataCatalog.get(name), load()
    if len(records) < 2:
        raise DataError(f"Data set {name} can't be a part of {len(records)} images. Remove 'validation' or add images.")
    names = [os.path.relpath(record["file_name"], metadata.image_root).replace(os.sep, "/") for record in records]
    selected = metadata.part.select(names)
    records = [record for record, name_ in zip(records, names, strict=True) if name_ in selected]
    if all("image_id" in record for record in records):
        metadata.image_ids = [record["image_id"] for record in records]
    return records
