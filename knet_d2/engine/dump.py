"""Writes and reads the batch of a training step, so that the step can be repeated.

When a training run stops because a loss is not finite, it writes a folder with config.yaml, model.pth (weights,
optimiser state and iteration before the step) and one batch_rank<r>.pth per process.
"""

import os
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances

from ..checkpoint import load_file, write_atomically
from ..data.ground_truth import GroundTruth, instance_masks
from ..errors import DataError, KNetError

Batch = list[dict[str, Any]]


def batch_file(folder: str, rank: int) -> str:
    """Return the path of a process's batch in the folder."""
    return os.path.join(folder, f"batch_rank{rank}.pth")


def save_batch(path: str, batch: Batch) -> None:
    """Write training examples as tensors, numbers and strings, because reading these can't run code."""
    write_atomically(path, lambda f: torch.save([_as_plain(sample) for sample in batch], f))


def load_batch(path: str) -> Batch:
    """Read the training examples that :func:`save_batch` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
        DataError: the file does not contain a training batch.
    """
    try:
        return [_from_plain(sample) for sample in load_file(path)]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, KNetError):
            raise
        raise DataError(
            f"{path}: does not contain a training batch ({error!r}). Name a folder that a training run wrote."
        ) from error


def _as_plain(sample: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        key: value for key, value in sample.items() if isinstance(value, (torch.Tensor, str, int, float))
    }
    if "reference" in sample:
        plain["reference"] = _as_plain(sample["reference"])
    if "ground_truth" in sample:
        plain["ground_truth"] = sample["ground_truth"]._asdict()
    if "instances" in sample:
        instances = sample["instances"]
        plain["gt_classes"], plain["gt_masks"] = instances.gt_classes, instance_masks(instances)
    return plain


def _from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    sample = dict(plain)
    if "reference" in sample:
        sample["reference"] = _from_plain(sample["reference"])
    if "ground_truth" in sample:
        sample["ground_truth"] = GroundTruth(**sample["ground_truth"])
    if "gt_classes" in sample:
        masks = sample.pop("gt_masks")
        classes = sample.pop("gt_classes")
        sample["instances"] = Instances(tuple(masks.shape[1:]), gt_classes=classes, gt_masks=BitMasks(masks))
    return sample
