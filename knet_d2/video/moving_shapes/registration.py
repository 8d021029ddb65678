"""Registers moving shapes; the files of a split are generated when the split is first loaded."""

import functools
import os
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...data.custom import FORMATS
from ...data.shapes.registration import generate_folder
from ...data.shapes.writer import shapes_categories
from .. import formats  # noqa: F401  registers the types of the data sets
from .writer import write_moving_shapes

VERSION = "v1"
# Split -> (number of videos, seed)
SPLITS = {"train": (200, 1), "val": (50, 2)}


def make_split(split: str, root: str) -> str:
    """Generate the folder root/moving_shapes/<version>/<split> unless it exists; returns the folder.

    Raises:
        DataError: the files can't be written.
    """
    num_videos, seed = SPLITS[split]
    return generate_folder(_folder(split, root), lambda folder: write_moving_shapes(folder, num_videos, seed))


def register_moving_shapes(root: str) -> None:
    """Register moving_shapes_{instance,panoptic}_{train,val}, whose files are below root/moving_shapes."""
    categories = shapes_categories()
    names, colors = ([category[key] for category in categories] for key in ("name", "color"))
    things, stuff = ([i for i, x in enumerate(categories) if x["isthing"] == isthing] for isthing in (1, 0))
    of_things = {
        "thing_classes": names[: len(things)],
        "thing_colors": colors[: len(things)],
        "thing_dataset_id_to_contiguous_id": {categories[i]["id"]: i for i in things},
    }
    of_all = {
        **of_things,
        **{"thing_classes": names, "thing_colors": colors, "stuff_classes": names, "stuff_colors": colors},
        "stuff_dataset_id_to_contiguous_id": {categories[i]["id"]: i for i in stuff},
    }
    for split in SPLITS:
        folder = _folder(split, root)
        paths = {key: os.path.join(folder, key) for key in ("images", "panoptic", "panoptic.json", "instances.json")}
        panoptic = {"panoptic_json": paths["panoptic.json"], "panoptic_root": paths["panoptic"]}
        entries: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "instance": ({"type": "youtube_vis", "json": paths["instances.json"]}, of_things),
            "panoptic": ({"type": "video_panoptic", **panoptic}, of_all),
        }
        for task, (entry, metadata) in entries.items():
            name = f"moving_shapes_{task}_{split}"
            load = FORMATS[entry["type"]].register(name, {"name": name, "images": paths["images"], **entry})
            MetadataCatalog.get(name).set(**metadata)
            DatasetCatalog.register(name, functools.partial(_make_and_load, split, root, load))


def _folder(split: str, root: str) -> str:
    return os.path.join(root, "moving_shapes", VERSION, split)


def _make_and_load(split: str, root: str, load: Callable[[], list[dict]]) -> list[dict]:
    make_split(split, root)
    return load()
