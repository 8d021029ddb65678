"""Hooks of a training run.

The order of the hooks makes a run resumable at any time. In each iteration, the checkpoint is written first, then the
model is evaluated (which can fail), and the line in metrics.json is written last. If this line is missing for the
checkpoint's iteration, a resumed run repeats the hooks that follow the checkpoint.
"""

import logging
import math
import os
import shlex
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
from .stop_signals import EXIT_PREEMPTED, Preempted, StopSignals
from .train_step import TrainStep
from .writers import TIMINGS, WINDOW, read_metrics

logger = logging.getLogger(__name__)


def is_due(trainer: TrainerBase, *periods: int) -> bool:
    """Return whether the current iteration is the last one, or the last one of a period (in iterations; 0 = never)."""
    done = trainer.iter + 1
    return done == trainer.max_iter or any(period > 0 and done % period == 0 for period in periods)


class MetricsHistory(HookBase):
    """Stores the recent values of all metrics in the checkpoint, so that a resumed run smooths over the same values."""

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
            # Metrics without smoothing are needed only if this iteration set them: earlier ones are in the file.
            if name not in TIMINGS and (smoothed or values[-1][1] == storage.iter):
                state[name] = {"values": values, "smoothed": smoothed}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class ProcessAgreement(HookBase):
    """Makes the models of all processes equal before they are saved or evaluated, and checks that they are equal.

    Plain batch norm computes running statistics from the images of its own process. The statistics of the main
    process are broadcast, because the checkpoint contains these.
    """

    def __init__(self, models: Sequence[nn.Module], *periods: int):
        """
        Args:
            models: models of this process, in the same order in all processes.
            periods: periods in iterations; the hook runs at the end of each of them.
        """
        self._models, self._periods = models, periods

    def before_train(self) -> None:
        self._make_equal()

    def after_step(self) -> None:
        if is_due(self.trainer, *self._periods):
            self._make_equal()

    def _make_equal(self) -> None:
        """Broadcast the buffers, then compare checksums of all parameters and buffers.

        Raises:
            KNetError: a value differs between processes; raised in all processes.
        """
        if comm.get_world_size() == 1:
            return
        for model in self._models:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)
        state = [item for model in self._models for item in model.state_dict().items()]
        bytes_of = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in state)
        sums = torch.stack([x.sum(dtype=torch.int64) for x in bytes_of]).tolist()
        for rank, others in enumerate(comm.all_gather(sums)):
            differing = [name for (name, _), a, b in zip(state, sums, others) if a != b]
            if differing:
                raise KNetError(
                    f"Iteration {self.trainer.iter}: processes {comm.get_rank()} and {rank} have different values of "
                    f"{differing[0]} ({len(differing)} tensors differ). Continue from the last checkpoint with "
                    "--resume; if it happens again, check the device and its memory."
                )


class CheckpointHook(HookBase):
    """Writes model_<iteration>.pth periodically and model_final.pth at the end, on the main process."""

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int):
        """
        Args:
            period: number of iterations between checkpoints; 0: write only model_final.pth.
            keep: number of periodic checkpoints to keep, also counting those from before a resume; 0 = all.
        """
        self._checkpointer, self._period, self._keep = checkpointer, period, keep

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period and done % self._period == 0:
            self.save()
        if done == self.trainer.max_iter:
            self.save_final()

    def save_final(self) -> None:
        """Write the checkpoint of this iteration to model_final.pth."""
        self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def save_unless_done(self) -> None:
        """Write the checkpoint of this iteration unless after_step has written one."""
        if not is_due(self.trainer, self._period):
            self.save()

    def save(self) -> None:
        """Write the checkpoint of this iteration, then remove old ones."""
        name = f"model_{self.trainer.iter:07d}"
        self._checkpointer.save(name, iteration=self.trainer.iter)
        if self._keep and comm.is_main_process():
            folder = self._checkpointer.save_dir
            names = periodic_checkpoints(folder)
            # Checkpoints of later iterations stay: they are damaged files that a resume has skipped.
            for old in names[names.index(f"{name}.pth") + self._keep :]:
                os.remove(os.path.join(folder, old))


class StopHook(HookBase):
    """Writes a checkpoint and ends the run after any of its processes has received a stop signal."""

    def __init__(self, signals: StopSignals, checkpoints: CheckpointHook, step: TrainStep):
        """The step knows whether another process has received a stop signal."""
        self._signals, self._checkpoints, self._step = signals, checkpoints, step

    def after_step(self) -> None:
        received = self._signals.received if comm.get_world_size() == 1 else self._step.stop_signal
        if received:
            self._stop(received)

    def stop_if_received(self, *_: Any) -> None:
        """Stop without asking the other processes, because schedulers signal all processes of a run.

        It is a forward pre-hook of the evaluated model.
        """
        if self._signals.received:
            self._stop(self._signals.received)

    def _stop(self, name: str) -> None:
        logger.info("Received %s in iteration %d.", name, self.trainer.iter)
        self._checkpoints.save_unless_done()
        comm.synchronize()  # wait for the checkpoint: the launcher ends all processes as soon as one has ended
        logger.info("Stopped with a checkpoint and exit code %d. %s", EXIT_PREEMPTED, self._advice())
        raise Preempted

    def _advice(self) -> str:
        """How to continue the run."""
        config = os.path.join(self.trainer.cfg.OUTPUT_DIR, "config.yaml")
        if comm.get_world_size() > 1 or not os.path.isfile(config):
            return "Continue with --resume, and otherwise the same command."
        return f"Continue with --resume: knet train --config-file {shlex.quote(config)} --resume"


