"""Latency of several models in turns, memory, operations, and how large a batch can be."""

import contextlib
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from .models import Subject

PRECISIONS = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_MEBI = 1 << 20
# Side of the square matrices whose product tells what a device can do
_MATRIX_SIZE, _GPU_MATRIX_SIZE = 2048, 8192


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Run in one of PRECISIONS: TF32 is off in all but "tf32", the half types work by autocast."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    dtype = PRECISIONS[name]
    autocast: AbstractContextManager = contextlib.nullcontext()
    if dtype is not None:
        autocast = torch.autocast(device.type, dtype=dtype)
    try:
        with autocast:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Run:
    """One model on one batch: a prediction, or a training step. ``measure`` calls the parts behind the forward."""

    def __init__(self, subject: Subject, inputs: list[dict[str, Any]], *, train: bool):
        self.subject, self.inputs, self.train = subject, inputs, train
        if train:
            self.optimizer, self.clip_gradients = subject.optimizer()
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0  # the same operations, but the weights stay, and with them the work

    def __call__(self, measure: Callable[[str, Callable], Any] = lambda name, function: function()) -> Any:
        """Returns what the model predicts; None after a training step."""
        model = self.subject.model.train(self.train)
        if not self.train:
            with torch.no_grad():
                return model(self.inputs)
        with EventStorage():  # Detectron2's heads log while they train
            total = sum(model(self.inputs).values())
        with torch.autocast(total.device.type, enabled=False):
            measure("backward", total.backward)
            measure("optimiser", self._update)
        return None

    def _update(self) -> None:
        self.clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        self.optimizer.step()
        self.optimizer.zero_grad()


def interleave(runs: Sequence[Callable[[], Any]], rounds: int, warmup: int, device: torch.device) -> list[list[float]]:
    """Seconds of every run in every round; in a round each is called once, so that all see the same disturbances."""
    seconds: list[list[float]] = [[] for _ in runs]
    for i in range(warmup + rounds):
        for run, samples in zip(runs, seconds):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warmup:
                samples.append(time.perf_counter() - start)
    return seconds


class Memory(NamedTuple):
    """MiB that a run needs at most above what is held before it, and how much of that it returns."""

    peak: float
    returned: float


def measure_memory(run: Callable[[], Any], device: torch.device) -> Memory | None:
    """The memory of a run, its result included; None where that can't be found out.

    On CUDA this is PyTorch's memory; on Linux' CPUs the resident memory of the process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return Memory((torch.cuda.max_memory_allocated(device) - before) / _MEBI, _size(result))
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide what is allocated anew
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = _process_status("VmRSS")
    result = run()
    return Memory((_process_status("VmHWM") - before) / 1024, _size(result))


def _size(result: Any) -> float:
    """MiB of all tensors in a result."""
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size() / _MEBI
    if isinstance(result, Boxes):
        return _size(result.tensor)
    if isinstance(result, Instances):
        return _size(result.get_fields())
    if isinstance(result, dict):
        return _size(list(result.values()))
    return sum(map(_size, result)) if isinstance(result, (list, tuple)) else 0.0


def _process_status(key: str) -> int:
    """A number in KiB that Linux knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def count_operations(run: Callable[[], Any]) -> float:
    """Multiply-adds of a run's convolutions and matrix products, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def matrix_rate(device: torch.device, name: str) -> float:
    """10^9 multiply-adds per second of a large matrix product in a precision: what can be reached in practice."""
    size = _MATRIX_SIZE if device.type == "cpu" else _GPU_MATRIX_SIZE
    with precision(name, device):
        x = torch.randn(size, size, device=device)
        y = x.to(PRECISIONS[name] or x.dtype)
        seconds = interleave([lambda: y @ y], rounds=5, warmup=2, device=device)[0]
    return size**3 / min(seconds) / 1e9


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """The largest batch for which ``fits`` is true: doubles, then halves the interval; 0 if one is too much."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, min(2 * high, limit + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_in_memory(make_run: Callable[[int], Callable[[], Any]]) -> Callable[[int], bool]:
    """Whether a run of some batch size ends without running out of GPU memory."""

    def fits(batch: int) -> bool:
        try:
            make_run(batch)()
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return fits


def median(values: Sequence[float]) -> float:
    """The middle value, the mean of the two middle ones for an even number, NaN for none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
