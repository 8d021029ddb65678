"""One training step: forward, backward, clipping, update; in mixed precision where the config says so."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from ..errors import ConfigError, NonFiniteError
from .optimizer import load_optimizer_state
from .writers import split_stage

logger = logging.getLogger(__name__)


def amp_dtype(enabled: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision (None = full precision); SOLVER.AMP.ENABLED and SOLVER.AMP.DTYPE are checked."""
    if not enabled:
        return None
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in types:
        raise ConfigError(f'SOLVER.AMP.DTYPE = "{name}": use "float16" or "bfloat16".')
    if name == "float16" and device.type != "cuda":
        raise ConfigError(f'SOLVER.AMP.DTYPE = "float16" needs a CUDA GPU: use "bfloat16" on "{device}".')
    return types[name]


class TrainStep(TrainerBase):
    """What Detectron2's SimpleTrainer and AMPTrainer do, in one class that is the same for all its versions.

    The randomness of a step (dropout) is a function of seed, iteration and rank, so that a resumed run repeats it.
    When a loss or the gradient isn't finite, the update is not applied. After some such steps in a row
    :class:`NonFiniteError` is raised on every rank; until then they are skipped.
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
    ):
        """
        Args:
            clip_gradients: clips in place and returns the gradients' total norm.
            non_finite_limit: steps in a row that aren't finite after which the error is raised.
            dtype: type of mixed precision; None = full precision.
            num_parts: of a batch, computed one after the other; the loss is the mean over the images' losses, each
                normalised within its part. At most the number of images that a process has.
        """
        super().__init__()
        model.train()
        self.model = model
        self.optimizer = optimizer
        self.data_loader: Iterable[list[dict[str, Any]]] = ()
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
        self._statistics = [
            buffer
            for module in model.modules()
            if getattr(module, "track_running_stats", False) and module.training
            for buffer in module.buffers(recurse=False)
        ]
        self.last_batch: list[dict[str, Any]] = []
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        if self._data_iterator is None:
            self._data_iterator = iter(self.data_loader)
        data = next(self._data_iterator)
        data_time = time.perf_counter() - start

        self.last_batch = data
        statistics = [buffer.clone() for buffer in self._statistics]
        try:
            metrics = self._update(data)
        except NonFiniteError as error:
            self.optimizer.zero_grad()
            for buffer, before in zip(self._statistics, statistics):
                buffer.copy_(before)
            self._non_finite_steps += 1
            if self._non_finite_steps >= self._non_finite_limit:
                raise
            logger.warning(f"{error} This step is skipped ({self._non_finite_steps} in a row).")
        else:
            self._non_finite_steps = 0
            self._put_metrics(metrics, data_time)

    def _update(self, data: list[dict[str, Any]]) -> dict[str, float]:
        """Returns all losses and the norm of the gradient by name."""
        torch.manual_seed(step_seed(self._seed, self.iter, self._rank))
        self.optimizer.zero_grad()
        losses = self._backward(data)
        if not self._gradients_are_complete:
            self._check_gradients()
        self.grad_scaler.unscale_(self.optimizer)
        norm = self._clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]])

        # one transfer for all numbers, after the backward pass was started
        values = torch.stack([v.detach().float() for v in (*losses.values(), norm.to(self._device))]).tolist()
        metrics = dict(zip([*losses, "grad_norm"], values))
        self._check_finite(metrics, data)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return metrics

    def _backward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Add up the gradients of all parts of a batch; returns the losses of the whole."""
        sums: dict[str, torch.Tensor] = {}
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
        """Processes exchange gradients after the last part only."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else nullcontext()  # type: ignore[operator]

    def _forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            losses = self.model(data)
        except NonFiniteError as e:  # in all processes
            raise NonFiniteError(f"{e} {self._where(comm.all_gather(_file_names(data))[e.rank])}") from e
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _check_gradients(self) -> None:
        """Raise on all ranks when a parameter that is trained got no gradient, see DistributedDataParallel."""
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        missing = max(comm.all_gather(missing), key=len)
        if missing:
            names = ", ".join(name.removeprefix("module.") for name in missing[:3])
            raise ConfigError(
                f"{len(missing)} parameters are trained, but no loss depends on them ({names}, ...). Set one of "
                "MODEL.KNET.LOSS.MASK_WEIGHT, DICE_WEIGHT and RANK_WEIGHT above 0, or freeze these parameters."
            )
        self._gradients_are_complete = True

    def _check_finite(self, metrics: dict[str, float], data: list[dict[str, Any]]) -> None:
        """Raise on all ranks when a number of any rank isn't finite."""
        checked = dict(metrics)
        if self.grad_scaler.is_enabled():
            checked.pop("grad_norm")  # the scaler skips such a step by itself and lowers its scale
        bad = {name: value for name, value in checked.items() if not math.isfinite(value)}
        found = [item for item in comm.all_gather((bad, _file_names(data) if bad else [])) if item[0]]
        if not found:
            return
        terms = ", ".join(_describe_term(name, value) for name, value in found[0][0].items())
        # unscale_() is allowed once per update(): reset it, since step() is skipped
        self.grad_scaler.update()
        raise NonFiniteError(f"Not finite: {terms}. The step was not applied. {self._where(found[0][1])}")

    def _where(self, files: Sequence[str]) -> str:
        rates = sorted({group["lr"] for group in self.optimizer.param_groups}, reverse=True)
        return (
            f"Iteration {self.iter}, learning rate {', '.join(f'{r:g}' for r in rates)}, images: {', '.join(files)}. "
            "Try a lower learning rate, gradient clipping or full precision."
        )

    def _put_metrics(self, metrics: dict[str, float], data_time: float) -> None:
        """Put the mean over ranks (data_time: the largest) into the event storage."""
        gathered = comm.gather({**metrics, "data_time": data_time})
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(m["data_time"] for m in gathered))
        mean = {name: sum(m[name] for m in gathered) / len(gathered) for name in metrics}
        norm = mean.pop("grad_norm")
        if math.isfinite(norm):
            storage.put_scalar("grad_norm", norm)
        if "total_loss" not in mean:
            storage.put_scalar("total_loss", sum(mean.values()))
        storage.put_scalars(**mean)

    def repeat(self, batch: list[dict[str, Any]], iteration: int, rank: int) -> dict[str, float]:
        """Take the step that a process took in an iteration; returns the losses by name."""
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
    """A seed that differs for every (seed, iteration, rank) and depends on nothing else."""
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0]) >> 1


def _file_names(data: list[dict[str, Any]]) -> list[str]:
    return [str(sample.get("file_name", "?")) for sample in data]


def _describe_term(name: str, value: float) -> str:
    stage = split_stage(name)[1]
    return f"{name} = {value}" + (f" (stage {stage})" if stage else "")
