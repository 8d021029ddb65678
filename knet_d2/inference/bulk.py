"""Prediction of many images in shards: processes share them, a broken image is one row, and a killed job continues.

The images of a job are an ordered list, cut into shards of equal length. A shard has one file (:mod:`.shard_files`)
with a row for each image, which appears when the shard is complete; a shard without a file is predicted again. The
other files that a row names (panoptic PNGs) have the number of the image as their name, and are written before it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..checkpoint import write_atomically
from ..checkpoint.loading import split_options
from ..data.classes import categories
from ..errors import ConfigError, DataError
from ..results.writers import image_record
from .image_predictor import ImagePredictor
from .shard_files import FORMATS
from .sources import Frame, ImageFiles

JOB_FILE = "job.json"

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """The shards of one process: every ``step``-th one, from ``first`` on."""

    first: int = 0
    step: int = 1


class Progress(NamedTuple):
    """Numbers of a process's share of a job, or of one shard.

    Attributes:
        predicted: images of shards that this call has completed.
        found: images of shards that were complete before.
        broken: rows with an error among those predicted.
    """

    predicted: int = 0
    found: int = 0
    broken: int = 0


class BulkJob:
    """The shards of a list of images in a folder, which any number of processes write, now and later."""

    def __init__(
        self,
        folder: str,
        predictor: ImagePredictor,
        paths: Sequence[str],
        *,
        shard_size: int = 100,
        batch_size: int = 1,
        workers: int = 1,
        file_format: str = "jsonl",
    ):
        """
        Args:
            folder: where the results are written.
            paths: the image files; the order gives them their numbers.
            shard_size: images of a shard; as many are predicted again after a process was killed.
            batch_size, workers: see :meth:`ImagePredictor.images`.
            file_format: of shards, one of FORMATS.

        Raises:
            ConfigError: the folder has another job, or an option makes no sense.
        """
        for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: use at least 1.")
        self._folder, self._predictor, self._paths = folder, predictor, list(paths)
        self._shard_size, self._batch_size, self._workers = shard_size, batch_size, workers
        self._format = file_format
        classes = predictor.classes
        self._ids = classes.file_ids
        description = {
            "images": len(self._paths),
            "list": hashlib.sha256("\n".join(self._paths).encode(errors="surrogateescape")).hexdigest(),
            "shard_size": shard_size,
            "format": file_format,
            "model": predictor.cfg.MODEL.WEIGHTS,
            **_hashes(predictor.cfg),
            "categories": [{**x, "id": x["dataset_id"]} for x in categories(classes)],
        }
        self._claim(os.path.join(folder, JOB_FILE), description)

    @property
    def num_images(self) -> int:
        return len(self._paths)

    @property
    def num_shards(self) -> int:
        return -(-len(self._paths) // self._shard_size)

    def shard_path(self, shard: int) -> str:
        """The file with the rows of a shard."""
        return os.path.join(self._folder, f"{shard:06d}.{self._format}")

    def run(self, share: Share) -> Iterator[Progress]:
        """Complete the shards of a process; yields the numbers so far after each of them."""
        if not 0 <= share.first < share.step:
            raise ConfigError(f"--share {share.first}/{share.step}: the first number must be 0 to {share.step - 1}.")
        total = Progress()
        for shard in range(share.first, self.num_shards, share.step):
            one = self.run_shard(shard)
            total = Progress(*(a + b for a, b in zip(total, one)))
            yield total

    def run_shard(self, shard: int) -> Progress:
        """Predict the images of a shard and write its file, unless it is there."""
        first = shard * self._shard_size
        paths = self._paths[first : first + self._shard_size]
        if os.path.isfile(self.shard_path(shard)):
            return Progress(found=len(paths))
        rows = self._rows(first, paths)
        content = FORMATS[self._format](rows)
        write_atomically(self.shard_path(shard), lambda f: f.write(content))
        return Progress(predicted=len(rows), broken=sum("error" in row for row in rows))

    def _rows(self, first: int, paths: list[str]) -> list[dict[str, Any]]:
        """The rows of images, in order; if an image makes the network fail, each is predicted alone.

        Raises:
            Exception: none of several images could be predicted, so the reason is not an image.
        """
        try:
            return list(self._predicted(first, paths, self._batch_size))
        except Exception:  # for example too little memory for one of the images
            logger.exception(f"Images {first} to {first + len(paths) - 1} are predicted one by one, because of")
        rows: list[dict[str, Any]] = []
        errors: list[Exception] = []
        for number, path in enumerate(paths, start=first):
            try:
                rows += self._predicted(number, [path], 1)
            except Exception as error:
                errors.append(error)
                rows.append(_error_row(number, path, f"{type(error).__name__}: {error}"))
        if len(errors) == len(paths) > 1:
            raise errors[-1]
        return rows

    def _predicted(self, first: int, paths: list[str], batch_size: int) -> Iterator[dict[str, Any]]:
        errors: dict[str, str] = {}

        def noted(source: Iterable[Frame]) -> Iterator[Frame]:
            for frame in source:
                if frame.image is None:
                    errors[frame.name] = frame.error
                yield frame

        source = ImageFiles(paths, self._predictor.pixel_format, self._workers, are_files=True)
        results = self._predictor.predict_frames(noted(source), batch_size, self._workers)
        # A result comes after all frames before it were read, so each error is known when its turn comes
        waiting = next(results, None)
        for number, path in enumerate(paths, start=first):
            if waiting is None or path in errors:
                yield _error_row(number, path, errors[path])
                continue
            yield {"id": number, **self._record(number, path, waiting[1])}
            waiting = next(results, None)

    def _record(self, number: int, path: str, predictions: Mapping[str, Any]) -> dict[str, Any]:
        def save_png(pixels: np.ndarray) -> str:
            name = os.path.join("panoptic", f"{number // self._shard_size:06d}", f"{number:09d}.png")
            target = os.path.join(self._folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            write_atomically(target, lambda f: Image.fromarray(pixels).save(f, format="PNG"))
            return name

        return image_record(path, predictions, self._ids, save_png)

    def _claim(self, path: str, description: dict[str, Any]) -> None:
        """Write the job's description; one that is there must be the same."""
        if not os.path.isfile(path):
            os.makedirs(self._folder, exist_ok=True)
            write_atomically(path, lambda f: json.dump(description, f), mode="w")
        with open(path) as f:
            try:
                earlier = dict(json.load(f))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}: is damaged ({error}). Use another folder.") from error
        changed = [key for key in description if description[key] != earlier.get(key)]
        if changed:
            raise ConfigError(
                f"--output {self._folder}: it holds another job, with other {' and '.join(changed)}. Use another "
                "folder, or the same images, weights and options."
            )


