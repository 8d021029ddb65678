"""Part "profile": what a training step and an inference launch and copy, and where they make the processor wait."""

import inspect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ..benchmark.filling import fill
from ..benchmark.measure import Run
from ..benchmark.models import build_subject
from .plan import Row, Setup, Step
from .speed import PANOPTIC

NUM_WAITS = 5
_PACKAGE = Path(__file__).resolve().parents[2]
# Operators whose result has a shape or value that the processor needs before it continues
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Wait(NamedTuple):
    """One wait: operator, seconds, and the innermost line of knet_d2 that led to it."""

    operator: str
    seconds: float
    line: str


def steps(setup: Setup) -> Iterator[Step]:
    """Yield the profile of a training step and of an inference."""
    batch = 8 if setup.size.is_full else 2
    yield Step("training step", partial(_profile, setup, "training step", batch, train=True))
    yield Step("inference", partial(_profile, setup, "inference", 1, train=False))


def _profile(setup: Setup, name: str, batch: int, *, train: bool) -> list[Row]:
    size = setup.size.image
    subject = build_subject(setup.spec(PANOPTIC, "MODEL.KNET.DROPOUT=0.0"), str(setup.device))
    subject.model.eval()
    fill(subject, subject.inputs(size, 1, size))
    run = Run(subject, subject.inputs(size, batch, size), train=train)
    run()  # fills caches, and lets the device choose its convolution algorithms
    counts: Row = {"run": f"{name}, batch {batch}", **count_events(run, setup.device)}
    with WaitRecorder(setup.device) as recorder:
        run()
    counts["waits"] = len(recorder.waits)
    return [counts, *({"run": counts["run"], **row} for row in longest(recorder.waits))]


def count_events(run: Callable[[], Any], device: torch.device) -> Row:
    """Count what the profiler sees in a run; where it sees no device (CPU, MPS), operators only."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
    events = profiler.events()
    on_device = [event.name for event in events if event.device_type == DeviceType.CUDA]
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    counts: Row = {"operators": sum(_is_outermost_operator(event) for event in on_cpu)}
    if device.type == "cuda":
        counts.update(device_counts(on_device, [event.name for event in on_cpu]))
    return counts


def _is_outermost_operator(event: Any) -> bool:
    parent = event.cpu_parent
    return event.name.startswith("aten::") and not (parent is not None and parent.name.startswith("aten::"))


def device_counts(on_device: Iterable[str], on_cpu: Iterable[str]) -> Row:
    """Count kernels, copies and synchronisations.

    Args:
        on_device: names of what ran on the device.
        on_cpu: names of what ran on the processor, calls of the CUDA runtime among them.
    """
    copies = Counter(name[len("Memcpy ") :][:4] for name in on_device if name.startswith("Memcpy "))
    calls = Counter(on_cpu)
    return {
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
        "copies to device": copies["HtoD"],
        "copies to host": copies["DtoH"],
        "synchronisations": sum(calls[name] for name in _SYNCHRONISATIONS),
    }


class WaitRecorder(TorchDispatchMode):
    """Collects the operators for which the processor waits, with their source lines.

    On a CPU nothing waits; there the operators are collected that would wait if the tensors were on a device.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device_type = device.type
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        name = func.overloadpacket.__name__
        inputs = [x for x in _flat(args) if isinstance(x, torch.Tensor)]
        if any(x.device.type == self._device_type for x in inputs) and self._waits(name, inputs, result):
            line = source_line()
            # On a CPU, a line that is not of knet_d2 is the optimiser's, whose step counters are always on the CPU
            if line is not None or self._device_type != "cpu":
                self.waits.append(Wait(name, seconds, line or "backward pass or optimiser"))
        return result

    def _waits(self, name: str, inputs: list[torch.Tensor], result: Any) -> bool:
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in inputs[1:])
        to_host = isinstance(result, torch.Tensor) and result.device.type == "cpu" != self._device_type
        return name in _WAITING or by_mask or to_host


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def source_line() -> str | None:
    """Return the innermost line of knet_d2, outside of this program, that is being executed; None if none is."""
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "programs"):
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def longest(waits: Iterable[Wait]) -> list[Row]:
    """Sum the waits of each line and operator; returns the NUM_WAITS longest sums."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for wait in waits:
        groups[wait.line, wait.operator].append(wait.seconds)
    found = sorted(groups.items(), key=lambda item: -sum(item[1]))[:NUM_WAITS]
    return [
        {"line": line, "operator": operator, "times": len(seconds), "milliseconds": 1000 * sum(seconds)}
        for (line, operator), seconds in found
    ]
