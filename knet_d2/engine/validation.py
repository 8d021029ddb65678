"""The training loss on validation images (TEST.VALIDATION_LOSS), to tell when a model begins to overfit."""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn


@torch.no_grad()
def mean_loss(model: nn.Module, loader: Iterable[list[dict[str, Any]]], num_samples: int) -> float:
    """The mean of a model's total loss over all samples of all processes, with dropout off and batch norm fixed.

    Args:
        model: gives a dict of losses in training mode; its mode and weights stay as they are.
        loader: batches of one sample with ground truth, as many for every process.
        num_samples: of all processes; what the loaders have beyond them, to be of one length, doesn't count.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.training = True  # of the whole, which then gives losses; its parts stay in evaluation mode
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