def _hashes(cfg: CfgNode) -> dict[str, str]:
    """What else results depend on: the content of the weights file, and the options without the device."""
    path = PathManager.get_local_path(split_options(cfg.MODEL.WEIGHTS)[0])
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = ""
    with open(path, "rb") as f:
        weights = hashlib.file_digest(f, "sha256").hexdigest()
    return {"weights": weights, "options": hashlib.sha256(cfg.dump().encode()).hexdigest()}


def read_list(path: str) -> list[str]:
    """The paths in a text file, one a line; relative ones are relative to the file's folder.

    Raises:
        DataError: there is no such file, or it has no line.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such list of images. Correct the path.")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
        lines = [line.rstrip("\r\n") for line in f]
    folder = os.path.dirname(path)
    paths = [os.path.join(folder, line) for line in lines if line.strip()]
    if not paths:
        raise DataError(f"{path}: this list is empty. Write one path of an image a line.")
    return paths


def share_of(environment: Mapping[str, str]) -> Share:
    """The share of a process that torchrun, srun or an array of SLURM jobs has started, from environment variables.

    An array's tasks may have several processes each, started by srun.
    """
    is_torchrun = "TORCHELASTIC_RUN_ID" in environment
    names = ("RANK", "WORLD_SIZE") if is_torchrun else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    # SLURM sets the first one outside of srun, too
    index, count = (_number(environment, name, x) if names[1] in environment else x for name, x in zip(names, (0, 1)))
    offset = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    task = _number(environment, "SLURM_ARRAY_TASK_ID", offset) - offset
    tasks = _number(environment, "SLURM_ARRAY_TASK_COUNT", 1)
    if not 0 <= task < tasks:
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID = {task + offset}: number the tasks of an array without gaps, as --array=0-9; or "
            "give --share I/N."
        )
    return Share(task * count + index, tasks * count)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value!r}: set this environment variable to a number.")
    return int(value)


def _error_row(number: int, path: str, reason: str) -> dict[str, Any]:
    return {"id": number, "file_name": path, "error": reason}
