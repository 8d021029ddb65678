"""Optimiser, gradient clipping and learning rate schedule, as the SOLVER section of the config says."""

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

# Parameters that are positions and not weights: they decay as norms do.
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser SOLVER.OPTIMIZER over the groups of :func:`parameter_groups`."""
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
    """Trainable parameters grouped by learning rate and weight decay.

    Norms and position tables decay by WEIGHT_DECAY_NORM, biases by WEIGHT_DECAY_BIAS (None: as weights). The
    learning rate of the backbone proper, without a feature pyramid on it, is multiplied by BACKBONE_MULTIPLIER.
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
    # one group per parameter, merged again by their new settings
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    for group in single:
        if id(group["params"][0]) in slowed:
            group["lr"] *= solver.BACKBONE_MULTIPLIER
    return reduce_param_groups(single)


def build_gradient_clipper(cfg: CfgNode) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """A function that clips gradients in place and returns their total 2-norm before it.

    CLIP_TYPE "full_model" scales all gradients by one factor such that the norm of all together is at most
    CLIP_VALUE; "norm" does so for each parameter alone; "value" limits each element.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    kind = clip.CLIP_TYPE if clip.ENABLED else None
    if kind not in (None, "full_model", "norm", "value"):
        raise ConfigError(f'SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "{kind}": use "full_model", "norm" or "value".')

    def clip_gradients(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        if kind == "full_model" and clip.NORM_TYPE == 2.0:
            return nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE)
        total = nn.utils.clip_grad_norm_(parameters, math.inf)  # a limit that changes nothing
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
    """Detectron2's schedules by SOLVER.LR_SCHEDULER_NAME, and "WarmupPolyLR" (power SOLVER.POLY_LR_POWER)."""
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
