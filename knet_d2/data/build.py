"""The data loaders for training, evaluation and the validation loss."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm

from ..errors import ConfigError, DataError, KNetError
from ..tasks import VIDEO_SWITCHES, build_bank
from .class_coverage import warn_of_absent_classes_in, warn_of_crowded_images
from .coco_json import forget_large_files
from .copy_paste import Mapper, with_copy_paste
from .files import read_image
from .frame_pairs import FramePairs
from .ground_truth import CompactMapper
from .mapper import build_loss_mapper, build_mapper
from .pixels import PixelFormat
from .records import load_datasets
from .repeat_factors import repeat_factors
from .sampler import SampleKey, TrainingBatchSampler, VideoSampler
from .workers import ignore_stop_signals


def build_train_loader(
    cfg: CfgNode, *, mapper: Mapper | None = None, dataset: list[dict] | None = None, start_iter: int = 0
) -> torch.utils.data.DataLoader:
    """Build an endless loader of training batches, each a list of SOLVER.IMS_PER_BATCH / (number of processes) dicts.

    Batch i of a run depends only on (SEED, i). The random augmentation of a sample depends only on SEED and the
    sample's position in the run. The number of workers and the first iteration of the run (start_iter) therefore
    change neither. The processes of a distributed run divide the batch that a single process would get.

    Args:
        cfg: the config, with its classes resolved.
        mapper: maps a record to an example; default: build_mapper(cfg, is_train=True) with INPUT.COPY_PASTE, whose
            ground truth is checked and made compact (see :func:`.ground_truth.compact_example`).
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
    if dataset is None:
        dataset = load_datasets(
            cfg.DATASETS.TRAIN,
            "DATASETS.TRAIN",
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            with_sizes=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )
        if mapper is None:
            if comm.is_main_process():
                warn_of_absent_classes_in(dataset, cfg.DATASETS.TRAIN, cfg)
                warn_of_crowded_images(dataset, cfg)
            # Find images of another format before the training starts.
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
        repeat_factors=repeat_factors(dataset, cfg),
    )
    video = cfg.MODEL.KNET.VIDEO
    pairs = FramePairs(dataset, video.REFERENCE_RANGE) if any(video[key] for key in VIDEO_SWITCHES) else None
    records = DatasetFromList(dataset, copy=False)
    if mapper is None:
        mapper = _compact(cfg, with_copy_paste(cfg, build_mapper(cfg, is_train=True), records))
    mapped = MappedDataset(records, mapper, seed, pairs)
    forget_large_files()
    return RaisingDataLoader(mapped, batch_sampler=sampler, **_loader_options(cfg))


def build_test_loader(cfg: CfgNode, name: str, mapper: Mapper | None = None) -> torch.utils.data.DataLoader:
    """Build a loader for evaluation with one image per batch; the processes divide the images, or whole videos.

    Args:
        cfg: the config.
        name: name of the data set.
        mapper: maps a record to an example; default: build_mapper(cfg, is_train=False).
    """
    dataset = load_datasets([name], "DATASETS.TEST")
    records = DatasetFromList(dataset, copy=False)
    mapped = MappedDataset(records, mapper or build_mapper(cfg, is_train=False), seed=0)
    sampler = (
        VideoSampler(dataset, comm.get_rank(), comm.get_world_size())
        if "video_id" in dataset[0]
        else InferenceSampler(len(dataset))
    )
    return RaisingDataLoader(mapped, sampler=sampler, batch_size=1, **_loader_options(cfg))


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
    mapped = MappedDataset(DatasetFromList(dataset, copy=False), _compact(cfg, build_loss_mapper(cfg)), seed=0)
    return RaisingDataLoader(mapped, sampler=order, batch_size=1, **_loader_options(cfg)), len(dataset)


class MappedDataset(torch.utils.data.Dataset):
    """The records of data sets, mapped to examples.

    A sample is addressed by its SampleKey, or by its index where nothing is random. If a record can't be read, the
    error is returned in place of the example; RaisingDataLoader raises it.
    """

    def __init__(self, records: Sequence[dict], mapper: Mapper, seed: int, pairs: FramePairs | None = None) -> None:
        """
        Args:
            pairs: adds to each example another frame of its video as "reference"; both have the same augmentation.
        """
        self._pairs = pairs
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any] | KNetError:
        index, position = key if isinstance(key, tuple) else (key, key)
        try:
            with seeded(self._seed, position):
                return self._mapper(self._records[index]) if self._pairs is None else self._pair(index, self._pairs)
        except KNetError as error:
            return error

    def _pair(self, index: int, pairs: FramePairs) -> dict[str, Any]:
        indices, seed = (index, pairs.draw(index)), np.random.randint(2**31)
        frames = []
        for i in indices:
            with seeded(seed):
                frames.append(self._mapper(self._records[i]))
        key, reference = frames
        if key["image"].shape != reference["image"].shape:
            raise DataError(
                f"{key['file_name']} and {reference['file_name']}: frames of one video have different sizes. Make them "
                "equal."
            )
        return {**key, "reference": reference}


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


def _aspect_groups(records: list[dict]) -> list[int] | None:
    """Return 1 for each upright image and 0 for each other one; None if a record has no size."""
    if not all("width" in record and "height" in record for record in records):
        return None
    return [int(record["width"] <= record["height"]) for record in records]


def _compact(cfg: CfgNode, mapper: Mapper) -> Mapper:
    """The mapper with ground truth as the model sends it to its device."""
    return CompactMapper(mapper, build_bank(cfg), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


def _loader_options(cfg: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": list,
        "worker_init_fn": ignore_stop_signals,
        # Only from pinned memory do copies to the device run beside its computations
        "pin_memory": torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available(),
        # iter(loader) draws a base seed; a private generator keeps the global RNG, and exact resume, intact.
        "generator": torch.Generator(),
    }
