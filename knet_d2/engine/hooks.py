"""Hooks of a training run.

Their order makes a run resumable at any moment: the checkpoint of an iteration is written before its evaluation
(which can fail), its line in metrics.json last. A missing line tells a resumed run to repeat the hooks that follow
the checkpoint for that iteration.
"""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import distributed, nn

from ..checkpoint import Checkpointer, periodic_checkpoints
from ..errors import KNetError
from .launch import EXIT_PREEMPTED, Preempted, StopSignals
from .writers import TIMINGS, WINDOW, read_metrics

logger = logging.getLogger(__name__)


def is_due(trainer: TrainerBase, *periods: int) -> bool:
    """Whether the present iteration is the last one, or ends one of the periods (in iterations; 0 = none)."""
    done = trainer.iter + 1
    return done == trainer.max_iter or any(period > 0 and done % period == 0 for period in periods)


class MetricsHistory(HookBase):
    """Keeps the recent values of all metrics in the checkpoint, so that a resumed run smooths over the same values."""

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
            # A metric that is not smoothed can be unwritten only if it is of this iteration
            if name not in TIMINGS and (smoothed or values[-1][1] == storage.iter):
                state[name] = {"values": values, "smoothed": smoothed}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class ProcessAgreement(HookBase):
    """Gives all processes equal models before they are saved or evaluated, and checks that they are equal.

    Running statistics of plain batch norm are of each process's own images. All processes take those of the main one,
    which are in the checkpoint.
    """

    def __init__(self, models: Sequence[nn.Module], *periods: int):
        """
        Args:
            periods: in iterations; the hook is due whenever one of them is.
        """
        self._models = models
        self._periods = periods

    def before_train(self) -> None:
        self._make_equal()

    def after_step(self) -> None:
        if is_due(self.trainer, *self._periods):
            self._make_equal()

    def _make_equal(self) -> None:
        """
        Raises:
            KNetError: parameters differ; in all processes.
        """
        if comm.get_world_size() == 1:
            return
        for model in self._models:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)
        state = [item for model in self._models for item in model.state_dict().items()]
        sums = torch.stack([_checksum(tensor) for _, tensor in state]).tolist()
        for rank, others in enumerate(comm.all_gather(sums)):
            differing = [name for (name, _), a, b in zip(state, sums, others) if a != b]
            if differing:
                raise KNetError(
                    f"Iteration {self.trainer.iter}: processes {comm.get_rank()} and {rank} have trained different "
                    f"values of {differing[0]} ({len(differing)} differ in all). Continue from the last checkpoint "
                    "with --resume; should it happen again, a device or its memory may be broken."
                )


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bytes, int64."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)


class CheckpointHook(HookBase):
    """Writes model_<iteration>.pth periodically and model_final.pth at the end, on the main process."""

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int):
        """
        Args:
            period: iterations; 0: only model_final.pth.
            keep: number of periodic checkpoints that stay, those of the run before a resume included; 0 = all.
        """
        self._checkpointer = checkpointer
        self._period = period
        self._keep = keep

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period and done % self._period == 0:
            self.save()
        if done == self.trainer.max_iter:
            self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def save_unless_done(self) -> None:
        """Write the checkpoint of this iteration, if after_step has not written one."""
        if not is_due(self.trainer, self._period):
            self.save()

    def save(self) -> None:
        """Write the checkpoint of this iteration, then remove old ones."""
        name = f"model_{self.trainer.iter:07d}"
        self._checkpointer.save(name, iteration=self.trainer.iter)
        if self._keep and comm.is_main_process():
            folder = self._checkpointer.save_dir
            names = periodic_checkpoints(folder)
            # Later ones are damaged files that a resume has passed over
            for old in names[names.index(f"{name}.pth") + self._keep :]:
                os.remove(os.path.join(folder, old))


class StopHook(HookBase):
    """Ends the training after a stop signal to any of its processes, with a checkpoint of the iteration."""

    def __init__(self, signals: StopSignals, checkpoints: CheckpointHook):
        self._signals = signals
        self._checkpoints = checkpoints

    def after_step(self) -> None:
        received = [name for name in comm.all_gather(self._signals.received) if name]
        if received:
            self._stop(received[0])

    def stop_if_received(self, *_: Any) -> None:
        """Stop without asking the other processes, which get the signal too; a forward hook of the evaluated model."""
        if self._signals.received:
            self._stop(self._signals.received)

    def _stop(self, name: str) -> None:
        logger.info(f"Received {name} in iteration {self.trainer.iter}.")
        self._checkpoints.save_unless_done()
        comm.synchronize()  # the launcher ends all processes as soon as one has ended
        logger.info(f"Stopped with a checkpoint, exit code {EXIT_PREEMPTED}: continue with --resume.")
        raise Preempted


class EvalHook(HookBase):
    """Evaluates the model periodically and after the last iteration.

    A stop signal ends an evaluation at the next image; a resumed run repeats it from the start.
    """

    def __init__(self, period: int, stop: StopHook):
        self._period = period
        self._stop = stop

    def after_step(self) -> None:
        if not is_due(self.trainer, self._period):
            return
        handle = self.trainer.evaluated_model.register_forward_pre_hook(self._stop.stop_if_received)
        try:
            results = flatten_results_dict(self.trainer.evaluate())
        finally:
            handle.remove()
        self.trainer.storage.put_scalars(**results, smoothing_hint=False)
        comm.synchronize()


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


class PeriodicWriter(HookBase):
    """Writes every LOG_PERIOD iterations, after an evaluation and at the end; a failed run adds nothing."""

    def __init__(self, *periods: int):
        """
        Args:
            periods: in iterations; writing is due whenever one of them is.
        """
        self._periods = periods
        self._writers: list[EventWriter] = []

    def before_train(self) -> None:
        self._writers = self.trainer.build_writers()

    def after_step(self) -> None:
        if is_due(self.trainer, *self._periods):
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.close()


class FinishIteration(HookBase):
    """Before a resumed run continues: repeats the hooks that follow the checkpoint for the checkpoint's iteration."""

    def __init__(self, hooks_after_checkpoint: Sequence[HookBase]):
        self._hooks = hooks_after_checkpoint

    def before_train(self) -> None:
        trainer = self.trainer
        last_iter = trainer.start_iter - 1
        # The main process has cut the metrics file and knows its last line
        if last_iter < 0 or comm.all_gather(trainer.last_written == last_iter)[0]:
            return
        trainer.iter = trainer.storage.iter = last_iter
        for hook in self._hooks:
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter
