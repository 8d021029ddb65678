"""The cascade of kernel update heads (paper, Fig. 3)."""

import torch
from detectron2.config import configurable
from torch import nn

from ..errors import ConfigError
from ..tasks import get_task
from .kernel_update import gather_group_features
from .precision import full_precision, no_autocast
from .structures import KernelState, NetworkOutput, StageOutput
from .update_head import KernelUpdateHead

# The paper tries up to 7; a typing error must not fill the memory
MOST_STAGES = 100


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
        task = get_task(cfg)
        if not task.min_stages <= knet.NUM_STAGES <= MOST_STAGES:
            raise ConfigError(
                f"MODEL.KNET.NUM_STAGES = {knet.NUM_STAGES}: use {task.min_stages} to {MOST_STAGES} for {task.name} "
                "segmentation."
            )
        return {
            "num_stages": knet.NUM_STAGES,
            "dim": dim,
            "num_classes": num_classes if task.has_class_branch else None,
            "soft_gather": task.soft_gather,
            "update_dim": head.FEATURE_DIM,
            "num_heads": head.NUM_HEADS,
            "ffn_dim": head.FFN_DIM,
            "kernel_update": head.KERNEL_UPDATE,
            "kernel_interaction": head.KERNEL_INTERACTION,
            "xavier_init": head.INIT == "xavier",
        }

    def forward(self, state: KernelState) -> list[StageOutput]:
        """The predictions of all stages, in order."""
        with no_autocast(state.feature):
            feature = full_precision(state.feature)
            kernels, mask_logits = full_precision(state.kernels), full_precision(state.mask_logits)
            outputs = []
            for stage in self.stages:
                outputs.append(stage(feature, kernels, mask_logits))
                kernels, mask_logits = outputs[-1].kernels, outputs[-1].mask_logits
        return outputs


def select_stage(output: NetworkOutput, stage: int) -> StageOutput:
    """Predictions of one stage: 0 the static kernels', 1 to S a stage's, -1 the last one's (MODEL.KNET.TEST.STAGE)."""
    number = stage % (len(output.stages) + 1)
    return output.stages[number - 1] if number else static_predictions(output.state)


def static_predictions(state: KernelState) -> StageOutput:
    """The static kernels as if they were a stage's output, to look at results from before the first update.

    They have no class branch: a kernel's probability of a class is the mean of the dense semantic probabilities over
    its mask; semantic kernels are their classes, so that there is nothing to score.
    """
    kernels, mask_logits = full_precision(state.kernels), full_precision(state.mask_logits)
    if state.semantic_logits is None:
        return StageOutput(kernels, mask_logits)
    with no_autocast(mask_logits):
        masks = (mask_logits > 0).to(mask_logits.dtype)
        sums = gather_group_features(masks, full_precision(state.semantic_logits).sigmoid())
        probs = sums / masks.sum(dim=(2, 3)).clamp(min=1).unsqueeze(-1)
    return StageOutput(kernels, mask_logits, torch.logit(probs, eps=1e-6))
