"""The classes of a model: which they are for a task, their names, and their ids in a data set's metadata.

A model numbers its classes as things 0..T-1, then stuff T..T+S-1. Detectron2's metadata has contiguous ids of its
own, which differ between registrations (stuff of COCO is 80..132 in one and 1..53 in another), and a thing and a stuff
class may have the same id. So a class is identified by (isthing, category id), never by the id alone or an offset.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.colormap import colormap

from ..errors import ConfigError, DataError
from ..tasks import Task, get_task
from .records import load_dataset
from .timm_names import fill_pixel_statistics

logger = logging.getLogger(__name__)


class ClassTable(NamedTuple):
    """The K classes of a model, things first.

    Attributes:
        names: of the classes; the ids as text where no data set tells them.
        category_ids: contiguous ids in the data set's metadata, which are not COCO's "category_id": see ``file_ids``.
        colors: RGB, 0 .. 255.
        num_things: number of thing classes.
        dataset_ids: ids in the data set's own files; () = not known.
    """

    names: list[str]
    category_ids: list[int]
    colors: list[tuple[int, int, int]]
    num_things: int
    dataset_ids: Sequence[int] = ()

    @classmethod
    def from_metadata(cls, metadata: Metadata, task: Task) -> ClassTable:
        """The classes that a model for a task has on a data set.

        Raises:
            ConfigError: the data set lacks the classes that the task needs.
        """
        things, stuff = (_classes_of(metadata, kind, task.name) for kind in (task.things, task.stuff))
        ids = [*things, *stuff]
        dataset_ids = [*_dataset_ids(metadata, "thing", things), *_dataset_ids(metadata, "stuff", stuff)]
        colors = _palette(len(ids))
        for i, category in enumerate(ids):
            known = metadata.get("thing_colors" if i < len(things) else "stuff_colors", ())
            if category < len(known):
                colors[i] = tuple(known[category])
        return cls([*things.values(), *stuff.values()], ids, colors, len(things), dataset_ids)

    @property
    def file_ids(self) -> Sequence[int]:
        """Ids for files, as COCO's "category_id": those of the data set, or the contiguous ones where it tells none."""
        return self.dataset_ids or self.category_ids

    @property
    def has_names(self) -> bool:
        """Whether a data set told the names."""
        return self.names != [str(i) for i in self.category_ids]

    @property
    def thing_names(self) -> list[str]:
        return self.names[: self.num_things]

    @property
    def stuff_names(self) -> list[str]:
        return self.names[self.num_things :]

    @property
    def thing_category_ids(self) -> list[int]:
        return self.category_ids[: self.num_things]

    @property
    def stuff_category_ids(self) -> list[int]:
        return self.category_ids[self.num_things :]

    def is_background(self, label: int) -> bool:
        """Whether a class is stuff, or of a semantic model, and named "background": all that is no object."""
        return label >= self.num_things and self.names[label].lower() == "background"

    def named_like(self, other: ClassTable | None) -> ClassTable:
        """This table; where no data set told its names, with those of a table with as many things and stuff classes."""
        if self.has_names or other is None:
            return self
        if (len(other.names), other.num_things) != (len(self.names), self.num_things):
            return self
        return other._replace(category_ids=self.category_ids)

    def label_of(self, category_id: int, isthing: bool) -> int:
        """The index of a class in this table.

        Raises:
            ValueError: there is no such class.
        """
        if isthing:
            return self.thing_category_ids.index(category_id)
        return self.num_things + self.stuff_category_ids.index(category_id)


def class_table(cfg: CfgNode) -> ClassTable:
    """Classes of a model of ``cfg`` (with its classes resolved); their ids are the names where none are known."""
    knet = cfg.MODEL.KNET
    ids = [*knet.THING_CATEGORY_IDS, *knet.STUFF_CATEGORY_IDS]
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in MetadataCatalog:
            continue
        try:
            table = ClassTable.from_metadata(MetadataCatalog.get(name), get_task(cfg))
        except ConfigError:  # the data set is of another task, or its classes are known only when its files are read
            continue
        if (table.category_ids, table.num_things) == (ids, knet.NUM_THING_CLASSES):
            return table
    return ClassTable([str(i) for i in ids], ids, _palette(len(ids)), knet.NUM_THING_CLASSES)


