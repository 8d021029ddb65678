"""Small data sets for tests: shapes written to a temporary folder, as a stranger's copy."""

import itertools
import json
import os
from collections.abc import Callable

from detectron2.config import CfgNode

from knet_d2.config import get_knet_cfg
from knet_d2.data import register_custom_datasets, resolve_classes
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES

_number = itertools.count()


def unique_name(prefix: str) -> str:
    """Return a name that is not in the catalogue, which all tests of a process share."""
    return f"{prefix}_test{next(_number)}"


def custom_entry(kind: str, root: str, **changes) -> dict:
    """An entry of DATASETS.CUSTOM for what write_shapes, or write_moving_shapes, wrote into root."""
    images = os.path.join(root, "images")
    entry = {
        "coco_instance": {"json": os.path.join(root, "instances.json"), "images": images},
        "coco_panoptic": {
            "images": images,
            "panoptic_json": os.path.join(root, "panoptic.json"),
            "panoptic_root": os.path.join(root, "panoptic"),
        },
        "sem_seg": {
            "images": images,
            "labels": os.path.join(root, "semantic"),
            "classes": [*THING_CLASSES, *STUFF_CLASSES],
        },
        "youtube_vis": {"json": os.path.join(root, "instances.json"), "images": images},
        "video_panoptic": {
            "images": images,
            "panoptic_json": os.path.join(root, "panoptic.json"),
            "panoptic_root": os.path.join(root, "panoptic"),
        },
        "kitti_step": {
            "images": images,
            "labels": os.path.join(root, "kitti_step"),
            "classes": [*THING_CLASSES, *STUFF_CLASSES],
            "things": list(THING_CLASSES),
        },
    }[kind]
    return {"name": unique_name(kind), "type": kind, **entry, **changes}


def edit_json(path: str, edit: Callable[[dict], object]) -> None:
    """Change the content of a JSON in place."""
    with open(path) as f:
        content = json.load(f)
    edit(content)
    with open(path, "w") as f:
        json.dump(content, f)


def data_cfg(task: str, *names: str, custom: tuple = (), resolve: bool = True) -> CfgNode:
    """A config for loaders: no workers, batches of 4, no augmentation but resizing to 64."""
    cfg = get_knet_cfg()
    cfg.MODEL.KNET.TASK = task
    cfg.DATASETS.CUSTOM = list(custom)
    cfg.DATASETS.TRAIN = names or tuple(entry["name"] for entry in custom)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SEED = 7
    register_custom_datasets(cfg)
    if resolve:
        resolve_classes(cfg)
    return cfg
