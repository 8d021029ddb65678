"""The cascade of kernel update heads (paper, Fig. 3)."""

from typing import List

from detectron2.config import configurable
from torch import nn

from ..errors import ConfigError
from ..structures import KernelState, StageOutput
from .precision import full_precision, no_autocast
from .update_head import KernelUpdateHead


class KernelUpdateCascade(nn.Module):
    """S kernel update heads, each refining the kernels and masks of the one before.

    It runs in float32 (or float64) also under autocast: it sums over pixels, and costs little.
    """

    @configurable
    def __init__(self, *, num_stages: int, **head_arguments):
        """
        Args:
            num_stages: S.
            head_arguments: arguments of every :class:`KernelUpdateHead`.
        """
        super().__init__()
        self.stages = nn.ModuleList(KernelUpdateHead(**head_arguments) for _ in range(num_stages))

    @classmethod
    def from_config(cls, cfg, num_classes: int):
        knet, head = cfg.MODEL.KNET, cfg.MODEL.KNET.UPDATE_HEAD
        dim = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        for key, value in (("FEATURE_DIM", head.FEATURE_DIM), ("NUM_HEADS", head.NUM_HEADS)):
            if value < 1 or dim % value:
                raise ConfigError(
                    f"MODEL.KNET.UPDATE_HEAD.{key} = {value} does not divide MODEL.SEM_SEG_HEAD.CONVS_DIM = {dim}."
                )
        if head.INIT not in ("xavier", "default"):
            raise ConfigError(f"MODEL.KNET.UPDATE_HEAD.INIT = {head.INIT!r}: use 'xavier' or 'default'.")
        semantic = knet.TASK == "semantic"
        return {
            "num_stages": knet.NUM_STAGES,
            "dim": dim,
            "num_classes": None if semantic else num_classes,
            "soft_gather": semantic,
            "update_dim": head.FEATURE_DIM,
            "num_heads": head.NUM_HEADS,
            "ffn_dim": head.FFN_DIM,
            "kernel_update": head.KERNEL_UPDATE,
            "kernel_interaction": head.KERNEL_INTERACTION,
            "xavier_init": head.INIT == "xavier",
        }

    def forward(self, state: KernelState) -> List[StageOutput]:
        """The predictions of all stages, in order."""
        with no_autocast(state.feature):
            feature = full_precision(state.feature)
            kernels, mask_logits = full_precision(state.kernels), full_precision(state.mask_logits)
            outputs = []
            for stage in self.stages:
                outputs.append(stage(feature, kernels, mask_logits))
                kernels, mask_logits = outputs[-1].kernels, outputs[-1].mask_logits
        return outputs
