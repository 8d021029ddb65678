"""The classes of a model by name, as results and pictures show them and as its files carry them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.colormap import colormap

from ..errors import KNetError
from .categories import category_table


class ClassTable(NamedTuple):
    """The K classes of a model, things first: names, contiguous ids in the data set's metadata, and colours."""

    names: list[str]
    category_ids: list[int]
    colors: list[tuple[int, int, int]]
    num_things: int


def class_table(cfg: CfgNode) -> ClassTable:
    """Classes of a model of ``cfg`` (with its classes resolved); their ids are the names where none are known."""
    knet = cfg.MODEL.KNET
    sizes = (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES)
    ids = [*knet.THING_CATEGORY_IDS, *knet.STUFF_CATEGORY_IDS]
    names = [str(i) for i in ids]
    metadata = _known_metadata(cfg)
    if metadata is not None:
        try:
            table = category_table(metadata, knet.TASK)
        except KNetError:  # it is of another task, or its classes are known only when its files are read
            metadata = None
        else:
            if (len(table.thing_names), len(table.stuff_names)) == sizes:
                names = [*table.thing_names, *table.stuff_names]
    palette = colormap(rgb=True, maximum=255).astype(int).tolist()
    colors = [tuple(palette[i % len(palette)]) for i in range(len(ids))]
    for i, category in enumerate(ids):
        known = () if metadata is None else metadata.get("thing_colors" if i < sizes[0] else "stuff_colors", ())
        if category < len(known):
            colors[i] = tuple(known[category])
    return ClassTable(names, ids, colors, sizes[0])


def _known_metadata(cfg: CfgNode) -> Metadata | None:
    registered = [name for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if name in MetadataCatalog]
    return MetadataCatalog.get(registered[0]) if registered else None


def categories(classes: ClassTable) -> list[dict[str, Any]]:
    """The classes as COCO's "categories": id, name, isthing, color."""
    columns = enumerate(zip(classes.category_ids, classes.names, classes.colors))
    return [
        {"id": i, "name": name, "isthing": n < classes.num_things, "color": list(color)}
        for n, (i, name, color) in columns
    ]


def from_categories(records: Sequence[dict[str, Any]]) -> ClassTable:
    """The table that :func:`categories` was made from."""
    colors = [tuple(x["color"]) for x in records]
    num_things = sum(x["isthing"] for x in records)
    return ClassTable([x["name"] for x in records], [x["id"] for x in records], colors, num_things)
