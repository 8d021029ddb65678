"""Writes the metrics of a run to metrics.json, TensorBoard and the console."""

import datetime
import functools
import json
import logging
import os
import re
import sys
from typing import Any

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from fvcore.common.history_buffer import HistoryBuffer

from ..checkpoint import write_atomically
from ..setup.compat import stored_images

logger = logging.getLogger(__name__)

EVENTS = "events.out.tfevents"  # beginning of the names of TensorBoard's files
WINDOW = 20  # number of iterations for smoothing (median), the same as in Detectron2
TIME_WINDOW = 1000  # number of iterations for estimating the remaining time
# These differ from run to run, so they are not written to metrics.json.
TIMINGS = ("time", "data_time", "rank_data_time", "eta_seconds")


def split_stage(name: str) -> tuple[str, str]:
    """Split the name of a loss into term and stage ("" if there is none): loss_mask_s2 -> ("loss_mask", "2")."""
    return re.fullmatch(r"(.*?)(?:_s(\d+))?", name).groups(default="")  # type: ignore[union-attr, return-value]


def bounded_storage(start_iter: int) -> EventStorage:
    """Build a storage that keeps the last TIME_WINDOW values of a metric; Detectron2's keeps a million of each."""
    storage = EventStorage(start_iter)
    storage.histories().default_factory = functools.partial(HistoryBuffer, max_length=TIME_WINDOW)
    return storage


def cut_metrics(path: str, last_iteration: int) -> int:
    """Remove the lines after ``last_iteration`` from a metrics file, and a line that is incomplete.

    Returns:
        The last iteration that is kept; -1 if there is none.
    """
    if not os.path.isfile(path):
        return -1
    kept: list[str] = []
    kept_iteration = -1
    with open(path) as f:
        for line in f:
            try:
                iteration = json.loads(line)["iteration"]
            except (ValueError, KeyError, TypeError):
                break
            if iteration > last_iteration or not line.endswith("\n"):
                break
            kept.append(line)
            kept_iteration = iteration
    write_atomically(path, lambda f: f.writelines(kept), mode="w")
    return kept_iteration


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Read the records of a metrics file; an empty list if there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


class MetricsWriter(EventWriter):
    """Appends one JSON line per write, with the iteration and all new metrics except timings.

    Two runs with the same metrics write the same file.
    """

    def __init__(self, path: str, last_written: int = -1):
        """last_written: last iteration whose metrics are already in the file."""
        self._file = open(path, "a")
        self._last_written = last_written

    def write(self) -> None:
        storage = get_event_storage()
        new = {
            name: value
            for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items()
            if iteration > self._last_written and name not in TIMINGS
        }
        if not new:
            return
        self._file.write(json.dumps({**new, "iteration": storage.iter}, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_written = storage.iter

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(EventWriter):
    """Writes scalars and pictures for TensorBoard; the loss terms of a stage are one group."""

    def __init__(self, log_dir: str, start_iter: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # Hide the values that the interrupted run wrote after its checkpoint.
        self._writer = SummaryWriter(log_dir, purge_step=start_iter or None)
        self._last_written = start_iter - 1

    def write(self) -> None:
        storage = get_event_storage()
        for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_written:
                self._writer.add_scalar(scalar_tag(name), value, iteration)
        self._last_written = storage.iter
        for name, image, iteration in stored_images(storage):
            self._writer.add_image(name, image, iteration)
        storage.clear_images()

    def close(self) -> None:
        self._writer.close()


def scalar_tag(name: str) -> str:
    """Return TensorBoard's tag "group/title": loss_mask_s2 -> stage 2/loss_mask; segm/AP has a group already."""
    if "/" in name:
        return name
    term, stage = split_stage(name)
    if stage:
        return f"static/{term}" if stage == "0" else f"stage {stage}/{term}"
    return f"{'timing' if name in TIMINGS else 'training'}/{name}"


def is_terminal() -> bool:
    """Return whether progress bars can be shown."""
    return sys.stderr is not None and sys.stderr.isatty()


def time_left(storage: EventStorage, max_iter: int) -> str:
    """Return the estimated time until the end of training; "?" if no iteration was timed."""
    if "time" not in storage.histories():
        return "?"
    seconds = storage.history("time").median(TIME_WINDOW) * (max_iter - storage.iter - 1)
    return str(datetime.timedelta(seconds=int(seconds)))


class ConsoleWriter(EventWriter):
    """Writes one line to the log: remaining time, losses (each term summed over the stages), learning rate, memory.

    If a terminal shows a progress bar, the line is in the file alone.
    """

    def __init__(self, max_iter: int):
        self._max_iter = max_iter
        self._level = logging.DEBUG if is_terminal() else logging.INFO

    def write(self) -> None:
        storage = get_event_storage()
        parts = [f"eta: {time_left(storage, self._max_iter)}", f"iter: {storage.iter + 1}/{self._max_iter}"]
        parts += [f"{name}: {value:.4g}" for name, value in self._losses(storage).items()]
        for name in ("time", "data_time"):
            if name in storage.histories():
                parts.append(f"{name}: {storage.history(name).avg(WINDOW):.3g}")
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.4g}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        logger.log(self._level, "  ".join(parts))

    def _losses(self, storage: EventStorage) -> dict[str, float]:
        losses: dict[str, float] = {}
        for name, history in storage.histories().items():
            if "loss" in name:
                term = split_stage(name)[0]
                losses[term] = losses.get(term, 0.0) + history.median(WINDOW)
        return dict(sorted(losses.items(), key=lambda item: item[0] != "total_loss"))
