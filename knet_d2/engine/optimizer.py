"""Builds the optimiser, gradient clipping and learning rate schedule from the SOLVER section of the config."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, get_default_optimizer_params
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import reduce_param_groups
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn

from ..errors import ConfigError

# Position embeddings have the weight decay of norms, as in the official Swin configs.
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser SOLVER.OPTIMIZER for the groups of :func:`parameter_groups`."""
    solver = cfg.SOLVER
    groups = parameter_groups(cfg, model)
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
        )
    raise ConfigError(f'SOLVER.OPTIMIZER = "{solver.OPTIMIZER}": use "ADAMW" or "SGD".')


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    The weight decay of norms and position embeddings is WEIGHT_DECAY_NORM, that of biases WEIGHT_DECAY_BIAS (None: as
    for weights). The learning rate of the backbone, without its feature pyramid, is multiplied by
    BACKBONE_MULTIPLIER.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={name: {"weight_decay": solver.WEIGHT_DECAY_NORM} for name in _POSITION_TABLES},
    )
    backbone = getattr(model, "backbone", None)
    backbone = getattr(backbone, "bottom_up", backbone)
    slowed = {id(p) for p in backbone.parameters()} if backbone is not None else set()
    # Split the groups into one per parameter, and merge those with equal settings again.
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    for group in single:
        if id(group["params"][0]) in slowed:
            group["lr"] *= solver.BACKBONE_MULTIPLIER
    return reduce_param_groups(single)


def build_gradient_clipper(cfg: CfgNode) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Build a function that clips gradients in place and returns their total 2-norm before clipping.

    CLIP_TYPE "full_model" scales all gradients by one factor so that their total norm is at most CLIP_VALUE. "norm"
    does the same for each parameter separately. "value" limits each element.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    kind = clip.CLIP_TYPE if clip.ENABLED else None
    if kind not in (None, "full_model", "norm", "value"):
        raise ConfigError(f'SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "{kind}": use "full_model", "norm" or "value".')

    def clip_gradients(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        if kind == "full_model" and clip.NORM_TYPE == 2.0:
            return nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE)
        total = nn.utils.clip_grad_norm_(parameters, math.inf)  # only measures the norm
        if kind == "full_model":
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
        elif kind == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
        elif kind == "value":
            nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
        return total

    return clip_gradients


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Build SOLVER.LR_SCHEDULER_NAME: a schedule of Detectron2, or "WarmupPolyLR" with power SOLVER.POLY_LR_POWER."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        multiplier = WarmupParamScheduler(
            PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER),
            solver.WARMUP_FACTOR,
            min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
            solver.WARMUP_METHOD,
        )
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)
    try:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    except ValueError as e:
        raise ConfigError(f"SOLVER.LR_SCHEDULER_NAME or WARMUP_METHOD: {e}") from e
