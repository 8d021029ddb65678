"""Data loaders."""

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
from .mapper import build_loss_mapper, build_mapper
from .sampler import SampleKey, TrainingBatchSampler
from .workers import ignore_stop_signals

logger = logging.getLogger(__name__)

# Of a semantic data set: its name, that of the class
ONE_CLASS = (
    "All labelled pixels of %s that were read are of the class %s: nothing can be learned, and mIoU says nothing. Give "
    "the other pixels a class, too: masks of 0 and 255 have classes: [background, object], label_values: [0, 255] and "
    "ignore: [] in DATASETS.CUSTOM."
)
# Label maps that are read when training starts.
_SAMPLED_LABEL_MAPS = 32

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


def build_train_loader(
    cfg: CfgNode, *, mapper: Mapper | None = None, dataset: list[dict] | None = None, start_iter: int = 0
) -> torch.utils.data.DataLoader:
    """An endless loader of training batches, each a list of SOLVER.IMS_PER_BATCH / (number of processes) dicts.

    Batch i of a run is a function of (SEED, i) alone, and the random augmentation of a sample one of (SEED, its
    place in the run): neither the number of workers nor where the run started (start_iter) changes them, and the
    processes of a distributed run share out the batch that a single process would have had.

    Args:
        cfg: the config, with its classes resolved.
        mapper: record -> example; default: build_mapper(cfg, is_train=True).
        dataset: records; default: those of DATASETS.TRAIN.
        start_iter: the first iteration.
    """
    world_size, batch_size = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {batch_size}; it must be a multiple of the {world_size} processes.")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}; only 'TrainingSampler' is supported."
        )
    if dataset is None:
        dataset = load_datasets(
            cfg.DATASETS.TRAIN,
            "DATASETS.TRAIN",
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            with_sizes=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )
        if get_task(cfg).annotations == ("sem_seg",):
            _warn_of_one_class(dataset, cfg)
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
    """A loader of one image a batch over a data set; processes share out the images.

    Args:
        cfg: the config.
        name: of the data set.
        mapper: record -> example; default: build_mapper(cfg, is_train=False).
    """
    dataset = load_datasets([name], "DATASETS.TEST")
    mapped = MappedDataset(dataset, mapper or build_mapper(cfg, is_train=False), seed=0)
    return RaisingDataLoader(mapped, sampler=InferenceSampler(len(dataset)), batch_size=1, **_loader_options(cfg))


def build_loss_loader(cfg: CfgNode, name: str) -> tuple[torch.utils.data.DataLoader, int]:
    """A loader of one image a batch with ground truth as in training, and without random augmentation.

    It is equally long for all processes, as computing losses needs all of them: with S images and P processes, batch i
    of process r is image i P + r, from the first again where that is S or more.

    Args:
        cfg: the config, with its classes resolved.
        name: of the data set.

    Returns:
        The loader, and S.
    """
    dataset = load_datasets([name], "DATASETS.TEST")
    world_size, rank = comm.get_world_size(), comm.get_rank()
    steps = -(-len(dataset) // world_size)
    order = [(i * world_size + rank) % len(dataset) for i in range(steps)]
    mapped = MappedDataset(dataset, build_loss_mapper(cfg), seed=0)
    return RaisingDataLoader(mapped, sampler=order, batch_size=1, **_loader_options(cfg)), len(dataset)


class MappedDataset(torch.utils.data.Dataset):
    """Records and their mapper. A sample is drawn by its SampleKey, or by its index where nothing is random.

    What is wrong with the data comes back as a DataError in place of the example, see RaisingDataLoader.
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
    """Raises errors of the data in the main process: through a worker they would come with its whole traceback."""

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:  # type: ignore[override]
        for batch in super().__iter__():
            for example in batch:
                if isinstance(example, KNetError):
                    raise example
            yield batch


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed the generators that augmentations use (random, NumPy, torch on the CPU); restore them afterwards."""
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
    """The records of data sets.

    Args:
        names: as registered.
        key: the config key that they come from, for error messages.
        filter_empty: leave out images whose "annotations" have no instance.
        with_sizes: look up sizes of images that the records lack, where a JSON has them.
    """
    if not names:
        raise ConfigError(f"{key} is empty; name at least one data set.")
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
            f"No image of {', '.join(names)} ({key}) has an instance. Check the annotations, or set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        )
    return records


def load_dataset(name: str, key: str = "DATASETS") -> list[dict]:
    """The records of one data set; whatever keeps it from being read is a DataError that names the file."""
    if name not in DatasetCatalog:
        similar = difflib.get_close_matches(name, DatasetCatalog.list(), 3)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        raise ConfigError(f"{key} names the data set {name!r}, which is not registered.{hint} See DATASETS.CUSTOM.")
    try:
        records = DatasetCatalog.get(name)
    except KNetError:
        raise
    except Exception as error:
        reason = _reason(name) or f"{type(error).__name__}: {error}"
        raise DataError(f"Data set {name} can't be read: {reason}") from error
    if not records:
        raise DataError(f"Data set {name} has no images.")
    return records


def _reason(name: str) -> str | None:
    """Why a data set can't be read, from the files that its metadata names."""
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
    """Detectron2 leaves the sizes in a panoptic JSON unread; add them to the records in place."""
    path = metadata.get("panoptic_json")
    if path is None:
        return
    images = {image["id"]: image for image in read_coco_json(path)["images"]}
    for record in records:
        image = images.get(record.get("image_id"), {})
        if "height" in image and "width" in image:
            record.update(height=image["height"], width=image["width"])


def _aspect_groups(records: list[dict]) -> list[int] | None:
    """1 for upright images, 0 for others; None where the records don't tell sizes."""
    if not all("width" in record and "height" in record for record in records):
        return None
    return [int(record["width"] <= record["height"]) for record in records]


def _warn_of_one_class(records: list[dict], cfg: CfgNode) -> None:
    """Warn where all pixels of some label maps, evenly spread over the data sets, are of one class or ignored."""
    mapper = build_loss_mapper(cfg)
    mapper.augmentations = AugmentationList([])
    seen: set[int] = set()
    for i in np.unique(np.linspace(0, len(records) - 1, _SAMPLED_LABEL_MAPS).astype(int)):
        with contextlib.suppress(KNetError):  # the loader raises it where the image is needed
            seen.update(mapper(records[i])["sem_seg"].unique().tolist())
        if len(seen - {mapper.ignore_value}) > 1:
            return
    for label in seen - {mapper.ignore_value}:
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).stuff_classes
        logger.warning(ONE_CLASS, ", ".join(cfg.DATASETS.TRAIN), names[label])


def warn_of_absent_classes(name: str, absent: Sequence[str], what: str) -> None:
    """Warn of classes that do not occur in a data set; what: "pixel" or "instance"."""
    if absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        logger.warning("No %s of data set %s is of the classes %s%s.", what, name, ", ".join(absent[:10]), more)


def _loader_options(cfg: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": _as_list,
        "worker_init_fn": ignore_stop_signals,
        # A generator of its own, because starting to iterate draws a number.
        "generator": torch.Generator(),
    }


def _as_list(batch: list) -> list:
    return batch
