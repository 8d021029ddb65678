"""The training loss on validation images (TEST.VALIDATION_LOSS), which shows when a model begins to overfit."""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn


@torch.no_grad()
def mean_loss(model: nn.Module, loader: Iterable[list[dict[str, Any]]], num_samples: int) -> float:
    """Return the mean of the total loss over the samples of all processes, without dropout and batch statistics.

    Args:
        model: model that returns a dict of losses in training mode; its mode and weights do not change.
        loader: batches of one sample with ground truth; it has the same length in all processes.
        num_samples: number of samples over all processes; the repeated samples that make the lengths equal are not
            counted.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.training = True  # makes the model return losses; its submodules stay in evaluation mode
    world_size, total = comm.get_world_size(), 0.0
    try:
        for i, batch in enumerate(loader):
            loss = float(sum(model(batch).values()))
            if i * world_size + comm.get_rank() < num_samples:
                total += loss
    finally:
        for module, training in modes.items():
            module.training = training
    return sum(comm.all_gather(total)) / num_samples
