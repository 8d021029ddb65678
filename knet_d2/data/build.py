"""The data loaders for training, evaluation and the validation loss, and the records that they load."""

import contextlib
import difflib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations, print_instances_class_histogram
from detectron2.data.catalog import Metadata
from detectron2.data.samplers import InferenceSampler
from detectron2.data.transforms import AugmentationList
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError, KNetError
from ..tasks import get_task
from .coco_json import check_categories, forget_large_files, read_coco_json
from .files import read_image
from .mapper import build_loss_mapper, build_mapper
from .pixels import PixelFormat
from .sampler import SampleKey, TrainingBatchSampler
from .workers import ignore_stop_signals

logger = logging.getLogger(__name__)

# Arguments: the name of the semantic data set, the name of the class.
ONE_CLASS = (
    "All labelled pixels of %s that were read are of the class %s. The model can't learn from one class, and mIoU has "
    "no meaning for it. Give the other pixels a class, too: for masks with the values 0 and 255, set classes: "
    "[background, object], label_values: [0, 255] and ignore: [] in DATASETS.CUSTOM."
)
# Number of label maps that are read for the warning ONE_CLASS when a training run starts.
_SAMPLED_LABEL_MAPS = 32

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


def build_train_loader(
    cfg: CfgNode, *, mapper: Mapper | None = None, dataset: list[dict] | None = None, start_iter: int = 0
) -> torch.utils.data.DataLoader:
    """Build an endless loader of training batches, each a list of SOLVER.IMS_PER_BATCH / (number of processes) dicts.

    Batch i of a run depends only on (SEED, i). The random augmentation of a sample depends only on SEED and the
    sample's position in the run. The number of workers and the first iteration of the run (start_iter) therefore
    change neither. The processes of a distributed run divide the batch that a single process would get.

    Args:
        cfg: the config, with its classes resolved.
        mapper: maps a record to an example; default: build_mapper(cfg, is_train=True).
        dataset: the records; default: the records of DATASETS.TRAIN.
        start_iter: the first iteration.

    Raises:
        ConfigError: an option that the loader needs is wrong; names the option.
        DataError: a data set can't be read; names the file.
    """
    world_size, batch_size = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {batch_size}: use a positive multiple of the number of processes, {world_size}."
        )
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(f"DATALOADER.SAMPLER_TRAIN = {cfg.DATALOADER.SAMPLER_TRAIN!r}: use 'TrainingSampler'.")
    if dataset is None:
        dataset = load_datasets(
            cfg.DATASETS.TRAIN,
            "DATASETS.TRAIN",
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            with_sizes=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )
        if "instances" not in get_task(cfg).annotations:
            _warn_of_one_class(dataset, cfg)
        if mapper is None:  # find images of another format before the training starts
            read_image(dataset[0]["file_name"], PixelFormat.from_config(cfg))
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = TrainingBatchSampler(
        size=len(dataset),
        batch_size=batch_size,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
        start_iter=start_iter,
        groups=_aspect_groups(dataset) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
    )
    mapped = MappedDataset(dataset, mapper or build_mapper(cfg, is_train=True), seed)
    forget_large_files()
    return RaisingDataLoader(mapped, batch_sampler=sampler, **_loader_options(cfg))


def build_test_loader(cfg: CfgNode, name: str, mapper: Mapper | None = None) -> torch.utils.data.DataLoader:
    """Build a loader for evaluation with one image per batch; the processes divide the images of the data set.

    Args:
        cfg: the config.
        name: name of the data set.
        mapper: maps a record to an example; default: build_mapper(cfg, is_train=False).
    """
    dataset = load_datasets([name], "DATASETS.TEST")
    mapped = MappedDataset(dataset, mapper or build_mapper(cfg, is_train=False), seed=0)
    return RaisingDataLoader(mapped, sampler=InferenceSampler(len(dataset)), batch_size=1, **_loader_options(cfg))


def build_loss_loader(cfg: CfgNode, name: str) -> tuple[torch.utils.data.DataLoader, int]:
    """Build a loader for the validation loss: one image per batch, ground truth as in training, no augmentation.

    The loader has the same length in all processes, because the losses all-reduce and so need every process. With S
    images and P processes, batch i of process r holds image (i P + r) modulo S.

    Args:
        cfg: the config, with its classes resolved.
        name: name of the data set.

    Returns:
        The loader, and the number of images S.
    """
    dataset = load_datasets([name], "DATASETS.TEST")
    world_size, rank = comm.get_world_size(), comm.get_rank()
    steps = -(-len(dataset) // world_size)
    order = [(i * world_size + rank) % len(dataset) for i in range(steps)]
    mapped = MappedDataset(dataset, build_loss_mapper(cfg), seed=0)
    return RaisingDataLoader(mapped, sampler=order, batch_size=1, **_loader_options(cfg)), len(dataset)


class MappedDataset(torch.utils.data.Dataset):
    """The records of data sets, mapped to examples.

    A sample is addressed by its SampleKey, or by its index where nothing is random. If a record can't be read, the
    error is returned in place of the example; RaisingDataLoader raises it.
    """

    def __init__(self, records: list[dict], mapper: Mapper, seed: int) -> None:
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any] | KNetError:
        index, position = key if isinstance(key, tuple) else (key, key)
        try:
            with seeded(self._seed, position):
                return self._mapper(self._records[index])
        except KNetError as error:
            return error


class RaisingDataLoader(torch.utils.data.DataLoader):
    """Raises the errors of MappedDataset in the main process.

    An error that a worker process raises would reach the user with the whole traceback of the worker.
    """

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:  # type: ignore[override]
        for batch in super().__iter__():
            for example in batch:
                if isinstance(example, KNetError):
                    raise example
            yield batch


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed the generators that augmentations use (random, NumPy, torch on the CPU), and restore them on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.default_generator.manual_seed(int(third))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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


def _aspect_groups(records: list[dict]) -> list[int] | None:
    """Return 1 for each upright image and 0 for each other one; None if a record has no size."""
    if not all("width" in record and "height" in record for record in records):
        return None
    return [int(record["width"] <= record["height"]) for record in records]


def _warn_of_one_class(records: list[dict], cfg: CfgNode) -> None:
    """Warn if all labelled pixels are of one class, in a sample of label maps from all parts of the data sets."""
    mapper = build_loss_mapper(cfg)
    mapper.augmentations = AugmentationList([])
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


def _loader_options(cfg: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": _as_list,
        "worker_init_fn": ignore_stop_signals,
        # iter(loader) draws a base seed; a private generator keeps the global RNG, and exact resume, intact.
        "generator": torch.Generator(),
    }


def _as_list(batch: list) -> list:
    return batch
