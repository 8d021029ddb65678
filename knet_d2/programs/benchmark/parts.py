"""Measures the time and the memory of the parts of a model by wrapping their methods; and the time of its mapper."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from panopticapi.utils import id2rgb
from PIL import Image

from ...data.mapper import build_mapper
from .measure import Run, held_mib, interleave, peak_mib, reset_peak, synchronize
from .models import Subject
from .workload import draw_image

REST = "rest"
_PHOTO = (480, 640)


class PartTimer:
    """Measures calls by name.

    Attributes:
        seconds: their sums; the time of a timed call inside another one counts only for the inner one.
        peaks: the most MiB that were held during a call, with what is held from before; empty without ``has_peaks`` or
            if the device does not support it.

    Args:
        has_peaks: whether to measure the peaks. On a CPU this gives freed memory back at every call, which costs time
            when it is used again.
    """

    def __init__(self, device: torch.device, has_peaks: bool = False):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)
        self._has_peaks = has_peaks and held_mib(device) is not None
        self._inner = [0.0]
        self._peaks = [0.0]
        self._undo: list[Callable[[], None]] = []

    def measure(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function, and add its time to ``name``."""
        synchronize(self.device)
        self._begin_peak()
        self._peaks.append(0.0)
        self._inner.append(0.0)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize(self.device)
        total = time.perf_counter() - start
        self.seconds[name] += total - self._inner.pop()
        self._inner[-1] += total
        self._begin_peak()
        peak = self._peaks.pop()
        self._peaks[-1] = max(self._peaks[-1], peak)
        if self._has_peaks:
            self.peaks[name] = max(self.peaks[name], peak)
        return result

    def _begin_peak(self) -> None:
        """Give the call in progress the peak so far, and begin anew."""
        if self._has_peaks:
            self._peaks[-1] = max(self._peaks[-1], peak_mib(self.device))
            reset_peak(self.device)

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


def measure_parts(run: Run, device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Measure every part of a run; "rest" is what is outside of all parts.

    Returns:
        The median seconds, and the peaks in MiB above what is held before the run (empty if the device does not support
        it), which are measured in one more run.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, seconds in _measure_once(run, PartTimer(device)).seconds.items():
            samples[name].append(seconds)
    held = held_mib(device) or 0.0
    peaks = _measure_once(run, PartTimer(device, has_peaks=True)).peaks
    return {name: median(x) for name, x in samples.items()}, {name: peak - held for name, peak in peaks.items()}


def _measure_once(run: Run, timer: PartTimer) -> PartTimer:
    """Measure every part of one run with this timer."""
    for owner, method, name in timed_methods(run.subject):
        timer.wrap(owner, method, name)
    try:
        timer.measure(REST, run, timer.measure)
    finally:
        timer.unwrap()
    return timer


def mapper_seconds(cfg: CfgNode, rounds: int) -> float:
    """Return the median seconds for reading and augmenting one training image of COCO's size with a panoptic PNG."""
    mapper = build_mapper(cfg, is_train=True)
    with tempfile.TemporaryDirectory() as folder:
        record = _write_example(cfg, Path(folder))
        return median(interleave([lambda: mapper(record)], rounds, 1, torch.device("cpu"))[0])


def _write_example(cfg: CfgNode, folder: Path) -> dict[str, Any]:
    """Write an image and its panoptic PNG; returns their record in the format of a registered data set."""
    x = draw_image(_PHOTO, seed=0)
    knet, ids, segments = cfg.MODEL.KNET, x.stuff.numpy() + 1, []
    for number in np.unique(ids[ids > 0]).tolist():
        if knet.STUFF_CATEGORY_IDS:
            segments.append({"id": number, "category_id": knet.STUFF_CATEGORY_IDS[number - 1], "isthing": False})
        else:
            ids[ids == number] = 0  # an instance model has no stuff
    for number, (mask, label) in enumerate(zip(x.masks.numpy(), x.classes.tolist()), start=256):
        if (ids[mask] != number).any():
            ids[mask] = number
            segments.append({"id": number, "category_id": knet.THING_CATEGORY_IDS[label], "isthing": True})
    image_file, panoptic_file = str(folder / "image.jpg"), str(folder / "panoptic.png")
    Image.fromarray(x.image.permute(1, 2, 0).numpy()).save(image_file)
    Image.fromarray(id2rgb(ids)).save(panoptic_file)
    record = {"file_name": image_file, "image_id": 0, "height": _PHOTO[0], "width": _PHOTO[1]}
    return {**record, "pan_seg_file_name": panoptic_file, "segments_info": segments}
