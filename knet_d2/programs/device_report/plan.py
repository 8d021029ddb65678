"""What the parts of the report have in common: sizes, steps and rows."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A line of a table: {column: value}. "passed" is False if an equality is out of tolerance.
Row = dict[str, Any]


class Step(NamedTuple):
    """A piece of work of a part. If it fails, the other steps still run.

    Attributes:
        name: what it does.
        run: returns its rows.
    """

    name: str
    run: Callable[[], list[Row]]


class Size(NamedTuple):
    """How much work a report is.

    Attributes:
        options: config options (KEY=VALUE) that make models small.
        image: (height, width) of images for speed and profile.
        compared_image: (height, width) of images for equality.
        exported: tasks whose models are exported, which takes about a minute each.
        recordings: reference files that equality compares; none: all.
        is_full: whether speed measures all models, batches and precisions.
        iterations: length of each training run.
        num_train, num_val: number of images to train and evaluate on.
        train_side, train_batch: side of these images, and number of images in a batch.
        rounds: number of measurements of each speed.
    """

    options: tuple[str, ...]
    image: tuple[int, int]
    compared_image: tuple[int, int]
    exported: tuple[str, ...]
    recordings: tuple[str, ...]
    is_full: bool
    iterations: int
    num_train: int
    num_val: int
    train_side: int
    train_batch: int
    rounds: int


_SMALL_MODELS = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS=8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS=16",
    "MODEL.RESNETS.WIDTH_PER_GROUP=4",
)
# Two inferences and a training step
_SOME_RECORDINGS = ("ref_pan_r50_c", "ref_seg_uper_swint_b", "train_pan_r50_two")
SIZES = {
    "tiny": Size(_SMALL_MODELS, (64, 96), (64, 96), ("semantic",), ("ref_pan_r50_c",), False, 4, 8, 4, 64, 2, 1),
    "small": Size((), (320, 480), (128, 192), ("semantic",), _SOME_RECORDINGS, False, 20, 50, 10, 128, 4, 3),
    "full": Size(
        (), (800, 1216), (256, 384), ("panoptic", "instance", "semantic"), (), True, 150, 1000, 100, 128, 8, 10
    ),
}


class Setup(NamedTuple):
    """What a part gets.

    Attributes:
        device: the device that is reported on.
        size: how much is done.
        folder: a temporary folder.
    """

    device: torch.device
    size: Size
    folder: Path

    def spec(self, name: str, *options: str) -> str:
        """Return the name of a model with the options of the size, as build_subject reads it."""
        return ",".join([name, *self.size.options, *options])


Steps = Callable[[Setup], Iterable[Step]]
