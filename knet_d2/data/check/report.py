"""The results of a check of data sets, as text and as JSON."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tabulate import tabulate

from ...tasks import Task
from ..coco_mending import MISSING_IMAGE
from ..pixels import PixelFormat
from ..split import Part
from .faults import ERROR, KINDS, Fault, counted
from .images import ImageFacts


class Use(NamedTuple):
    """What a data set is used for.

    Attributes:
        is_training: whether the model is trained on it.
        task: task of the model.
        num_kernels: number of the model's instance kernels.
        pixel_format: format of the images that the model takes.
        part: part of the images that is used; None for all.
    """

    is_training: bool
    task: Task
    num_kernels: int
    pixel_format: PixelFormat
    part: Part | None = None


@dataclass
class DatasetReport:
    """The results of one data set.

    Attributes:
        name: name of the data set, as registered.
        faults: all faults.
        num_images: number of images that the data set lists.
        table: counts of objects or pixels, one row per class.
        summary: other counts, in words.
        images: facts about each image, by path.
    """

    name: str
    faults: list[Fault]
    num_images: int = 0
    table: list[dict[str, Any]] = field(default_factory=list)
    summary: str = ""
    images: dict[str, ImageFacts] = field(default_factory=dict)

    def text(self) -> str:
        title = f"{self.name}: {counted(self.num_images, 'image')}" + (f", {self.summary}" if self.summary else "")
        return f"{title}\n{tabulate(self.table, headers='keys', tablefmt='simple', floatfmt='.2f')}"


@dataclass
class Report:
    """The results of all data sets of a config.

    Attributes:
        datasets: the results of each data set.
        faults: all faults, each one once: faults of a single data set, then faults between data sets.
    """

    datasets: list[DatasetReport]
    faults: list[Fault]

    @property
    def failed(self) -> bool:
        """Whether there is an error: training or evaluation would fail or be wrong."""
        return any(fault.level == ERROR for fault in self.faults)

    @property
    def failed_when_fixed(self) -> bool:
        """Whether there is an error besides missing images, which ``knet check --fix`` leaves out."""
        errors = (fault for fault in self.faults if fault.level == ERROR)
        return any(fault.kind != "missing image" and MISSING_IMAGE not in fault.what for fault in errors)

    def text(self, most: int = 10) -> str:
        """Return the counts, then the faults by kind, errors first.

        Args:
            most: largest number of faults of one kind to list; of the others only the number is stated.
        """
        parts = [dataset.text() for dataset in self.datasets]
        by_kind: dict[str, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            by_kind[fault.kind].append(fault)
        for kind, faults in sorted(by_kind.items(), key=lambda item: KINDS[item[0]].level):
            lines = [f"{faults[0].level}: {kind} ({len(faults)}). {KINDS[kind].advice}"]
            lines += [f"  {fault}" for fault in faults[:most]]
            if len(faults) > most:
                lines.append(f"  ... and {len(faults) - most} more")
            parts.append("\n".join(lines))
        errors = sum(fault.level == ERROR for fault in self.faults)
        parts.append(f"{counted(errors, 'error')}, {counted(len(self.faults) - errors, 'warning')}.")
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return all results as dicts and lists, for other programs."""
        return {
            "datasets": [
                {"name": x.name, "images": x.num_images, "summary": x.summary, "classes": x.table}
                for x in self.datasets
            ],
            "faults": [{"level": x.level, **x._asdict(), "advice": KINDS[x.kind].advice} for x in self.faults],
        }
