"""Registers the data set shapes; the files of a split are generated when the split is first loaded."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from ...errors import DataError
from ..custom import FORMATS
from .writer import shapes_categories, write_shapes

# Part of the folder's name, so that a changed generator never uses the files of an older one.
VERSION = "v1"
# Split -> (number of images, seed).
SPLITS = {"train": (2000, 1), "val": (200, 2)}


def make_split(split: str, root: str) -> str:
    """Generate the folder root/shapes/<version>/<split> unless it exists; returns the folder.

    The folder is renamed into place when it is complete, so an interrupted process leaves no partial folder. A second
    process waits for the first.

    Raises:
        DataError: the files can't be written.
    """
    num_images, seed = SPLITS[split]
    return generate_folder(_folder(split, root), lambda folder: write_shapes(folder, num_images, seed))


def generate_folder(folder: str, write: Callable[[str], None]) -> str:
    """Generate a folder unless it exists; returns the folder. See :func:`make_split`.

    Args:
        write: writes the files into a folder that exists.
    """
    if os.path.isdir(folder):
        return folder
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with file_lock(folder):
            if not os.path.isdir(folder):
                _write(folder, write)
    except OSError as error:
        raise DataError(
            f"{folder}: the generated data set can't be written here ({error}). Free disk space, or set the "
            "environment variable DETECTRON2_DATASETS to a writable folder."
        ) from error
    return folder


def _write(folder: str, write: Callable[[str], None]) -> None:
    temporary = tempfile.mkdtemp(prefix=os.path.basename(folder) + ".tmp", dir=os.path.dirname(folder))
    try:
        os.chmod(temporary, 0o755)
        write(temporary)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except OSError:
        # The lock works on one machine only: a machine that shares the disk may have made the same folder meanwhile.
        if not os.path.isdir(target):
            raise


def shapes_metadata() -> dict[str, dict[str, Any]]:
    """The metadata of data sets of the shapes, by task."""
    categories = shapes_categories()
    names, colors = ([category[key] for category in categories] for key in ("name", "color"))
    ids = {
        kind: {category["id"]: i for i, category in enumerate(categories) if category["isthing"] == isthing}
        for kind, isthing in (("thing", 1), ("stuff", 0))
    }
    number = len(ids["thing"])
    of_instance = {"thing_classes": names[:number], "thing_colors": colors[:number]}
    of_panoptic = {"thing_classes": names, "thing_colors": colors, "stuff_classes": names, "stuff_colors": colors}
    return {
        "instance": {**of_instance, "thing_dataset_id_to_contiguous_id": ids["thing"]},
        "panoptic": {**of_panoptic, **{f"{kind}_dataset_id_to_contiguous_id": x for kind, x in ids.items()}},
        "semantic": {"stuff_classes": names, "stuff_colors": colors},
    }


def register_generated(name: str, entry: dict[str, Any], metadata: dict[str, Any], make: Callable[[], Any]) -> None:
    """Register a data set whose files are generated when it is first loaded.

    Args:
        entry: as in DATASETS.CUSTOM, without the name.
        metadata: added to that of the entry's type.
        make: generates the files unless they exist; it can be pickled.
    """
    load = FORMATS[entry["type"]].register(name, {"name": name, **entry})
    MetadataCatalog.get(name).set(**metadata)
    DatasetCatalog.register(name, functools.partial(_make_and_load, make, load))


def _make_and_load(make: Callable[[], Any], load: Callable[[], list[dict]]) -> list[dict]:
    make()
    return load()


def shapes_entries(folder: str) -> dict[str, dict[str, Any]]:
    """A folder of :func:`write_shapes` as in DATASETS.CUSTOM, without the name, by task."""
    files = ("images", "instances.json", "panoptic.json", "panoptic", "semantic")
    images, instances, panoptic_json, panoptic_root, labels = (os.path.join(folder, file) for file in files)
    panoptic = {"panoptic_json": panoptic_json, "panoptic_root": panoptic_root, "instances_json": instances}
    names = [category["name"] for category in shapes_categories()]
    return {
        "instance": {"type": "coco_instance", "images": images, "json": instances},
        "panoptic": {"type": "coco_panoptic", "images": images, **panoptic},
        "semantic": {"type": "sem_seg", "images": images, "labels": labels, "classes": names},
    }


def register_shapes(root: str) -> None:
    """Register shapes_{instance,panoptic,semantic}_{train,val}, whose files are below root/shapes."""
    metadata = shapes_metadata()
    for split in SPLITS:
        for task, entry in shapes_entries(_folder(split, root)).items():
            make = functools.partial(make_split, split, root)
            register_generated(f"shapes_{task}_{split}", entry, metadata[task], make)


def _folder(split: str, root: str) -> str:
    return os.path.join(root, "shapes", VERSION, split)
