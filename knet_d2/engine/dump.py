"""The batch of a training step as a file, to repeat the step.

A training that stops at losses that are not finite leaves a folder with config.yaml, model.pth (the state before the
step: weights, optimiser, iteration) and the batch of every process, batch_rank<r>.pth.
"""

import os
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances

from ..checkpoint import load_file, write_atomically
from ..errors import DataError, KNetError
from ..modeling.targets import instance_masks

Batch = list[dict[str, Any]]


def batch_file(folder: str, rank: int) -> str:
    """Where the batch of a process is in the folder."""
    return os.path.join(folder, f"batch_rank{rank}.pth")


def save_batch(path: str, batch: Batch) -> None:
    """Write training examples as tensors, numbers and strings, which can be read without running code."""
    write_atomically(path, lambda f: torch.save([_as_plain(sample) for sample in batch], f))


def load_batch(path: str) -> Batch:
    """The training examples that :func:`save_batch` wrote.

    Raises:
        CheckpointError, DataError: the file is missing, damaged or something else.
    """
    try:
        return [_from_plain(sample) for sample in load_file(path)]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, KNetError):
            raise
        raise DataError(f"{path}: holds no training batch ({error!r}).") from error


def _as_plain(sample: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in sample.items() if isinstance(value, (torch.Tensor, str, int, float))}
    if "instances" in sample:
        instances = sample["instances"]
        plain["gt_classes"], plain["gt_masks"] = instances.gt_classes, instance_masks(instances)
    return plain


def _from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    sample = dict(plain)
    if "gt_classes" in sample:
        masks = sample.pop("gt_masks")
        classes = sample.pop("gt_classes")
        sample["instances"] = Instances(tuple(masks.shape[1:]), gt_classes=classes, gt_masks=BitMasks(masks))
    return sample
