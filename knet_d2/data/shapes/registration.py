"""Registers shapes with Detectron2's own functions; the files are made when a split is first asked for."""

import os
import shutil
import tempfile
from collections.abc import Callable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_instances, register_coco_panoptic
from iopath.common.file_io import file_lock

from ...errors import DataError
from .writer import IGNORE_LABEL, shapes_categories, write_shapes

# Part of the folder's name, so that a changed generator never meets the files of an older one.
VERSION = "v1"
# Split -> (number of images, seed).
SPLITS = {"train": (2000, 1), "val": (200, 2)}


def make_split(split: str, root: str) -> str:
    """Make root/shapes/<version>/<split> unless it exists; returns the folder.

    The folder appears at once and whole, whatever happens; a second process waits for the first.
    """
    num_images, seed = SPLITS[split]
    folder = _folder(split, root)
    if os.path.isdir(folder):
        return folder
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with file_lock(folder):
            if not os.path.isdir(folder):
                _write(folder, num_images, seed)
    except OSError as error:
        raise DataError(
            f"The data set shapes can't be written to {folder} ({error}). Make room or set the environment variable "
            "DETECTRON2_DATASETS to a folder that can be written to."
        ) from error
    return folder


def _write(folder: str, num_images: int, seed: int) -> None:
    temporary = tempfile.mkdtemp(prefix=os.path.basename(folder) + ".tmp", dir=os.path.dirname(folder))
    try:
        os.chmod(temporary, 0o755)
        write_shapes(temporary, num_images, seed)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except OSError:
        # Locks don't reach other machines: one that shares the disk may have been faster, with the same files.
        if not os.path.isdir(target):
            raise


def register_shapes(root: str) -> None:
    """Register shapes_{instance,panoptic,semantic}_{train,val}, with files below root/shapes."""
    for split in SPLITS:
        _register_instance(split, root)
        _register_panoptic(split, root)
        _register_semantic(split, root)


def _folder(split: str, root: str) -> str:
    return os.path.join(root, "shapes", VERSION, split)


def _register_instance(split: str, root: str) -> None:
    name, folder = f"shapes_instance_{split}", _folder(split, root)
    things = [category for category in shapes_categories() if category["isthing"]]
    metadata = {
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [category["color"] for category in things],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(things)},
    }
    images, annotations = os.path.join(folder, "images"), os.path.join(folder, "instances.json")
    register_coco_instances(name, metadata, annotations, images)
    _make_before_loading(name, split, root)


def _register_panoptic(split: str, root: str) -> None:
    name, folder = f"shapes_panoptic_{split}", _folder(split, root)
    categories = shapes_categories()
    names = [category["name"] for category in categories]
    colors = [category["color"] for category in categories]
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    things = {category["id"] for category in categories if category["isthing"]}
    metadata = {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": names,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {k: v for k, v in contiguous.items() if k in things},
        "stuff_dataset_id_to_contiguous_id": {k: v for k, v in contiguous.items() if k not in things},
    }
    paths = [os.path.join(folder, file) for file in ("images", "panoptic", "panoptic.json", "instances.json")]
    register_coco_panoptic(name, metadata, *paths)
    _make_before_loading(name, split, root)


def _register_semantic(split: str, root: str) -> None:
    name, folder = f"shapes_semantic_{split}", _folder(split, root)
    images, labels = os.path.join(folder, "images"), os.path.join(folder, "semantic")
    categories = shapes_categories()
    DatasetCatalog.register(name, lambda: load_sem_seg(labels, images))
    MetadataCatalog.get(name).set(
        stuff_classes=[category["name"] for category in categories],
        stuff_colors=[category["color"] for category in categories],
        image_root=images,
        sem_seg_root=labels,
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
    )
    _make_before_loading(name, split, root)


def _make_before_loading(name: str, split: str, root: str) -> None:
    load: Callable[[], list[dict]] = DatasetCatalog.pop(name)

    def make_and_load() -> list[dict]:
        make_split(split, root)
        return load()

    DatasetCatalog.register(name, make_and_load)
