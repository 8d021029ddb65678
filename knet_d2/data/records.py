"""The records of registered data sets, and warnings about what they hold."""

import contextlib
import difflib
import logging
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations, print_instances_class_histogram
from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError, KNetError
from .coco_json import check_categories, read_coco_json
from .mapper import build_truth_mapper

logger = logging.getLogger(__name__)

# Arguments: the name of the semantic data set, the name of the class.
ONE_CLASS = (
    "All labelled pixels of %s that were read are of the class %s. The model can't learn from one class, and mIoU has "
    "no meaning for it. Give the other pixels a class, too: for masks with the values 0 and 255, set classes: "
    "[background, object], label_values: [0, 255] and ignore: [] in DATASETS.CUSTOM."
)
# Number of label maps that are read for the warning ONE_CLASS when a training run starts.
_SAMPLED_LABEL_MAPS = 32


def load_datasets(
    names: Sequence[str], key: str, *, filter_empty: bool = False, with_sizes: bool = False
) -> list[dict]:
    """Return the records of one or more data sets in one list.

    Args:
        names: names of registered data sets.
        key: config key that holds the names, for error messages.
        filter_empty: leave out images whose "annotations" contain no instance.
        with_sizes: add image sizes from the panoptic JSON to records that have none.

    Raises:
        ConfigError: there is no name, or a name is not registered.
        DataError: a data set can't be read, or no image is left.
    """
    if not names:
        raise ConfigError(f"{key} is empty: name at least one data set.")
    records = []
    for name in names:
        added = load_dataset(name, key)
        if with_sizes and "width" not in added[0]:
            _add_sizes(added, MetadataCatalog.get(name))
        records += added
    if "annotations" in records[0]:
        if filter_empty:
            records = filter_images_with_only_crowd_annotations(records)
        class_names = MetadataCatalog.get(names[0]).get("thing_classes")
        if class_names and all("annotations" in record for record in records):
            print_instances_class_histogram(records, class_names)
    if not records:
        raise DataError(
            f"{key}: no image of {', '.join(names)} has an instance. Check the annotations, or set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        )
    return records


def load_dataset(name: str, key: str = "DATASETS") -> list[dict]:
    """Return the records of one data set.

    Args:
        name: name of a registered data set.
        key: config key that holds the name, for error messages.

    Raises:
        ConfigError: the name is not registered.
        DataError: the data set can't be read or has no images; names the file.
    """
    if name not in DatasetCatalog:
        similar = difflib.get_close_matches(name, DatasetCatalog.list(), 3)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        raise ConfigError(
            f"{key}: data set {name!r} is not registered.{hint} To register your own data, set DATASETS.CUSTOM."
        )
    try:
        records = DatasetCatalog.get(name)
    except KNetError:
        raise
    except Exception as error:
        reason = _reason(name) or f"{type(error).__name__}: {error}"
        raise DataError(f"Data set {name} can't be read: {reason}") from error
    if not records:
        raise DataError(f"Data set {name} has no images. Check its paths.")
    return records


def _reason(name: str) -> str | None:
    """Find out from the files that its metadata names why a data set can't be read; None if they are all there."""
    metadata = MetadataCatalog.get(name).as_dict()
    hint = "Put it there, correct the path, or set DETECTRON2_DATASETS to the folder that holds the data sets."
    for key in ("panoptic_json", "json_file"):
        path = metadata.get(key)
        if path is None:
            continue
        if not PathManager.isfile(path):
            return f"annotation file {path} does not exist. {hint}"
        try:
            check_categories(read_coco_json(path), path)
        except DataError as error:
            return str(error)
    for key in ("image_root", "sem_seg_root", "panoptic_root"):
        path = metadata.get(key)
        if path is not None and not PathManager.isdir(path):
            return f"folder {path} ({key}) does not exist. {hint}"
    return None


def _add_sizes(records: list[dict], metadata: Metadata) -> None:
    """Add image sizes from the panoptic JSON to the records in place, because Detectron2's readers leave them out."""
    path = metadata.get("panoptic_json")
    if path is None:
        return
    images = {image["id"]: image for image in read_coco_json(path)["images"]}
    for record in records:
        image = images.get(record.get("image_id"), {})
        if "height" in image and "width" in image:
            record.update(height=image["height"], width=image["width"])


def warn_of_one_class(records: list[dict], cfg: CfgNode) -> None:
    """Warn if all labelled pixels are of one class, in a sample of label maps from all parts of the data sets."""
    mapper = build_truth_mapper(cfg, [])
    seen: set[int] = set()
    for i in np.unique(np.linspace(0, len(records) - 1, _SAMPLED_LABEL_MAPS).astype(int)):
        with contextlib.suppress(KNetError):  # the loader raises this error when training reads the image
            seen.update(mapper(records[i])["sem_seg"].unique().tolist())
        if len(seen - {mapper.ignore_value}) > 1:
            return
    for label in seen - {mapper.ignore_value}:
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).stuff_classes
        logger.warning(ONE_CLASS, ", ".join(cfg.DATASETS.TRAIN), names[label])


def warn_of_absent_classes(name: str, absent: Sequence[str], what: str) -> None:
    """Warn of classes that do not occur in a data set; ``what`` is "pixel", "instance" or "segment"."""
    if absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        logger.warning("No %s of data set %s is of the classes %s%s.", what, name, ", ".join(absent[:10]), more)
