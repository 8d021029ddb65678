"""Checks a folder of label maps and the folder of their images."""

import functools
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ...errors import DataError
from ..custom import IMAGE_SUFFIXES
from ..files import UnknownColorError, files_below, read_labels
from .counts import find_absent_classes
from .faults import Fault
from .images import ImageEntry, check_images, map_files
from .report import DatasetReport, Use

_IGNORED = 255


def check_labels(
    name: str,
    image_root: str,
    label_root: str,
    classes: list[str],
    label_map: np.ndarray | None,
    use: Use,
    colors: Sequence[int] = (),
) -> DatasetReport:
    """Check all label maps of a folder, and the images that they belong to.

    Args:
        name: name of the data set.
        image_root, label_root: folders of images and label maps; an image and its label map have the same file name
            without suffix.
        classes: names of the classes.
        label_map: maps a value of a label map to its class, to 255 if it is ignored, or to -1 if it is not allowed.
            None: the values 0, 1, ... are the classes and 255 is ignored.
        use: what the data set is for.
        colors: see read_labels.
    """
    faults: list[Fault] = []
    folders = (image_root, label_root)
    faults += [Fault("missing folder", x, "", "does not exist") for x in folders if not os.path.isdir(x)]
    images, labels = dict(files_below(image_root, IMAGE_SUFFIXES)), dict(files_below(label_root, (".png",)))
    if use.part is not None:
        names = {os.path.relpath(path, image_root).replace(os.sep, "/"): stem for stem, path in images.items()}
        others = set(images) - {names[name] for name in use.part.select(names)}
        images, labels = ({k: v for k, v in files.items() if k not in others} for files in (images, labels))
    for stem in sorted(set(images) - set(labels)) if os.path.isdir(label_root) else ():
        what = f"has no label map {os.path.join(label_root, stem + '.png')}"
        faults.append(Fault("missing label map", images[stem], "", what))
    for stem in sorted(set(labels) - set(images)):
        faults.append(Fault("label map without image", labels[stem], "", f"has no image in {image_root}"))
    facts, image_faults = check_images([ImageEntry(images[stem], "") for stem in sorted(images)], use.pixel_format)
    if label_map is None:
        label_map = np.full(256, -1, np.int16)
        label_map[: len(classes)], label_map[_IGNORED] = np.arange(len(classes)), _IGNORED
    counts = _Counts(classes, label_map)
    stems = sorted(set(labels) & set(images))
    paths = [labels[stem] for stem in stems]
    sizes = [facts[images[stem]].size if images[stem] in facts else None for stem in stems]
    read = functools.partial(_read_values, colors=colors)
    for path, size, found in zip(paths, sizes, map_files(read, paths, "Reading label maps"), strict=True):
        faults += [found] if isinstance(found, Fault) else counts.add(path, size, *found)
    faults += counts.find_absent_classes(label_root, use, image_faults + faults)
    return DatasetReport(name, image_faults + faults, len(images), counts.table(), counts.summary(), facts)


def _read_values(path: str, colors: Sequence[int]) -> tuple[tuple[int, int], dict[int, int]] | Fault:
    """Read a label map; returns its (height, width) and the number of pixels of each value, or a fault."""
    try:
        labels = read_labels(path, colors=colors)
    except UnknownColorError as error:
        return Fault("value of no class", path, "", str(error))
    except DataError as error:
        if error.__cause__ is None:
            return Fault("label map in colour", path, "", "is a colour image")
        return Fault("unreadable label map", path, "", str(error.__cause__))
    values, counts = np.unique(labels, return_counts=True)
    return labels.shape, dict(zip(values.tolist(), counts.tolist(), strict=True))


class _Counts:
    """Counts the images and pixels of each class, and finds faults in the values of label maps."""

    def __init__(self, classes: list[str], label_map: np.ndarray) -> None:
        self._classes = classes
        self._label_map = label_map
        self._images: Counter = Counter()
        self._pixels: Counter = Counter()

    def add(
        self, path: str, size: tuple[int, int] | None, shape: tuple[int, int], values: dict[int, int]
    ) -> list[Fault]:
        """Check and count one label map.

        Args:
            path: path of the label map.
            size: (height, width) of the image; None if the image can't be read.
            shape: (height, width) of the label map.
            values: number of pixels of each value.
        """
        faults = []
        if size is not None and shape != size:
            what = f"has {shape[1]} x {shape[0]} pixels (width x height), but its image has {size[1]} x {size[0]}"
            faults.append(Fault("label map size", path, "", what))
        found: Counter = Counter()
        for value, count in values.items():
            label = int(self._label_map[value]) if value < len(self._label_map) else -1
            if label < 0:
                what = f"{count} pixels have a value that is neither a class nor ignored"
                faults.append(Fault("value of no class", path, f"value {value}", what))
            else:
                found[label] += count
        if set(found) == {_IGNORED}:
            faults.append(Fault("nothing labelled", path, "", "has only ignored pixels"))
        self._images.update(found.keys())
        self._pixels.update(found)
        return faults

    def find_absent_classes(self, label_root: str, use: Use, faults: list[Fault]) -> list[Fault]:
        names = {f"class {i}": name for i, name in enumerate(self._classes)}
        occurring = [f"class {i}" for i in range(len(self._classes)) if self._pixels[i]]
        return find_absent_classes(names, occurring, "pixel", label_root, use, faults)

    def table(self) -> list[dict]:
        total = sum(self._pixels[i] for i in range(len(self._classes))) or 1
        return [
            {"class": name, "images": self._images[i], "% of pixels": 100 * self._pixels[i] / total}
            for i, name in enumerate(self._classes)
        ]

    def summary(self) -> str:
        return f"{100 * self._pixels[_IGNORED] / max(sum(self._pixels.values()), 1):.1f} % of the pixels ignored"
