"""The records of registered data sets."""

import difflib
import logging
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations, print_instances_class_histogram
from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError, KNetError
from .coco_json import check_categories, read_coco_json

logger = logging.getLogger(__name__)


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
