"""Registers the data sets that a config describes in DATASETS.CUSTOM (see docs/DATASETS.md)."""

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError, DataError
from .coco_mending import log_mends
from .coco_records import instance_records, panoptic_records, records_of_content
from .files import ARRAY_TYPE, IGNORE_LABEL, IMAGE_TYPES, color_code, files_below
from .formats import READERS, Annotations, class_names, read_annotations, read_labelmap
from .split import ALL, FOLDER, TEST, TRAIN, VAL, Part, load_part

logger = logging.getLogger(__name__)

Loader = Callable[[], list[dict]]

IMAGE_SUFFIXES = (*IMAGE_TYPES, ARRAY_TYPE)
_registered: dict[str, tuple] = {}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.CUSTOM; an entry that is already registered is skipped.

    An entry with "validation" or "test" makes the data sets NAME_train, NAME_val and NAME_test. DATASETS.LIMIT takes a
    subset of each.

    Raises:
        ConfigError: an entry lacks a key, has an unknown key or a value of a wrong type, or its name belongs to
            another data set.
    """
    entries = cfg.DATASETS.CUSTOM
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"DATASETS.CUSTOM = {entries!r}: use a list of mappings.")
    made: dict[str, tuple[dict[str, Any], Part | None]] = {}
    for i, entry in enumerate(entries):
        entry = checked_entry(entry, f"DATASETS.CUSTOM[{i}]")
        for name, part in _parts(entry, cfg.DATASETS.LIMIT):
            if name in DatasetCatalog and _registered.get(name) != (entry, part):
                raise ConfigError(
                    f"DATASETS.CUSTOM[{i}].name: a data set {name!r} with other content exists; choose another name."
                )
            made[name] = (entry, part)
    _check_limit(cfg, set(made))
    for name, (entry, part) in made.items():
        if name in _registered:
            continue
        load = FORMATS[entry["type"]].register(name, entry)
        if part is not None:
            MetadataCatalog.get(name).part = part
            load = functools.partial(load_part, load, name)
        DatasetCatalog.register(name, load)
        _registered[name] = (entry, part)


def _parts(entry: dict[str, Any], limit: int) -> list[tuple[str, Part | None]]:
    """Return the names of the data sets that an entry makes, and the part of the images of each (None: all)."""
    name, validation, test = entry["name"], entry.get("validation", 0.0), entry.get("test", 0.0)
    if not (validation or test):
        return [(name, Part(ALL, limit=limit) if limit else None)]
    kinds = [TRAIN, *([VAL] if validation else []), *([TEST] if test else [])]
    return [(f"{name}_{kind}", Part(kind, validation, test, entry.get("group_by", ""), limit)) for kind in kinds]


def _check_limit(cfg: CfgNode, names: set[str]) -> None:
    limit = cfg.DATASETS.LIMIT
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ConfigError(f"DATASETS.LIMIT = {limit!r}: use a number of images, or 0 for all.")
    others = [x for x in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if x not in names]
    if limit and others:
        raise ConfigError(f"DATASETS.LIMIT = {limit}: is for data sets of DATASETS.CUSTOM, and {others[0]} is not one.")


def _register_instance(name: str, entry: dict[str, Any]) -> Loader:
    json_file, images = entry["json"], entry["images"]
    metadata = MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")
    if "classes" in entry:
        metadata.category_names = _class_list(entry)
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


def _register_annotations(name: str, entry: dict[str, Any]) -> Loader:
    """Register one of the formats of label tools; the annotations are read once, when they are first needed."""
    reader = READERS[entry["type"]]
    source, images = reader.source(entry), reader.images(entry)
    read = functools.cache(functools.partial(read_annotations, entry))
    MetadataCatalog.get(name).set(annotations=source, read_annotations=read, image_root=images, evaluator_type="coco")
    return lambda: annotation_records(read(), source, images, name)


def _register_sem_seg(name: str, entry: dict[str, Any]) -> Loader:
    images, labels = entry["images"], entry["labels"]
    classes = _class_list(entry)
    colors = _colors(entry, classes)
    label_map = _label_map(entry, len(classes))
    ids = {int(np.flatnonzero(label_map == label)[0]): label for label in range(len(classes))}
    if colors:
        label_map = np.full(len(colors), IGNORE_LABEL, np.int16)
        label_map[: len(classes)] = np.arange(len(classes))
    MetadataCatalog.get(name).set(
        stuff_classes=classes,
        image_root=images,
        sem_seg_root=labels,
        sem_seg_label_map=label_map,
        sem_seg_colors=colors,
        stuff_dataset_id_to_contiguous_id=ids,
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
    )
    return lambda: load_label_folder(images, labels, label_map, colors)


# Key of an entry -> (whether it is required, its Python types). Paths may start with ~.
Keys = dict[str, tuple[bool, tuple]]


class Format(NamedTuple):
    """A type of entries.

    Attributes:
        register: sets the metadata of a name from an entry, and returns a function that loads the records.
        keys: of an entry of this type, beside COMMON_KEYS.
    """

    register: Callable[[str, dict[str, Any]], Loader]
    keys: Keys


_PATH = (str,)
COMMON_KEYS: Keys = {
    "name": (True, (str,)),
    "type": (True, (str,)),
    "validation": (False, (float,)),
    "test": (False, (float,)),
    "group_by": (False, (str,)),
}
FORMATS: dict[str, Format] = {
    "coco_instance": Format(
        _register_instance, {"json": (True, _PATH), "images": (True, _PATH), "classes": (False, (str, list, tuple))}
    ),
    "coco_panoptic": Format(
        _register_panoptic,
        {
            "images": (True, _PATH),
            "panoptic_json": (True, _PATH),
            "panoptic_root": (True, _PATH),
            "instances_json": (False, _PATH),
        },
    ),
    **{kind: Format(_register_annotations, reader.keys) for kind, reader in READERS.items()},
    "sem_seg": Format(
        _register_sem_seg,
        {
            "images": (True, _PATH),
            "labels": (True, _PATH),
            "classes": (True, (str, list, tuple)),
            "ignore": (False, (list, tuple)),
            "label_values": (False, (int, list, tuple)),
            "colors": (False, (str, list, tuple)),
            "ignore_colors": (False, (list, tuple)),
        },
    ),
}


def annotation_records(annotations: Annotations, source: str, image_root: str, name: str) -> list[dict]:
    """Make the records of annotations from a label tool; classes and notes as in instance_records."""
    content = annotations.checked(source)
    log_mends(source, annotations.notes)
    return records_of_content(content, source, image_root, name)


def load_label_folder(
    image_root: str, label_root: str, label_map: np.ndarray, colors: Sequence[int] = ()
) -> list[dict]:
    """Make records from a folder of images and a folder of label maps.

    An image and its label map have the same path below their folders, without the suffix.

    Args:
        image_root: folder of images; its sub-folders are searched, too.
        label_root: folder of PNGs that hold one class id per pixel.
        label_map: maps a value of the PNG to a label, see read_sem_seg.
        colors: see read_labels.

    Raises:
        DataError: an image has no label map, or a folder is missing or empty.
    """
    images, labels = _by_stem(image_root, IMAGE_SUFFIXES), _by_stem(label_root, (".png",))
    missing = sorted(set(images) - set(labels))
    if missing:
        raise DataError(
            f"{label_root}: {len(missing)} of {len(images)} images in {image_root} have no label map here. The first "
            f"is {images[missing[0]]}: add {os.path.join(label_root, missing[0] + '.png')}, or remove the image."
        )
    unused = sorted(set(labels) - set(images))
    if unused:
        first = labels[unused[0]]
        logger.warning("%d label maps have no image in %s. The first is %s.", len(unused), image_root, first)
    common = {"sem_seg_label_map": label_map, **({"sem_seg_colors": list(colors)} if len(colors) else {})}
    return [{"file_name": images[stem], "sem_seg_file_name": labels[stem], **common} for stem in sorted(images)]


def _by_stem(root: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Find the files below root with one of the suffixes: {path below root, without suffix: path}."""
    found: dict[str, str] = {}
    for stem, path in files_below(root, suffixes):
        if found.setdefault(stem, path) != path:
            raise DataError(f"{path}: has the same name as {found[stem]}. Rename or remove one of them.")
    if not found:
        state = f"has no file of type {', '.join(suffixes)}" if os.path.isdir(root) else "does not exist"
        raise DataError(f"{root}: this folder {state}. Correct the path, or put the files there.")
    return found


def _class_list(entry: dict[str, Any]) -> list[str]:
    """Return the class names of "classes": a list, or a file; see class_names."""
    classes = entry["classes"]
    if isinstance(classes, str):
        classes = class_names(classes)
    if not classes or len(set(classes)) < len(classes) or not all(isinstance(x, str) for x in classes):
        raise ConfigError(f"DATASETS.CUSTOM, {entry['name']}: classes = {classes!r}: use one or more different names.")
    if len(classes) > IGNORE_LABEL:
        raise ConfigError(
            f"DATASETS.CUSTOM, {entry['name']}: classes has {len(classes)} names: use at most {IGNORE_LABEL}."
        )
    return list(classes)


def _colors(entry: dict[str, Any], classes: list[str]) -> list[int]:
    """Return the colours of the classes, then the ignored ones, as color_code gives them; [] if values count.

    "colors" is a list of [red, green, blue], or CVAT's labelmap.txt, whose other colours are ignored.
    """
    where = f"DATASETS.CUSTOM, {entry['name']}"
    colors, ignored = entry.get("colors", []), list(entry.get("ignore_colors", []))
    if not colors:
        if ignored:
            raise ConfigError(f"{where}: ignore_colors is for label maps in colour: add 'colors'.")
        return []
    if "label_values" in entry or "ignore" in entry:
        raise ConfigError(f"{where}: colors replace label_values and ignore: use colors and ignore_colors alone.")
    if isinstance(colors, str):
        table = read_labelmap(colors)
        missing = [name for name in classes if name not in table]
        if missing:
            raise ConfigError(f"{where}: classes has {missing[0]!r}, which {colors} lacks. Use its names.")
        ignored += [color for name, color in table.items() if name not in classes]
        colors = [table[name] for name in classes]
    if len(colors) != len(classes):
        raise ConfigError(f"{where}: colors has {len(colors)} entries: use one for each of {len(classes)} classes.")
    for color in [*colors, *ignored]:
        if not isinstance(color, (list, tuple)) or len(color) != 3 or not all(x in range(256) for x in color):
            raise ConfigError(f"{where}: the colour {color!r} is not [red, green, blue] with numbers from 0 to 255.")
    codes = [color_code(color) for color in [*colors, *ignored]]
    if len(set(codes[: len(classes)])) < len(classes) or set(codes[: len(classes)]) & set(codes[len(classes) :]):
        raise ConfigError(f"{where}: colors and ignore_colors must have each colour of a class only once.")
    return codes


