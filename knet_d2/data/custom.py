"""Data sets that are given in the config, DATASETS.CUSTOM, without a line of Python (see docs/DATASETS.md)."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError
from .coco_records import instance_records, panoptic_records
from .files import files_below
from .split import Part, load_part

logger = logging.getLogger(__name__)

Loader = Callable[[], list[dict]]

IGNORE_LABEL = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_registered: dict[str, tuple] = {}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.CUSTOM; those that are registered already stay.

    An entry with "validation" gives two, NAME_train and NAME_val.

    Raises:
        ConfigError: an entry that lacks a key, has an unknown one or a value of a wrong type, or has a name that
            belongs to another data set.
    """
    entries = cfg.DATASETS.CUSTOM
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"DATASETS.CUSTOM must be a list of mappings, but is {entries!r}.")
    for i, entry in enumerate(entries):
        entry = checked_entry(entry, f"DATASETS.CUSTOM[{i}]")
        for name, part in _parts(entry):
            if _registered.get(name) == (entry, part):
                continue
            if name in DatasetCatalog:
                raise ConfigError(
                    f"DATASETS.CUSTOM[{i}].name: a data set {name!r} with other content exists. Choose another name."
                )
            load = FORMATS[entry["type"]](name, entry)
            if part is not None:
                MetadataCatalog.get(name).part = part
                load = functools.partial(load_part, load, name)
            DatasetCatalog.register(name, load)
            _registered[name] = (entry, part)


def _parts(entry: dict[str, Any]) -> list[tuple[str, Part | None]]:
    """Names of the data sets that an entry gives, and which part of its images each has (None: all)."""
    name, fraction = entry["name"], entry.get("validation")
    if fraction is None:
        return [(name, None)]
    return [(f"{name}_train", Part(fraction, False)), (f"{name}_val", Part(fraction, True))]


def _register_instance(name: str, entry: dict[str, Any]) -> Loader:
    json_file, images = entry["json"], entry["images"]
    MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")
    return lambda: instance_records(json_file, images, name)


def _register_panoptic(name: str, entry: dict[str, Any]) -> Loader:
    MetadataCatalog.get(name).set(
        panoptic_json=entry["panoptic_json"],
        panoptic_root=entry["panoptic_root"],
        image_root=entry["images"],
        json_file=entry.get("instances_json"),
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
    )
    paths = entry["panoptic_json"], entry["images"], entry["panoptic_root"]
    return lambda: panoptic_records(*paths, name)


def _register_sem_seg(name: str, entry: dict[str, Any]) -> Loader:
    images, labels = entry["images"], entry["labels"]
    classes = _class_list(entry)
    label_map = _label_map(entry, len(classes))
    MetadataCatalog.get(name).set(
        stuff_classes=classes,
        image_root=images,
        sem_seg_root=labels,
        sem_seg_label_map=label_map,
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
    )
    return lambda: load_label_folder(images, labels, label_map)


# Keys of all types, then those of each:
# type -> {key: (required, types)}; paths may start with ~.
_PATH = (str,)
COMMON_KEYS: dict[str, tuple[bool, tuple]] = {
    "name": (True, (str,)),
    "type": (True, (str,)),
    "validation": (False, (float,)),
}
KEYS: dict[str, dict[str, tuple[bool, tuple]]] = {
    "coco_instance": {"json": (True, _PATH), "images": (True, _PATH)},
    "coco_panoptic": {
        "images": (True, _PATH),
        "panoptic_json": (True, _PATH),
        "panoptic_root": (True, _PATH),
        "instances_json": (False, _PATH),
    },
    "sem_seg": {
        "images": (True, _PATH),
        "labels": (True, _PATH),
        "classes": (True, (str, list, tuple)),
        "ignore": (False, (list, tuple)),
        "label_values": (False, (int, list, tuple)),
    },
}
# Type -> sets the metadata of a name from an entry, and returns what loads the records.
FORMATS: dict[str, Callable[[str, dict[str, Any]], Loader]] = {
    "coco_instance": _register_instance,
    "coco_panoptic": _register_panoptic,
    "sem_seg": _register_sem_seg,
}


