"""The image files of a data set."""

import difflib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ...errors import DataError
from ..files import exif_orientation, read_image
from ..pixels import PixelFormat
from .faults import Fault

_MAX_THREADS = 8
# The maximum of 12 bits stored in files of 16 bits, on the scale to 255
_DARK = 255 / 16


class ImageEntry(NamedTuple):
    """An image as a data set lists it: path, the place that lists it, and (height, width) if stated there."""

    path: str
    where: str
    size: tuple[int, int] | None = None


class ImageFacts(NamedTuple):
    """size: (height, width) as it is seen; digest: equal for files with the same content."""

    size: tuple[int, int]
    digest: str


def map_files(read: Callable[[Any], Any], items: Sequence[Any], title: str) -> Iterator[Any]:
    """What ``read`` gives for each of the items, in their order; in threads, with a progress bar on a terminal."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.map(read, items), title, len(items), unit="image", mininterval=1, disable=None)


def check_images(entries: list[ImageEntry], pixel_format: PixelFormat) -> tuple[dict[str, ImageFacts], list[Fault]]:
    """Read all images as the model takes them.

    Returns:
        Facts by path of those that can be read, and what is wrong.
    """
    facts: dict[str, ImageFacts] = {}
    faults: list[Fault] = []
    first: dict[str, str] = {}
    check = functools.partial(_check_image, pixel_format=pixel_format)
    results = map_files(check, entries, "Reading images")
    for entry, (found, problems) in zip(entries, results, strict=True):
        faults += problems
        if found is None or entry.path in facts:
            continue
        facts[entry.path] = found
        same = first.setdefault(found.digest, entry.path)
        if same != entry.path:
            faults.append(Fault("same picture", entry.path, entry.where, f"has the same content as {same}"))
    return facts, faults


def _check_image(entry: ImageEntry, pixel_format: PixelFormat) -> tuple[ImageFacts | None, list[Fault]]:
    path, where, stated = entry
    if not PathManager.isfile(path):
        return None, [Fault("missing image", path, where, "does not exist" + _similar_file(path))]
    try:
        image = read_image(path, pixel_format)
        with PathManager.open(path, "rb") as f:
            content = f.read()
    except (DataError, OSError) as error:
        return None, [Fault("unreadable image", path, where, str(error.__cause__ or error))]
    faults = []
    size, orientation = image.shape[:2], exif_orientation(content)
    stored, turned = size[::-1] if orientation >= 5 else size, orientation != 1
    if image.dtype != np.uint8 and 0 < image.max() < _DARK:
        what = f"has no value above {100 * image.max() / 255:.1f} % of its range"
        faults.append(Fault("dark image", path, where, what))
    if stated is not None and tuple(stated) != size:
        what = f"is {size[1]} x {size[0]} pixels (width x height), but {stated[1]} x {stated[0]} are stated"
        if turned and tuple(stated) == stored:
            what += ", as it is stored, before its EXIF tag rotates it"
        faults.append(Fault("image size", path, where, what))
    elif turned and (stated is None or stored == size):
        faults.append(Fault("image rotated by EXIF", path, where, "has an EXIF tag that rotates or mirrors it"))
    return ImageFacts(size, hashlib.sha256(content).hexdigest()), faults


def _similar_file(path: str) -> str:
    """A hint where a file of nearly this name is there: other capitals, back slashes, another ending."""
    folder, name = os.path.split(path.replace("\\", "/"))
    if os.path.isfile(os.path.join(folder, name)):
        return f"; {os.path.join(folder, name)} does: use / in file_name"
    if not os.path.isdir(folder):
        return f"; nor does its folder {folder}"
    there = os.listdir(folder)
    other_case = [x for x in there if x.lower() == name.lower()]
    close = other_case or difflib.get_close_matches(name, there, 1, cutoff=0.9)
    return f"; did you mean {close[0]}?" if close else ""
