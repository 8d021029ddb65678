"""One training step: forward, backward, gradient clipping and update, optionally in mixed precision."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import distributed, nn

from ..errors import ConfigError, NonFiniteError
from ..modeling.layers import send
from .optimizer import load_optimizer_state
from .stop_signals import StopSignals
from .writers import split_stage

logger = logging.getLogger(__name__)


def amp_dtype(enabled: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The element type for autocast, from SOLVER.AMP.ENABLED and DTYPE; None for full precision.

    Raises:
        ConfigError: the type is unknown, or the device does not support it.
    """
    if not enabled:
        return None
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in types:
        raise ConfigError(f'SOLVER.AMP.DTYPE = "{name}": use "float16" or "bfloat16".')
    if name == "float16" and device.type != "cuda":
        raise ConfigError(f'SOLVER.AMP.DTYPE = "float16": use "bfloat16" on "{device}"; float16 needs a CUDA GPU.')
    return types[name]


class TrainStep(TrainerBase):
    """Replaces Detectron2's SimpleTrainer and AMPTrainer by one class that works with all Detectron2 versions.

    The random numbers of a step (dropout) depend only on seed, iteration and rank, so a resumed run repeats them. If a
    loss or the gradient is not finite, the step is skipped. After ``non_finite_limit`` such steps in a row,
    :class:`NonFiniteError` is raised on every rank.

    Beside the all-reduce of gradients, a step has at most two collectives: the criterion's, before the backward pass,
    and :meth:`_share` after it. A process whose batch is bad takes part in both with losses that are NaN, so that no
    other process waits for it.

    Attributes:
        stop_signal: name of a stop signal that a process had received when the last step ended, the same in all
            processes; None if there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_gradients: Callable[[Sequence[torch.Tensor]], torch.Tensor],
        seed: int,
        dtype: torch.dtype | None = None,
        non_finite_limit: int = 1,
        num_parts: int = 1,
        signals: StopSignals | None = None,
    ):
        """
        Args:
            clip_gradients: function that clips gradients in place and returns their total norm before clipping.
            seed: of the run.
            dtype: element type for autocast; None = full precision.
            non_finite_limit: number of consecutive steps that are not finite after which the error is raised.
            num_parts: number of parts into which a batch is split; their gradients are accumulated. Each loss is
                normalised within its part, and the parts are averaged by their number of images. At most the number
                of images per process.
            signals: stop signals of this process.
        """
        super().__init__()
        model.train()
        self.model = model
        self._plain_model = getattr(model, "module", model)
        self.optimizer = optimizer
        self.data_loader: Iterable[list[dict[str, Any]]] | None = None
        self._data_iterator: Iterator | None = None
        self._clip_gradients = clip_gradients
        self._seed = seed
        self._dtype = dtype
        self._num_parts = num_parts
        self._device = next(model.parameters()).device
        self._rank = comm.get_rank()
        self._non_finite_limit = non_finite_limit
        self._non_finite_steps = 0
        self._gradients_are_complete = False
        buffers = [
            buffer
            for module in model.modules()
            if getattr(module, "track_running_stats", False) and module.training
            for buffer in module.buffers(recurse=False)
        ]
        # By type, so that they can be copied together
        self._statistics = [[x for x in buffers if x.dtype == dtype] for dtype in {x.dtype for x in buffers}]
        self.last_batch: list[dict[str, Any]] = []
        self.stop_signal: str | None = None
        self._signals = signals or StopSignals()
        self._failure: NonFiniteError | None = None
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        if self._data_iterator is None:
            self._data_iterator = iter(self.data_loader)
        data = next(self._data_iterator)
        data_time = time.perf_counter() - start

        self.last_batch = data
        # Running statistics as they are now, to undo a skipped step; one copy for each type, not for each layer
        statistics = [torch.cat([x.flatten() for x in buffers]) for buffers in self._statistics]
        try:
            metrics = self._update(data, data_time)
        except NonFiniteError as error:
            self.optimizer.zero_grad()
            for buffers, kept in zip(self._statistics, statistics):
                for buffer, before in zip(buffers, kept.split([x.numel() for x in buffers])):
                    buffer.copy_(before.view_as(buffer))
            self._non_finite_steps += 1
            if self._non_finite_steps >= self._non_finite_limit:
                raise
            logger.warning("%s This step is skipped (%d in a row).", error, self._non_finite_steps)
        else:
            self._non_finite_steps = 0
            self._put_metrics(metrics)

    def _update(self, data: list[dict[str, Any]], data_time: float) -> list[dict[str, float]]:
        """Compute and apply the gradient of a batch; returns the metrics of every process, see :meth:`_share`."""
        torch.manual_seed(step_seed(self._seed, self.iter, self._rank))
        self.optimizer.zero_grad()
        losses = self._backward(data)
        if not self._gradients_are_complete:
            self._check_gradients()
        self.grad_scaler.unscale_(self.optimizer)
        norm = self._clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]])

        metrics = self._share({**losses, "grad_norm": norm.to(self._device)}, data_time)
        self._check_finite(metrics, data)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return metrics

    def _backward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of all parts of a batch; returns the losses of the whole batch."""
        sums: dict[str, torch.Tensor] = {}
        self._failure = None
        bounds = [i * len(data) // self._num_parts for i in range(self._num_parts + 1)]
        for start, end in zip(bounds, bounds[1:]):
            with self._local_gradients() if end < len(data) else nullcontext():
                with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
                    losses = self._forward(data[start:end])
                losses = {name: value * ((end - start) / len(data)) for name, value in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()  # type: ignore[arg-type]
            for name, value in losses.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return sums

    def _local_gradients(self) -> AbstractContextManager:
        """Disable the all-reduce of gradients, which is needed only after the last part of a batch."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else nullcontext()  # type: ignore[operator]

    def _forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            losses = self.model(data)
        except NonFiniteError as error:  # of one process alone
            raise NonFiniteError(f"{error} {self._where(_file_names(data))}") from error
        self._failure = self._failure or getattr(self._plain_model, "failure", None)
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _share(self, metrics: dict[str, torch.Tensor], data_time: float) -> list[dict[str, float]]:
        """Exchange the numbers of a step, and the stop signals, between all processes.

        This is one collective and one transfer to the CPU. It comes after the backward pass was queued, since a
        transfer waits for the device.

        Args:
            metrics: losses and gradient norm of this process.

        Returns:
            the metrics of every process, with "data_time" in seconds.
        """
        received = signal.Signals[self._signals.received].value if self._signals.received else 0
        host = [data_time, float(received)]
        own = torch.stack([value.detach().float() for value in metrics.values()])
        if comm.get_world_size() == 1:
            rows = [[*own.tolist(), *host]]
        else:
            own = torch.cat([own, send(torch.tensor(host), self._device)])
            gathered = own.new_empty(comm.get_world_size(), len(own))
            distributed.all_gather(list(gathered.unbind()), own)
            rows = gathered.tolist()
        number = int(max(row[-1] for row in rows))
        self.stop_signal = signal.Signals(number).name if number else None
        return [dict(zip([*metrics, "data_time"], row)) for row in rows]

    def _check_gradients(self) -> None:
        """Raise on all ranks if a trainable parameter has no gradient: DistributedDataParallel would fail later."""
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        missing = max(comm.all_gather(missing), key=len)
        if missing:
            names = ", ".join(name.removeprefix("module.") for name in missing[:3])
            advice = getattr(self._plain_model, "gradient_advice", "Add a loss that depends on them")
            raise ConfigError(
                f"No loss depends on {len(missing)} trainable parameters ({names}, ...). {advice}, or freeze them."
            )
        self._gradients_are_complete = True

    def _check_finite(self, metrics: list[dict[str, float]], data: list[dict[str, Any]]) -> None:
        """Raise on all ranks if a metric of any rank is not finite."""
        # GradScaler itself skips a step whose gradient overflows, and lowers its scale
        ignored = "grad_norm" if self.grad_scaler.is_enabled() else None
        bad = [{k: v for k, v in x.items() if k != ignored and not math.isfinite(v)} for x in metrics]
        if not any(bad):
            return
        # unscale_() is allowed once per update(): reset it, since step() is skipped
        self.grad_scaler.update()
        failure = self._failure and str(self._failure)
        # A gradient that is not finite is so in all processes: name the one whose loss or cost is
        found = comm.all_gather((failure, _file_names(data)))
        rank = max(range(len(found)), key=lambda i: (found[i][0] is not None, len(bad[i])))
        reason, files = found[rank]
        terms = ", ".join(_describe_term(name, value) for name, value in bad[rank].items())
        raise NonFiniteError(f"{reason or f'Not finite: {terms}. The step was not applied.'} {self._where(files)}")

    def _where(self, files: Sequence[str]) -> str:
        rates = sorted({group["lr"] for group in self.optimizer.param_groups}, reverse=True)
        return (
            f"Iteration {self.iter}, learning rate {', '.join(f'{r:g}' for r in rates)}, images: {', '.join(files)}. "
            "Try a lower learning rate, gradient clipping or full precision."
        )

    def _put_metrics(self, metrics: list[dict[str, float]]) -> None:
        """Put the mean over all ranks (for data_time: the maximum) into the event storage of the main process."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(x["data_time"] for x in metrics))
        mean = {name: sum(x[name] for x in metrics) / len(metrics) for name in metrics[0] if name != "data_time"}
        norm = mean.pop("grad_norm")
        if math.isfinite(norm):
            storage.put_scalar("grad_norm", norm)
        if "total_loss" not in mean:
            storage.put_scalar("total_loss", sum(mean.values()))
        storage.put_scalars(**mean)

    def repeat(self, batch: list[dict[str, Any]], iteration: int, rank: int) -> dict[str, float]:
        """Repeat the step that process ``rank`` took in ``iteration``; returns the losses by name."""
        self.data_loader, self._data_iterator = [batch], None
        self.iter, self._rank = iteration, rank
        with EventStorage(iteration) as storage:
            self.run_step()
        return {name: value for name, (value, _) in storage.latest().items() if "loss" in name}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["non_finite_steps"] = self._non_finite_steps
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._non_finite_steps = state_dict.get("non_finite_steps", 0)
        load_optimizer_state(self.optimizer, state_dict["optimizer"])
        if state_dict.get("grad_scaler") and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """Return a seed that depends only on (seed, iteration, rank)."""
    # PyTorch's seeds are signed, so one bit goes
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0]) >> 1


def _file_names(data: list[dict[str, Any]]) -> list[str]:
    return [str(sample.get("file_name", "?")) for sample in data]


def _describe_term(name: str, value: float) -> str:
    stage = split_stage(name)[1]
    return f"{name} = {value}" + (f" (stage {stage})" if stage else "")
