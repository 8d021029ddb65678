"""Warns of classes that do not occur in the annotations: a model can't learn them, and metrics leave them out."""

import contextlib
import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import KNetError
from ..tasks import Task, get_task
from .mapper import build_mapper

logger = logging.getLogger(__name__)

# Label maps that are read to find the classes of a data set, unless all classes are found in fewer.
_MOST_LABEL_MAPS = 300
# Names in one warning
_MOST_NAMES = 10


def unit_of(task: Task) -> str:
    """Return what the classes of a task occur in: "instance", "segment" or "pixel"."""
    if "instances" not in task.annotations:
        return "pixel"
    return "segment" if "sem_seg" in task.annotations else "instance"


def warn_of_absent_classes(data: str, unit: str, names: Sequence[str], occurring: Collection[int]) -> None:
    """Log one warning if classes do not occur, or if all labelled pixels are of one class.

    Args:
        data: names of the data sets, and what was read of them.
        unit: what the classes occur in, see unit_of.
        names: names of all classes.
        occurring: indices of the classes that occur.
    """
    absent = [name for i, name in enumerate(names) if i not in occurring]
    if unit == "pixel" and len(occurring) == 1:
        logger.warning(
            "All labelled pixels of %s that were read are of the class %s. The model can't learn from one class, and "
            "mIoU has no meaning for it. Give the other pixels a class, too: for masks with the values 0 and 255, set "
            "classes: [background, object], label_values: [0, 255] and ignore: [] in DATASETS.CUSTOM.",
            data,
            *(names[i] for i in occurring),
        )
    elif absent:
        listed = ", ".join(absent[:_MOST_NAMES])
        more = f" and {len(absent) - _MOST_NAMES} more" if len(absent) > _MOST_NAMES else ""
        nothing = "" if occurring else " Nothing is labelled: check the annotations, and what is ignored."
        logger.warning("No %s of data set %s is of the classes %s%s.%s", unit, data, listed, more, nothing)


def warn_of_absent_classes_in(records: list[dict[str, Any]], names: Sequence[str], cfg: CfgNode) -> None:
    """Warn of the model's classes that do not occur in data sets.

    Annotations of objects are counted in the records. Label maps are read from all parts of the data sets, until each
    class is found, at most _MOST_LABEL_MAPS.

    Args:
        records: all records of the data sets; those without ground truth are left out.
        names: names of the data sets.
        cfg: the config, with its classes resolved.
    """
    mapper, task, knet = build_mapper(cfg, is_train=True), get_task(cfg), cfg.MODEL.KNET
    num_classes = knet.NUM_THING_CLASSES + knet.NUM_STUFF_CLASSES
    records = [record for record in records if mapper.has_ground_truth(record)]
    if not records:
        return
    occurring: set[int] = set()
    for record in records:
        if len(occurring) == num_classes:
            break
        with contextlib.suppress(KNetError):  # the loader raises this error when training reads the image
            occurring |= mapper.annotated_classes(record)
    with_label_maps = [record for record in records if mapper.reads_label_map(record)]
    data, number = ", ".join(names), min(len(with_label_maps), _MOST_LABEL_MAPS)
    if number < len(with_label_maps):
        data += f" ({number} of {len(with_label_maps)} label maps are read for this)"
    for i in np.linspace(0, len(with_label_maps) - 1, number).astype(int):
        if len(occurring) == num_classes:
            break
        with contextlib.suppress(KNetError):
            occurring |= mapper.label_map_classes(with_label_maps[i])
    warn_of_absent_classes(data, unit_of(task), _class_names(names[0], cfg), occurring)


def warn_of_crowded_images(records: list[dict[str, Any]], cfg: CfgNode) -> None:
    """Log one warning if training images have more objects than there are kernels for them."""
    if "instances" not in get_task(cfg).annotations:
        return
    num_kernels = cfg.MODEL.KNET.NUM_KERNELS
    counts = [_num_objects(record) for record in records]
    crowded = sum(count > num_kernels for count in counts)
    if crowded:
        most = int(np.argmax(counts))
        logger.warning(
            "MODEL.KNET.NUM_KERNELS = %d: %d of %d training images have more objects (%s has %d). Each kernel learns "
            "one object, so the others are learned as background. Raise it and TEST.DETECTIONS_PER_IMAGE, or cut the "
            "images into tiles (knet cut_tiles).",
            *(num_kernels, crowded, len(records), records[most]["file_name"], counts[most]),
        )


def _num_objects(record: dict[str, Any]) -> int:
    objects = record["annotations"] if "annotations" in record else record.get("segments_info", ())
    return sum(bool(x.get("isthing", True)) and not x.get("iscrowd", 0) for x in objects)


def _class_names(data_set: str, cfg: CfgNode) -> list[str]:
    """Names of the model's classes in the metadata of a data set; the ids where it has none."""
    metadata, names = MetadataCatalog.get(data_set), []
    for kind, ids in (("thing", cfg.MODEL.KNET.THING_CATEGORY_IDS), ("stuff", cfg.MODEL.KNET.STUFF_CATEGORY_IDS)):
        known = dict(enumerate(metadata.get(f"{kind}_classes") or ()))
        names += [known.get(i, str(i)) for i in ids]
    return names