def categories(classes: ClassTable) -> list[dict[str, Any]]:
    """The classes as COCO's "categories": id (the contiguous one), name, isthing, color, and dataset_id."""
    columns = enumerate(zip(classes.category_ids, classes.names, classes.colors, classes.file_ids, strict=True))
    return [
        {"id": i, "name": name, "isthing": n < classes.num_things, "color": list(color), "dataset_id": dataset_id}
        for n, (i, name, color, dataset_id) in columns
    ]


def from_categories(records: Sequence[dict[str, Any]]) -> ClassTable:
    """The table that :func:`categories` was made from."""
    colors = [tuple(x["color"]) for x in records]
    num_things = sum(x["isthing"] for x in records)
    dataset_ids = [x.get("dataset_id", x["id"]) for x in records]  # files of earlier versions have none
    return ClassTable([x["name"] for x in records], [x["id"] for x in records], colors, num_things, dataset_ids)


def has_classes(cfg: CfgNode) -> bool:
    """Whether the classes of a config are resolved: each has a category id, and there is at least one."""
    knet = cfg.MODEL.KNET
    sizes = (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES)
    return (len(knet.THING_CATEGORY_IDS), len(knet.STUFF_CATEGORY_IDS)) == sizes != (0, 0)


def with_classes(cfg: CfgNode) -> CfgNode:
    """A config with its classes and the normalisation of its images resolved: ``cfg`` itself if they are, else a copy.

    The predictor and the model call it. For a config of :func:`knet_d2.engine.load_config` nothing is left to do, and
    no data set is looked at.
    """
    if has_classes(cfg) and len(cfg.MODEL.PIXEL_MEAN) and len(cfg.MODEL.PIXEL_STD):
        return cfg
    resolved = cfg.clone()
    resolved.defrost()
    resolve_classes(resolved)
    fill_pixel_statistics(resolved)
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def resolve_classes(cfg: CfgNode) -> None:
    """Fill the numbers of classes and the category ids that are 0 or [] in the config (in place).

    They come from the metadata of DATASETS.TRAIN (where that is empty: DATASETS.TEST). All data sets must agree with
    each other and with what the config states. Data sets that aren't there are no matter when nothing is left to fill.

    Raises:
        ConfigError: something disagrees, or the numbers are 0 and no data set tells them.
    """
    knet, task = cfg.MODEL.KNET, get_task(cfg)
    kinds = ((task.things, knet.NUM_THING_CLASSES), (task.stuff, knet.NUM_STUFF_CLASSES))
    complete = all(number for kind, number in kinds if kind) or has_classes(cfg)
    tables = _tables(cfg, task, required=not complete)
    if tables:
        _check_agreement(task, tables)
        _fill(knet, *next(iter(tables.items())))
    elif complete:  # without a data set the metadata's ids are the model's own
        first_stuff = knet.NUM_THING_CLASSES if task.things else 0
        knet.THING_CATEGORY_IDS = knet.THING_CATEGORY_IDS or list(range(knet.NUM_THING_CLASSES))
        stuff = range(first_stuff, first_stuff + knet.NUM_STUFF_CLASSES)
        knet.STUFF_CATEGORY_IDS = knet.STUFF_CATEGORY_IDS or list(stuff)
    else:
        raise ConfigError(
            'MODEL.KNET.NUM_THING_CLASSES or NUM_STUFF_CLASSES is 0 ("from the data set"), but DATASETS.TRAIN and '
            "DATASETS.TEST are empty. Name a data set, or give the numbers."
        )


def loaded_metadata(name: str) -> Metadata:
    """The metadata of a data set with its classes, which Detectron2 knows of some data sets only after reading them."""
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        load_dataset(name)
    return metadata


