"""Registers moving shapes; the files of a split are generated when the split is first loaded."""

import functools
import os

from ...data.shapes.registration import generate_folder, register_generated, shapes_metadata
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
    metadata = shapes_metadata()
    for split in SPLITS:
        folder = _folder(split, root)
        paths = {key: os.path.join(folder, key) for key in ("images", "panoptic", "panoptic.json", "instances.json")}
        panoptic = {"panoptic_json": paths["panoptic.json"], "panoptic_root": paths["panoptic"]}
        entries = {
            "instance": {"type": "youtube_vis", "json": paths["instances.json"]},
            "panoptic": {"type": "video_panoptic", **panoptic},
        }
        for task, entry in entries.items():
            entry, make = {**entry, "images": paths["images"]}, functools.partial(make_split, split, root)
            register_generated(f"moving_shapes_{task}_{split}", entry, metadata[task], make)


def _folder(split: str, root: str) -> str:
    return os.path.join(root, "moving_shapes", VERSION, split)