class EvalHook(HookBase):
    """Evaluates the model periodically and after the last iteration.

    A stop signal ends an evaluation at the next image. A resumed run then repeats the evaluation from the start.

    Attributes:
        results: metrics of the current iteration's evaluation, by name; empty if there was none.
    """

    def __init__(self, period: int, stop: StopHook):
        self.results: dict[str, float] = {}
        self._period, self._stop = period, stop

    def after_step(self) -> None:
        self.results = {}
        if not is_due(self.trainer, self._period):
            return
        handle = self.trainer.evaluated_model.register_forward_pre_hook(self._stop.stop_if_received)
        try:
            self.results = flatten_results_dict(self.trainer.evaluate())
        finally:
            handle.remove()
        self.trainer.storage.put_scalars(**self.results, smoothing_hint=False)
        comm.synchronize()


class BestCheckpointer(HookBase):
    """Writes the checkpoint with the highest value of one metric to model_best.pth.

    Attributes:
        evaluations_since: number of evaluations with a value after the one with the highest value.
    """

    def __init__(self, evaluation: EvalHook, checkpointer: Checkpointer, metric: str, metrics_file: str):
        """
        Args:
            evaluation: runs before this hook.
            metric: name of a scalar, such as "segm/AP".
            metrics_file: path of metrics.json; the best value before a resume is read from it.
        """
        self._evaluation, self._checkpointer = evaluation, checkpointer
        self._metric, self._metrics_file = metric, metrics_file
        self._is_missing_told = False
        self._best, self.evaluations_since = -math.inf, 0

    def before_train(self) -> None:
        self._best, self.evaluations_since = -math.inf, 0
        for record in read_metrics(self._metrics_file):
            self._is_better(record.get(self._metric, math.nan))

    def _is_better(self, value: float) -> bool:
        """Take the value of an evaluation; returns whether it is the highest so far."""
        if not math.isfinite(value):
            return False
        self.evaluations_since = 0 if value > self._best else self.evaluations_since + 1
        self._best = max(self._best, value)
        return self.evaluations_since == 0

    def after_step(self) -> None:
        results, iteration = self._evaluation.results, self.trainer.iter
        value = results.get(self._metric, math.nan)
        if results and not math.isfinite(value) and not self._is_missing_told:
            self._is_missing_told = True
            what = f"is {value}" if self._metric in results else "is not among its results"
            logger.warning(
                "The evaluation after iteration %d gives no value of %s (it %s), so it can't decide on model_best.pth. "
                "Check the annotations of the first data set in DATASETS.TEST.",
                *(iteration + 1, self._metric, what),
            )
        if not self._is_better(value):
            return
        logger.info("Best %s so far: %.3f after iteration %d.", self._metric, value, iteration + 1)
        self._checkpointer.save("model_best", tag=False, iteration=iteration)


class EarlyStopping(HookBase):
    """Ends the run after evaluations without a better value of the main metric (SOLVER.PATIENCE).

    The last iteration is then the present one, and its checkpoint is model_final.pth. Since evaluations are counted in
    metrics.json, a run that was resumed ends at the same iteration.
    """

    def __init__(self, patience: int, best: BestCheckpointer | None, checkpoints: CheckpointHook, period: int):
        """
        Args:
            patience: number of evaluations in a row.
            best: knows their number; it runs before this hook. None except on the main process.
            checkpoints: writes model_final.pth.
            period: TEST.EVAL_PERIOD.
        """
        self._patience, self._best, self._checkpoints, self._period = patience, best, checkpoints, period

    def before_train(self) -> None:
        if self._is_exhausted():
            logger.info("This run has ended by SOLVER.PATIENCE = %d. Raise it to continue.", self._patience)
            self.trainer.max_iter = self.trainer.start_iter

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or not is_due(self.trainer, self._period) or not self._is_exhausted():
            return
        logger.info(
            "The last %d evaluations gave no better value: the run ends after iteration %d (SOLVER.PATIENCE). The best "
            "weights are in model_best.pth.",
            *(self._patience, done),
        )
        self.trainer.max_iter = done
        self._checkpoints.save_final()

    def _is_exhausted(self) -> bool:
        """Return the main process's answer, on all processes."""
        return comm.all_gather(self._best is not None and self._best.evaluations_since >= self._patience)[0]


class PeriodicWriter(HookBase):
    """Calls the writers of metrics at the end of each period and of the run. A failed iteration is not written."""

    def __init__(self, *periods: int):
        self._periods = periods  # in iterations
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
    """Completes the checkpoint's iteration before a resumed run continues.

    If the interrupted run did not reach the end of this iteration, the hooks that follow the checkpoint are repeated.
    """

    def __init__(self, hooks_after_checkpoint: Sequence[HookBase]):
        self._hooks = hooks_after_checkpoint

    def before_train(self) -> None:
        trainer = self.trainer
        last_iter = trainer.start_iter - 1
        # Only the main process knows the last line, because it has truncated the metrics file.
        if last_iter < 0 or comm.all_gather(trainer.last_written == last_iter)[0]:
            return
        trainer.iter = trainer.storage.iter = last_iter
        for hook in self._hooks:
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter
