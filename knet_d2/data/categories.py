"""The classes of a model: which they are for a task, and how they relate to the ids of a data set's metadata.

A model numbers its classes as things 0..T-1, then stuff T..T+S-1. Detectron2's metadata has contiguous ids of its
own, which differ between registrations (stuff of COCO is 80..132 in one and 1..53 in another), so ids are always
mapped through a CategoryTable, never by an offset.
"""

import logging
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata

from ..errors import ConfigError, DataError
from .build import loaded_metadata

logger = logging.getLogger(__name__)

TASKS = ("instance", "panoptic", "semantic")


class CategoryTable(NamedTuple):
    """Names of a model's classes, and the contiguous id that the metadata gives each."""

    thing_names: list[str]
    stuff_names: list[str]
    thing_category_ids: list[int]
    stuff_category_ids: list[int]


def category_table(metadata: Metadata, task: str) -> CategoryTable:
    """The classes that a model for a task has on a data set.

    Args:
        metadata: Detectron2's metadata of the data set.
        task: "instance" (things only), "panoptic" (things and stuff) or "semantic" (all classes as stuff).

    Raises:
        ConfigError: the data set lacks the classes that the task needs.
    """
    if task == "semantic":
        names = list(_class_names(metadata, "stuff_classes", task))
        return CategoryTable([], names, [], list(range(len(names))))
    things = _thing_classes(metadata, task)
    stuff = _stuff_classes(metadata, task) if task == "panoptic" else {}
    return CategoryTable(list(things.values()), list(stuff.values()), list(things), list(stuff))


def resolve_classes(cfg: CfgNode) -> None:
    """Fill the numbers of classes and the category ids that are 0 or [] in the config (in place).

    They come from the metadata of DATASETS.TRAIN (where that is empty: DATASETS.TEST). All data sets must agree with
    each other and with what the config states. Data sets that aren't there are no matter when nothing is left to fill.

    Raises:
        ConfigError: something disagrees, or the numbers are 0 and no data set tells them.
    """
    knet = cfg.MODEL.KNET
    if knet.TASK not in TASKS:
        raise ConfigError(f"MODEL.KNET.TASK is {knet.TASK!r}; it must be one of {', '.join(TASKS)}.")
    needed = {"instance": (knet.NUM_THING_CLASSES,), "semantic": (knet.NUM_STUFF_CLASSES,)}.get(
        knet.TASK, (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES)
    )
    known_ids = (len(knet.THING_CATEGORY_IDS), len(knet.STUFF_CATEGORY_IDS))
    # Ids for all classes: the config was resolved before, and a number that is 0 (no stuff) is meant
    complete = all(needed) or (any(needed) and known_ids == (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES))
    tables = _tables(cfg, required=not complete)
    if not tables and not complete:
        raise ConfigError(
            'MODEL.KNET.NUM_THING_CLASSES or NUM_STUFF_CLASSES is 0 ("from the data set"), but DATASETS.TRAIN and '
            "DATASETS.TEST are empty. Name a data set, or give the numbers."
        )
    if tables:
        first = next(iter(tables))
        _check_agreement(knet.TASK, tables, first)
        _fill(knet, tables[first], first)
    else:
        _fill_without_data(knet)


def _tables(cfg: CfgNode, required: bool) -> dict[str, CategoryTable]:
    """Category tables by data set name, of those that can be had; required: raise where one can't."""
    tables = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not isinstance(name, str):
            raise ConfigError(f"DATASETS.TRAIN or DATASETS.TEST has {str(name)[:60]} in it; name data sets there.")
        if name not in DatasetCatalog and not required:
            continue
        try:
            tables[name] = category_table(loaded_metadata(name), cfg.MODEL.KNET.TASK)
        except DataError as error:
            if required:
                raise
            logger.warning("The classes of data set %s can't be compared with the model's: %s", name, error)
    return tables


def _check_agreement(task: str, tables: dict[str, CategoryTable], first: str) -> None:
    expected = tables[first]
    for name, table in tables.items():
        same_stuff = (table.stuff_names, table.stuff_category_ids) == (
            expected.stuff_names,
            expected.stuff_category_ids,
        )
        same_things = (table.thing_names, table.thing_category_ids) == (
            expected.thing_names,
            expected.thing_category_ids,
        )
        if not (same_stuff and same_things):
            raise ConfigError(
                f"The data sets in DATASETS.TRAIN and DATASETS.TEST must have the same classes for task {task!r}, but "
                f"{first} has {_describe(expected)} and {name} has {_describe(table)}"
                f"{_first_difference(expected, table)}."
            )


def _describe(table: CategoryTable) -> str:
    return f"{len(table.thing_names)} thing and {len(table.stuff_names)} stuff classes"


def _first_difference(a: CategoryTable, b: CategoryTable) -> str:
    names = zip(a.thing_names + a.stuff_names, b.thing_names + b.stuff_names)  # noqa: B905
    for i, (first, second) in enumerate(names):
        if first != second:
            return f" (class {i} is {first!r} in one and {second!r} in the other)"
    return ""


def _fill(knet: CfgNode, table: CategoryTable, name: str) -> None:
    values = {
        "NUM_THING_CLASSES": len(table.thing_names),
        "NUM_STUFF_CLASSES": len(table.stuff_names),
        "THING_CATEGORY_IDS": table.thing_category_ids,
        "STUFF_CATEGORY_IDS": table.stuff_category_ids,
    }
    for key, value in values.items():
        given = list(knet[key]) if isinstance(value, list) else knet[key]
        if given and given != value:
            raise ConfigError(
                f"MODEL.KNET.{key} is {given}, but data set {name} has {value} for task {knet.TASK!r}. "
                f"Correct it, or set it to {'0' if isinstance(value, int) else '[]'} to take it from the data set."
            )
        knet[key] = value


def _fill_without_data(knet: CfgNode) -> None:
    """Without a data set the metadata ids are the model's own, where the config has none."""
    first_stuff = 0 if knet.TASK == "semantic" else knet.NUM_THING_CLASSES
    if not knet.THING_CATEGORY_IDS:
        knet.THING_CATEGORY_IDS = list(range(knet.NUM_THING_CLASSES))
    if not knet.STUFF_CATEGORY_IDS:
        knet.STUFF_CATEGORY_IDS = list(range(first_stuff, first_stuff + knet.NUM_STUFF_CLASSES))


def _thing_classes(metadata: Metadata, task: str) -> dict[int, str]:
    """Contiguous id -> name of the things, by rising id."""
    names = _class_names(metadata, "thing_classes", task)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    contiguous = sorted(ids.values()) if ids is not None else range(len(names))
    return {i: names[i] for i in contiguous}


def _stuff_classes(metadata: Metadata, task: str) -> dict[int, str]:
    """Contiguous id -> name of the classes that are stuff only, by rising id."""
    names = _class_names(metadata, "stuff_classes", task)
    ids = metadata.get("stuff_dataset_id_to_contiguous_id")
    if ids is None:
        things = set(metadata.get("thing_classes"))
        return {i: name for i, name in enumerate(names) if name not in things}
    things = metadata.get("thing_dataset_id_to_contiguous_id", {})
    # Detectron2's "separated" registration has one more entry, 0 -> 0, "things", for all pixels of things.
    contiguous = sorted(c for d, c in ids.items() if d not in things and not (d == 0 and names[c] == "things"))
    return {i: names[i] for i in contiguous}


def _class_names(metadata: Metadata, key: str, task: str) -> list[str]:
    names = metadata.get(key)
    if not names:
        raise ConfigError(
            f"Data set {metadata.name} has no {key} in its metadata, which task {task!r} needs (MODEL.KNET.TASK)."
        )
    return names
