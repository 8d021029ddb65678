"""Part "speed": images per second, memory, and the share of the device's rate of matrix products."""

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch

from ..benchmark.filling import fill
from ..benchmark.measure import Run, count_operations, interleave, matrix_rate, measure_memory, precision
from ..benchmark.models import PEERS, Subject, build_subject
from .plan import Row, Setup, Step

PANOPTIC, INSTANCE = "coco/panoptic/knet_r50_fpn_1x.yaml", "coco/instance/knet_r50_fpn_1x.yaml"
MORE_MODELS = (
    "coco/panoptic/knet_r101_fpn_3x.yaml",
    "coco/panoptic/knet_swin_l_fpn_3x.yaml",
    "ade20k/semantic/knet_upernet_r50_80k.yaml",
)
# Time in seconds for the further measurements of a setting, after its first one
_SECONDS = 3.0


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        model: K-Net's config, or one of Detectron2's models (PEERS).
        train: a training step (with an update), or an inference.
        batch: number of images.
        precision: one of benchmark's PRECISIONS.
        channels_last: memory format of the weights and of the backbone's input; None: as the model does itself.
        compiled: whether backbone, static kernels and cascade are compiled.
    """

    model: str
    train: bool
    batch: int
    precision: str = "fp32"
    channels_last: bool | None = None
    compiled: bool = False


def settings(setup: Setup) -> list[Setting]:
    """Return what is measured, most important first, because the time may end."""
    half = ["bf16"] if setup.device.type == "cpu" else ["bf16", "fp16"]
    if not setup.size.is_full:
        models = [PANOPTIC, INSTANCE, *([] if setup.size.options else ["mask_rcnn"])]
        return [*(Setting(model, False, 1) for model in models), Setting(PANOPTIC, True, 2)]
    types = ["fp32", *(["tf32"] if setup.device.type == "cuda" else []), *half]
    best = half[0]
    models = [INSTANCE, "mask_rcnn", "cascade_mask_rcnn", *MORE_MODELS]
    important = [Setting(PANOPTIC, False, 1, name) for name in types]
    important += [Setting(model, False, 1, name) for model in models for name in ("fp32", best)]
    important += [Setting(PANOPTIC, True, batch, name) for batch in (2, 8, 16) for name in ("fp32", best)]
    compiled = [Setting(PANOPTIC, False, 1, best, compiled=True)]
    # The outer loops are those whose change is slow: compiling takes up to a minute, another memory format a new model
    grid = [
        Setting(PANOPTIC, False, batch, name, channels_last, compiled)
        for compiled, channels_last, name, batch in itertools.product((False, True), (False, True), types, (1, 4, 16))
    ]
    return list(dict.fromkeys([*important, *compiled, *grid]))


def steps(setup: Setup) -> Iterator[Step]:
    """Yield the settings. A model is kept until another one is measured."""
    subjects, rate = _Subjects(setup), cache(partial(matrix_rate, setup.device))
    for setting in settings(setup):
        yield Step(describe(setting), partial(measure, setup, setting, subjects, rate))


def describe(setting: Setting) -> str:
    """Return a setting in words, the model first."""
    format_name = {None: "", False: ", contiguous", True: ", channels_last"}[setting.channels_last]
    mode = "training" if setting.train else "inference"
    compiled = ", compiled" * setting.compiled
    return f"{setting.model}: {mode}, batch {setting.batch}, {setting.precision}{format_name}{compiled}"


class _Subjects:
    """Builds models, and keeps the last one and the operations that it needs per image."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._key: Any = None
        self._subject: Subject | None = None
        self._operations: dict[bool, float] = {}

    def get(self, setting: Setting) -> Subject:
        """Return a model with weights with which it finds something. One with another memory format is built anew."""
        key = setting.model, setting.channels_last, setting.compiled
        if key != self._key:
            self._subject, self._key, self._operations = None, None, {}
            gc.collect()
            if self._setup.device.type == "cuda":
                torch.cuda.empty_cache()
            self._subject = self._build(setting)
            self._key = key
        return self._subject

    def _build(self, setting: Setting) -> Subject:
        size = self._setup.size.image
        options = [] if setting.model in PEERS else ["MODEL.KNET.DROPOUT=0.0"]
        subject = build_subject(self._setup.spec(setting.model, *options), str(self._setup.device))
        subject.model.eval()
        with precision("fp32", self._setup.device):
            fill(subject, subject.inputs(size, 1, size))
        if setting.channels_last is not None:
            memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
            subject.model.to(memory_format=memory_format)
            subject.model.backbone.register_forward_pre_hook(
                lambda module, args: (args[0].contiguous(memory_format=memory_format), *args[1:])
            )
        return subject

    def operations(self, setting: Setting, subject: Subject) -> float:
        """Return the 10^9 multiply-adds per image, which are counted once per model and mode, before it is compiled."""
        if setting.train not in self._operations:
            size = self._setup.size.image
            run = Run(subject, subject.inputs(size, 1, size), train=setting.train)
            self._operations[setting.train] = count_operations(run)
            if setting.compiled:
                subject.compile()
        return self._operations[setting.train]


def measure(setup: Setup, setting: Setting, subjects: _Subjects, rate: Callable[[str], float]) -> list[Row]:
    """Measure one setting; rate: 10^9 multiply-adds per second of a large matrix product in a precision."""
    device, size = setup.device, setup.size.image
    subject = subjects.get(setting)
    operations = subjects.operations(setting, subject) * setting.batch
    run = Run(subject, subject.inputs(size, setting.batch, size), train=setting.train)
    with precision(setting.precision, device):
        run()  # also compiles
        (first,) = interleave([run], 1, 0, device)[0]
        rounds = max(1, min(setup.size.rounds, math.floor(_SECONDS / first)))
        seconds = median(interleave([run], rounds, 0, device)[0])
        memory = measure_memory(run, device)
    row = {
        **setting._asdict(),
        "mode": "training" if setting.train else "inference",
        "image": list(size),
        "seconds": seconds,
        "images_per_second": setting.batch / seconds,
        "peak_mib": memory.peak if memory else None,
        "share_of_matrix_rate": operations / seconds / rate(setting.precision),
    }
    return [row]