def load_label_folder(image_root: str, label_root: str, label_map: np.ndarray) -> list[dict]:
    """Records of all images in a folder with the label map of the same name (without suffix) in another.

    Args:
        image_root: folder of images; folders in it count too.
        label_root: folder of PNGs that hold one class id per pixel.
        label_map: value in the PNG -> label, see read_sem_seg.
    """
    images, labels = _by_stem(image_root, IMAGE_SUFFIXES), _by_stem(label_root, (".png",))
    missing = sorted(set(images) - set(labels))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images in {image_root} have no label map in {label_root}: the first is "
            f"{images[missing[0]]}, which needs {os.path.join(label_root, missing[0] + '.png')}."
        )
    unused = sorted(set(labels) - set(images))
    if unused:
        first = labels[unused[0]]
        logger.warning("%d label maps have no image in %s, the first is %s.", len(unused), image_root, first)
    return [
        {"file_name": images[stem], "sem_seg_file_name": labels[stem], "sem_seg_label_map": label_map}
        for stem in sorted(images)
    ]


def _by_stem(root: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The files below root with one of the suffixes: path below root without suffix -> path."""
    found: dict[str, str] = {}
    for stem, path in files_below(root, suffixes):
        if found.setdefault(stem, path) != path:
            raise DataError(f"{found[stem]} and {path} have the same name. Rename one, or move it away.")
    if not found:
        state = f"has no file of type {', '.join(suffixes)}" if os.path.isdir(root) else "does not exist"
        raise DataError(f"Folder {root} {state}.")
    return found


def _class_list(entry: dict[str, Any]) -> list[str]:
    """The names of "classes", from the list or from the file with one name a line."""
    classes = entry["classes"]
    if isinstance(classes, str):
        if not PathManager.isfile(classes):
            raise DataError(f"DATASETS.CUSTOM, {entry['name']}: the file of classes {classes} does not exist.")
        with PathManager.open(classes) as f:
            classes = [line.strip() for line in f if line.strip()]
    if not classes or len(set(classes)) < len(classes) or not all(isinstance(x, str) for x in classes):
        raise ConfigError(
            f"DATASETS.CUSTOM, {entry['name']}: classes must be different names, at least one; got {classes!r}."
        )
    if len(classes) > IGNORE_LABEL:
        raise ConfigError(
            f"DATASETS.CUSTOM, {entry['name']}: {len(classes)} classes; at most {IGNORE_LABEL} are possible."
        )
    return list(classes)


def _label_map(entry: dict[str, Any], num_classes: int) -> np.ndarray:
    """int16 array: value in a label file -> class, 255 where it is ignored, -1 where it must not occur."""
    where = f"DATASETS.CUSTOM, {entry['name']}"
    values, ignore = entry.get("label_values", 0), entry.get("ignore", [IGNORE_LABEL])
    if isinstance(values, int):
        values = list(range(values, values + num_classes))
    for key, numbers in (("label_values", values), ("ignore", ignore)):
        if not all(isinstance(x, int) and 0 <= x < 2**16 for x in numbers):
            raise ConfigError(f"{where}: {key} must be integers from 0 to 65535; got {numbers!r}.")
    if len(values) != num_classes:
        raise ConfigError(f"{where}: label_values has {len(values)} values for {num_classes} classes.")
    if len({*values, *ignore}) < len(values) + len(set(ignore)):
        raise ConfigError(f"{where}: a value occurs twice in label_values {values} and ignore {list(ignore)}.")
    label_map = np.full(max([*values, *ignore]) + 1, -1, np.int16)
    label_map[values] = np.arange(num_classes)
    label_map[list(ignore)] = IGNORE_LABEL
    return label_map


def checked_entry(entry: Any, where: str) -> dict[str, Any]:
    """A copy of an entry of DATASETS.CUSTOM with expanded paths, after all its keys were checked."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a mapping with the keys name and type, but is {entry!r}.")
    kind = entry.get("type")
    if kind not in KEYS:
        raise ConfigError(f"{where}.type is {kind!r}; it must be one of {', '.join(KEYS)}.")
    keys = {**COMMON_KEYS, **KEYS[kind]}
    unknown = sorted(set(entry) - set(keys))
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; type {kind} has {', '.join(keys)}.")
    checked = {}
    for key, (required, types) in keys.items():
        if key not in entry:
            if required:
                raise ConfigError(f"{where} lacks the key {key!r}, which type {kind} needs.")
            continue
        value = entry[key]
        if not isinstance(value, types) or value == "":
            raise ConfigError(
                f"{where}.{key} is {value!r}; it must be of type {' or '.join(t.__name__ for t in types)}."
            )
        is_path = isinstance(value, str) and key not in ("name", "type")
        checked[key] = os.path.expanduser(value) if is_path else value
    if not 0 < checked.get("validation", 0.5) < 1:
        raise ConfigError(f"{where}.validation is {checked['validation']}; it must be between 0 and 1, as 0.2.")
    return checked
