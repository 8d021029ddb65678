"""Measures the time of the parts of a model by wrapping their methods."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .measure import Run, median, synchronize
from .models import Subject

REST = "rest"


class PartTimer:
    """Sums the seconds of calls by name. The time of a timed call inside another one counts only for the inner one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._undo: list[Callable[[], None]] = []

    def measure(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function, and add its time to ``name``."""
        synchronize(self.device)
        self._inner.append(0.0)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize(self.device)
        total = time.perf_counter() - start
        self.seconds[name] += total - self._inner.pop()
        self._inner[-1] += total
        return result

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Measure a method of an object until :meth:`unwrap`."""
        original = getattr(owner, attribute)
        setattr(owner, attribute, lambda *args, **kwargs: self.measure(name, original, *args, **kwargs))
        self._undo.append(lambda: delattr(owner, attribute))

    def unwrap(self) -> None:
        """Undo all calls of :meth:`wrap`."""
        while self._undo:
            self._undo.pop()()


def timed_methods(subject: Subject) -> list[tuple[Any, str, str]]:
    """Return the parts of a model as (owner, method, name)."""
    model = subject.model
    methods = [(model.backbone, "forward", "backbone")]
    if subject.is_knet:
        methods += [(model, "preprocess_image", "preprocessing"), (model.sem_seg_head, "forward", "static kernels")]
        methods += [(stage, "forward", f"stage {i}") for i, stage in enumerate(model.cascade.stages, start=1)]
        methods += [(model, "prepare_targets", "targets"), (model.criterion, "forward", "losses")]
        methods += [(model.criterion.matcher, "match", "matching"), (model.postprocessor, "forward", "post-processing")]
        if model.auxiliary_head is not None:
            methods.append((model.auxiliary_head, "forward", "auxiliary head"))
        return methods
    names = {"proposal_generator": "proposals", "roi_heads": "RoI heads", "sem_seg_head": "semantic head"}
    return methods + [(getattr(model, x), "forward", name) for x, name in names.items() if hasattr(model, x)]


def time_parts(run: Run, device: torch.device, repeats: int) -> dict[str, float]:
    """Measure the median seconds of every part of a run; "rest" is the time outside all parts."""
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        timer = PartTimer(device)
        for owner, method, name in timed_methods(run.subject):
            timer.wrap(owner, method, name)
        try:
            timer.measure(REST, run, timer.measure)
        finally:
            timer.unwrap()
        for name, seconds in timer.seconds.items():
            samples[name].append(seconds)
    return {name: median(values) for name, values in samples.items()}
