"""Hooks of a training run.

Their order makes a run resumable at any moment: the checkpoint of an iteration is written before its evaluation
(which can fail), its line in metrics.json last. So a line that is missing tells a resumed run that the hooks after
the checkpoint have to run for that iteration once more.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..checkpoint import Checkpointer
from .preemption import EXIT_PREEMPTED, Preempted, StopSignals
from .writers import TIMINGS, WINDOW, read_metrics

logger = logging.getLogger(__name__)


def is_due(done: int, period: int, max_iter: int) -> bool:
    """Whether something that happens every ``period`` iterations (0 = never) and at the end is due after ``done``."""
    return done == max_iter or (period > 0 and done % period == 0)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's, with its state in every checkpoint: whether its own saves it depends on PyTorch's version."""

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


class MetricsHistory(HookBase):
    """Keeps the recent values of all numbers in the checkpoint, so that a resumed run smooths over the same."""

    def __init__(self) -> None:
        self._loaded: dict[str, dict[str, Any]] = {}

    def before_train(self) -> None:
        storage = self.trainer.storage
        now = storage.iter
        for name, history in self._loaded.items():
            for value, iteration in history["values"]:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=history["smoothed"])
        storage.iter = now

    def state_dict(self) -> dict[str, Any]:
        storage = self.trainer.storage
        state = {}
        for name, history in storage.histories().items():
            smoothed = storage.smoothing_hints()[name]
            values = [list(x) for x in history.values()[-WINDOW if smoothed else -1 :]]
            # of numbers that aren't smoothed only those of this iteration may still have to be written
            if name not in TIMINGS and (smoothed or values[-1][1] == storage.iter):
                state[name] = {"values": values, "smoothed": smoothed}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's; only the newest periodic checkpoints stay, counting those of the run before a resume."""

    def before_train(self) -> None:
        super().before_train()
        folder = self.checkpointer.save_dir
        pattern = re.compile(rf"{self.file_prefix}_(\d+)\.pth")
        found = [pattern.fullmatch(name) for name in sorted(os.listdir(folder))]
        self.recent_checkpoints = [
            os.path.join(folder, m.group()) for m in found if m and int(m.group(1)) < self.trainer.start_iter
        ]

    def save_now(self) -> None:
        """Write the checkpoint of this iteration, if that has not just been done."""
        if not is_due(self.trainer.iter + 1, self.period, self.trainer.max_iter):
            period, self.period = self.period, 1
            self.step(self.trainer.iter)
            self.period = period


class StopHook(HookBase):
    """Ends the training after a stop signal to any of its processes, with a checkpoint of the iteration."""

    def __init__(self, signals: StopSignals, checkpoints: PeriodicCheckpointer | None):
        """
        Args:
            checkpoints: writes the checkpoint; None on all but the main process.
        """
        self._signals = signals
        self._checkpoints = checkpoints

    def after_step(self) -> None:
        received = [name for name in comm.all_gather(self._signals.received) if name]
        if received:
            self._stop(received[0])

    def stop_if_received(self) -> None:
        """Stop, where no other process waits for this one; all of them get the signal."""
        if self._signals.received:
            self._stop(self._signals.received)

    def _stop(self, name: str) -> None:
        logger.info(f"Received {name} in iteration {self.trainer.iter}.")
        if self._checkpoints is not None:
            self._checkpoints.save_now()
        comm.synchronize()  # whoever started the processes may end them all as soon as one has ended
        logger.info(f"Stopped with a checkpoint, exit code {EXIT_PREEMPTED}: continue with --resume.")
        raise Preempted


class EvalHook(hooks.EvalHook):
    """Detectron2's; the final evaluation belongs to the last iteration and doesn't run after a failure.

    A stop signal ends it at the next image; a resumed run begins with it once more.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict[str, Any]], stop: "StopHook"):
        super().__init__(period, evaluate)
        self._stop = stop

    def after_step(self) -> None:
        if not is_due(self.trainer.iter + 1, self._period, self.trainer.max_iter):
            return
        handle = self.trainer.evaluated_model.register_forward_pre_hook(lambda *_: self._stop.stop_if_received())
        try:
            self._do_eval()
        finally:
            handle.remove()

    def after_train(self) -> None:
        del self._func  # a closure that refers to the trainer


class BestCheckpointer(HookBase):
    """Keeps the checkpoint with the highest value of one metric as model_best.pth."""

    def __init__(self, checkpointer: Checkpointer, metric: str, metrics_file: str):
        """
        Args:
            metric: name of a scalar, as "segm/AP".
            metrics_file: what an interrupted run reached so far is read from there.
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._metrics_file = metrics_file
        self._best = -math.inf

    def before_train(self) -> None:
        values = [record[self._metric] for record in read_metrics(self._metrics_file) if self._metric in record]
        self._best = max((v for v in values if math.isfinite(v)), default=-math.inf)

    def after_step(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (-math.inf, -1))
        if iteration != self.trainer.iter or not value > self._best:
            return
        self._best = value
        logger.info(f"Best {self._metric} so far: {value:.3f} after iteration {iteration + 1}")
        self._checkpointer.save("model_best", tag=False, iteration=iteration)


class PictureHook(HookBase):
    """Puts pictures into the event storage, for TensorBoard, whenever the model is evaluated."""

    def __init__(self, period: int, draw: Callable[[], dict[str, Any]]):
        """
        Args:
            draw: gives pictures by name, uint8 [H, W, 3] RGB.
        """
        self._period = period
        self._draw = draw

    def after_step(self) -> None:
        if is_due(self.trainer.iter + 1, self._period, self.trainer.max_iter):
            for name, picture in self._draw().items():
                self.trainer.storage.put_image(f"validation/{name}", picture.transpose(2, 0, 1))

    def after_train(self) -> None:
        del self._draw  # a closure that refers to the trainer


class PeriodicWriter(HookBase):
    """Writes every ``period`` iterations, after an evaluation and at the end; a failed run adds nothing."""

    def __init__(self, build_writers: Callable[[], list[EventWriter]], period: int, eval_period: int):
        self._build_writers = build_writers
        self._writers: list[EventWriter] = []
        self._periods = (period, eval_period)

    def before_train(self) -> None:
        self._writers = self._build_writers()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if any(is_due(done, period, self.trainer.max_iter) for period in self._periods):
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.close()
        del self._build_writers  # a closure that refers to the trainer


class FinishIteration(HookBase):
    """Before a resumed run goes on: runs the hooks that come after the checkpoint for the checkpoint's iteration."""

    def __init__(self, hooks_after_checkpoint: Sequence[HookBase], is_finished: Callable[[], bool | None]):
        """
        Args:
            is_finished: whether the iteration is in the metrics file; asked on the main process.
        """
        self._hooks = hooks_after_checkpoint
        self._is_finished = is_finished

    def before_train(self) -> None:
        trainer = self.trainer
        if trainer.start_iter == 0 or comm.all_gather(self._is_finished())[0]:
            return
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        for hook in self._hooks:
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter

    def after_train(self) -> None:
        del self._is_finished  # a closure that refers to the trainer
