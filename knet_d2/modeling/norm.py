"""Batch norm as K-Net's models use it: in eval mode with trainable affine weights, or synchronised."""

from collections.abc import Callable

from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import distributed, nn


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always normalises with its running statistics and never changes them.

    Unlike Detectron2's FrozenBatchNorm2d its affine weights are parameters, so they train.
    """

    def __init__(self, num_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.eval()

    def train(self, mode: bool = True) -> "EvalBatchNorm2d":
        """Stays in eval mode, whatever mode the model is in."""
        return super().train(False)


def sync_batch_norm(num_features: int) -> nn.Module:
    """Batch norm over all processes; plain batch norm where there is only one.

    torch.nn.SyncBatchNorm refuses tensors on a CPU, so it is used with NCCL only. All three kinds have the
    same state dict, so a checkpoint of one loads into the others.
    """
    if comm.get_world_size() == 1:
        return nn.BatchNorm2d(num_features)
    if distributed.get_backend() == "nccl":
        return nn.SyncBatchNorm(num_features)
    return NaiveSyncBatchNorm(num_features)


def resolve_norm(name: str) -> str | Callable[[int], nn.Module]:
    """The ``norm`` argument of Detectron2's layers for a name in a config.

    Adds "EvalBN" to Detectron2's names and makes "SyncBN" work on any number of processes and any device.
    """
    return {"EvalBN": EvalBatchNorm2d, "SyncBN": sync_batch_norm}.get(name, name)