def _label_map(entry: dict[str, Any], num_classes: int) -> np.ndarray:
    """Return an int16 array that maps a value of a label map to its class, 255 (ignored) or -1 (not allowed)."""
    where = f"DATASETS.CUSTOM, {entry['name']}"
    values, ignore = entry.get("label_values", 0), entry.get("ignore", [IGNORE_LABEL])
    if isinstance(values, int):
        values = list(range(values, values + num_classes))
    for key, numbers in (("label_values", values), ("ignore", ignore)):
        if not all(isinstance(x, int) and 0 <= x < 2**16 for x in numbers):
            raise ConfigError(f"{where}: {key} = {numbers!r}: use integers from 0 to 65535.")
    if len(values) != num_classes:
        raise ConfigError(f"{where}: label_values has {len(values)} values: use one for each of {num_classes} classes.")
    if len({*values, *ignore}) < len(values) + len(set(ignore)):
        raise ConfigError(
            f"{where}: label_values = {values} and ignore = {list(ignore)}: use each value only once in both."
        )
    label_map = np.full(max([*values, *ignore]) + 1, -1, np.int16)
    label_map[values] = np.arange(num_classes)
    label_map[list(ignore)] = IGNORE_LABEL
    return label_map


def checked_entry(entry: Any, where: str) -> dict[str, Any]:
    """Check all keys of an entry of DATASETS.CUSTOM; returns a copy with expanded paths.

    Args:
        entry: the entry.
        where: place of the entry in the config, for error messages.

    Raises:
        ConfigError: a key is missing or unknown, or a value is wrong.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} = {entry!r}: use a mapping with the keys name and type.")
    kind = entry.get("type")
    if kind not in FORMATS:
        raise ConfigError(f"{where}.type = {kind!r}: use one of {', '.join(FORMATS)}.")
    keys = {**COMMON_KEYS, **FORMATS[kind].keys}
    unknown = sorted(set(entry) - set(keys))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; type {kind} has the keys {', '.join(keys)}.")
    checked: dict[str, Any] = {}
    for key, (required, types) in keys.items():
        if key not in entry:
            if required:
                raise ConfigError(f"{where}: add the key {key!r}, which type {kind} needs.")
            continue
        value = entry[key]
        if not isinstance(value, types) or value == "":
            raise ConfigError(
                f"{where}.{key} = {value!r}: use a value of type {' or '.join(t.__name__ for t in types)}."
            )
        checked[key] = os.path.expanduser(value) if isinstance(value, str) else value
    for key in ("validation", "test"):
        if not 0 < checked.get(key, 0.5) < 1:
            raise ConfigError(f"{where}.{key} = {checked[key]}: use a number between 0 and 1, such as 0.2.")
    shares = [checked.get(key, 0.0) for key in ("validation", "test")]
    if sum(shares) >= 1:
        raise ConfigError(f"{where}: validation = {shares[0]} and test = {shares[1]} leave nothing for training.")
    _check_group_by(checked, where)
    return checked


def _check_group_by(entry: dict[str, Any], where: str) -> None:
    pattern = entry.get("group_by")
    if pattern is None:
        return
    if "validation" not in entry and "test" not in entry:
        raise ConfigError(f"{where}.group_by = {pattern!r}: is for a split: add 'validation' or 'test'.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{where}.group_by = {pattern!r}: use {FOLDER!r} or a regular expression ({error})."
        ) from error