def _tables(cfg: CfgNode, task: Task, required: bool) -> dict[str, ClassTable]:
    """Class tables by data set name, of those that can be had; required: raise where one can't."""
    tables = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not isinstance(name, str):
            raise ConfigError(f"DATASETS.TRAIN or DATASETS.TEST has {str(name)[:60]} in it; name data sets there.")
        if name not in DatasetCatalog and not required:
            continue
        try:
            tables[name] = ClassTable.from_metadata(loaded_metadata(name), task)
        except DataError as error:
            if required:
                raise
            logger.warning("The classes of data set %s can't be compared with the model's: %s", name, error)
    return tables


def _check_agreement(task: Task, tables: dict[str, ClassTable]) -> None:
    (first, expected), *others = tables.items()
    for name, table in others:
        if table._replace(colors=expected.colors, dataset_ids=expected.dataset_ids) == expected:
            continue
        names = zip(expected.names, table.names)  # noqa: B905
        differences = ((i, a, b) for i, (a, b) in enumerate(names) if a != b)
        where = next((f" (class {i} is {a!r} in one and {b!r} in the other)" for i, a, b in differences), "")
        raise ConfigError(
            f"The data sets in DATASETS.TRAIN and DATASETS.TEST must have the same classes for task {task.name!r}, "
            f"but {first} has {_describe(expected)} and {name} has {_describe(table)}{where}."
        )


def _describe(table: ClassTable) -> str:
    return f"{table.num_things} thing and {len(table.names) - table.num_things} stuff classes"


def _fill(knet: CfgNode, name: str, table: ClassTable) -> None:
    values = {
        "NUM_THING_CLASSES": table.num_things,
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


def _classes_of(metadata: Metadata, kind: str | None, task: str) -> dict[int, str]:
    """Contiguous id -> name, by rising id, of one kind of classes: see :class:`knet_d2.tasks.Task`.things and stuff."""
    if kind is None:
        return {}
    key = "thing" if kind == "things" else "stuff"
    names = metadata.get(f"{key}_classes")
    if not names:
        raise ConfigError(
            f"Data set {metadata.name} has no {key}_classes in its metadata, which MODEL.KNET.TASK {task!r} needs. "
            "Choose another data set (DATASETS.TRAIN, DATASETS.TEST) or task."
        )
    ids = metadata.get(f"{key}_dataset_id_to_contiguous_id")
    if kind == "all" or (kind == "things" and ids is None):
        return dict(enumerate(names))
    if kind == "things":
        return {i: names[i] for i in sorted(ids.values())}
    if ids is None:
        things = set(metadata.get("thing_classes"))
        return {i: name for i, name in enumerate(names) if name not in things}
    things = metadata.get("thing_dataset_id_to_contiguous_id", {})
    # Detectron2's "separated" registration has one more entry, 0 -> 0, "things", for all pixels of things.
    contiguous = sorted(c for d, c in ids.items() if d not in things and not (d == 0 and names[c] == "things"))
    return {i: names[i] for i in contiguous}


def _dataset_ids(metadata: Metadata, kind: str, contiguous_ids: Iterable[int]) -> list[int]:
    """Ids in the files of a data set; of a semantic model, whose classes are all stuff, also those of things."""
    ids: dict[int, int] = {}
    for key in dict.fromkeys(("thing", kind)):
        mapping = metadata.get(f"{key}_dataset_id_to_contiguous_id") or {}
        ids |= {contiguous: dataset_id for dataset_id, contiguous in mapping.items()}
    return [ids.get(i, i) for i in contiguous_ids]


def _palette(number: int) -> list[tuple[int, int, int]]:
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    return [tuple(colors[i % len(colors)]) for i in range(number)]


def markdown_text(name: str) -> str:
    """A name in Markdown, with nothing that would be read as Markdown or HTML."""
    return re.sub(r"([\W_])", lambda match: f"&#{ord(match[0])};" if match[0] != " " else " ", name)
