"""Splits a data set into parts for training, validation and test, and takes a subset of it for a first try."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from detectron2.data import MetadataCatalog

from ..errors import DataError

ALL, TRAIN, VAL, TEST = "all", "train", "val", "test"
# Value of group_by for the images of a folder
FOLDER = "folder"


class Part(NamedTuple):
    """A part of a data set.

    The split depends only on the file names, so it is the same everywhere. Adding an image moves few others to another
    part. All images of a group are in the same part; so are all versions of a photo (see :func:`photo_of`).

    Attributes:
        kind: "train", "val" or "test"; "all" for the whole data set.
        validation, test: share of the groups in these parts, 0 to 1; a part that is used has at least one group.
        group_by: what the images of a group share: FOLDER, or a regular expression that is searched in the file name
            and whose groups (or else whose match) name the group; "": each photo is a group.
        limit: largest number of images; 0 = all. The images with the first hashes of their names are taken.
    """

    kind: str
    validation: float = 0.0
    test: float = 0.0
    group_by: str = ""
    limit: int = 0

    @property
    def num_parts(self) -> int:
        return 1 + (self.validation > 0) + (self.test > 0)

    def select(self, names: Iterable[str]) -> set[str]:
        """Return the names that belong to this part.

        Raises:
            DataError: a name has no group.
        """
        names = set(names)
        if self.kind != ALL:
            groups = {name: self.group_of(name) for name in names}
            ordered = sorted(set(groups.values()), key=_hash)
            spare = len(ordered) - self.num_parts
            validation = self._number(self.validation, len(ordered), spare)
            test = self._number(self.test, len(ordered), spare - max(validation - 1, 0))
            parts = {VAL: ordered[:validation], TEST: ordered[validation : validation + test]}
            chosen = set(parts.get(self.kind, ordered[validation + test :]))
            names = {name for name in names if groups[name] in chosen}
        return set(sorted(names, key=_hash)[: self.limit]) if self.limit else names

    @staticmethod
    def _number(fraction: float, number: int, spare: int) -> int:
        """The number of groups of a part, if every part has one group and ``spare`` can be given to this one."""
        return min(max(round(fraction * number), 1), 1 + max(spare, 0)) if fraction else 0

    def group_of(self, name: str) -> str:
        """Return the name of the group of an image.

        Raises:
            DataError: group_by is not found in the name.
        """
        photo = photo_of(name)
        if not self.group_by:
            return photo
        if self.group_by == FOLDER:
            return os.path.dirname(photo)
        match = re.search(self.group_by, photo)
        if match is None:
            raise DataError(f"{name}: group_by = {self.group_by!r} is not found in this file name. Correct group_by.")
        return "/".join(x or "" for x in match.groups()) or match[0]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


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
        DataError: the data set has fewer groups than parts.
    """
    metadata, records = MetadataCatalog.get(name), load()
    names = [os.path.relpath(record["file_name"], metadata.image_root).replace(os.sep, "/") for record in records]
    part: Part = metadata.part
    groups = len({part.group_of(x) for x in names}) if part.kind != ALL else part.num_parts
    if groups < part.num_parts:
        what = "groups" if part.group_by else "photos"
        raise DataError(
            f"Data set {name} can't be split: it has images of {groups} {what} for {part.num_parts} parts. Remove "
            "'validation' or 'test', or add images."
        )
    selected = part.select(names)
    records = [record for record, name_ in zip(records, names, strict=True) if name_ in selected]
    if all("image_id" in record for record in records):
        metadata.image_ids = [record["image_id"] for record in records]
    return records
