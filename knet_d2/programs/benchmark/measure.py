"""Measures latency (of several models in turns), memory, operations and the largest possible batch."""

import contextlib
import ctypes
import gc
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
# Side of the square matrices whose product measures the speed of a device
_MATRIX_SIZE, _GPU_MATRIX_SIZE = 2048, 8192


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Run a ``with`` block in one of PRECISIONS: TF32 is on only for "tf32"; "fp16" and "bf16" use autocast."""
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
    """One model on one batch: a prediction or a training step."""

    def __init__(self, subject: Subject, inputs: list[dict[str, Any]], *, train: bool):
        self.subject, self.inputs, self.train = subject, inputs, train
        if train:
            self.optimizer, self.clip_gradients = subject.optimizer()
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0  # same operations, but the weights do not change, and so the work stays the same

    def __call__(self, measure: Callable[[str, Callable], Any] = lambda name, function: function()) -> Any:
        """Run once.

        Args:
            measure: calls a function under a name; it gets the backward pass and the optimiser step.

        Returns:
            The predictions of the model; None after a training step.
        """
        model = self.subject.model.train(self.train)
        if not self.train:
            with torch.no_grad():
                return model(self.inputs)
        with EventStorage():  # Detectron2's heads write metrics during training
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
    """Measure the seconds of every run in every round.

    Each round calls every run once, so that other load on the machine affects all of them equally.
    """
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
    """Memory of a run in MiB.

    Attributes:
        peak: largest increase during the run.
        returned: part of it that the result takes.
    """

    peak: float
    returned: float


def measure_memory(run: Callable[[], Any], device: torch.device) -> Memory | None:
    """Measure the memory of a run including its result; None if the device does not support it.

    On CUDA it is PyTorch's memory, on CPUs under Linux the resident memory of the process.
    """
    gc.collect()
    before = held_mib(device)
    if before is None:
        return None
    reset_peak(device)
    result = run()
    return Memory(peak_mib(device) - before, _size(result))


def held_mib(device: torch.device) -> float | None:
    """MiB that are held, without what the C library keeps for later; None if the device does not support it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / _MEBI
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    _give_back()
    return _process_status("VmRSS") / 1024


def reset_peak(device: torch.device) -> None:
    """Let :func:`peak_mib` begin anew, on a device with :func:`held_mib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory (VmHWM)


def peak_mib(device: torch.device) -> float:
    """The most MiB that were held since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEBI
    return _process_status("VmHWM") / 1024


def _give_back() -> None:
    """Let the C library return freed memory that it keeps: it would count as held, and hide what reuses it."""
    ctypes.CDLL(None).malloc_trim(0)


def _size(result: Any) -> float:
    """Return the MiB of all tensors in a result."""
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
    """Return a value of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def count_operations(run: Callable[[], Any]) -> float:
    """Count the multiply-adds of a run's convolutions and matrix products, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def matrix_rate(device: torch.device, name: str) -> float:
    """Measure the speed of a large matrix product, an upper bound in practice, in 10^9 multiply-adds per second."""
    size = _MATRIX_SIZE if device.type == "cpu" else _GPU_MATRIX_SIZE
    with precision(name, device):
        x = torch.randn(size, size, device=device)
        y = x.to(PRECISIONS[name] or x.dtype)
        seconds = interleave([lambda: y @ y], rounds=5, warmup=2, device=device)[0]
    return size**3 / min(seconds) / 1e9


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """Find the largest batch for which ``fits`` is true, to 1/8, by doubling and bisection; 0 if 1 does not fit."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, min(2 * high, limit + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_in_memory(make_run: Callable[[int], Callable[[], Any]]) -> Callable[[int], bool]:
    """Return a function that tells whether a run with some batch size fits in the GPU memory."""

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
