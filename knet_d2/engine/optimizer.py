"""Builds the optimiser, gradient clipping and learning rate schedule from the SOLVER section of the config."""

import logging
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

from ..errors import CheckpointError, ConfigError
from ..modeling.backbone.necks import DeformableAttention
from ..modeling.backbone.timm import TimmBackbone

logger = logging.getLogger(__name__)

# Position embeddings have the weight decay of norms, as in the official Swin configs.
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")
# Factor on the learning rate of what gives the sampling offsets of deformable attention (arXiv:2010.04159, Sec. 5.1)
_OFFSETS_MULTIPLIER = 0.1


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser SOLVER.OPTIMIZER for the groups of :func:`parameter_groups`."""
    solver = cfg.SOLVER
    names = {id(p): name for name, p in model.named_parameters()}
    # Names, by which a resumed run finds the state of each parameter
    groups = [{**x, "params": [(names[id(p)], p) for p in x["params"]]} for x in parameter_groups(cfg, model)]
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
    for weights). The learning rate of the backbone, without its feature pyramid, is multiplied by BACKBONE_MULTIPLIER,
    and that of a layer of a timm network by LAYER_DECAY to the power of its distance from the network's end: 1 for the
    last block, one more for each block before it, and most for the stem. Sampling offsets of deformable attention learn
    at a tenth of the rate.
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
    slowed = {id(p): solver.BACKBONE_MULTIPLIER for p in backbone.parameters()} if backbone is not None else {}
    is_timm = isinstance(backbone, TimmBackbone)
    if is_timm:
        slowed = {p: factor * slowed[p] for p, factor in _layer_factors(backbone, solver.LAYER_DECAY).items()}
    elif solver.LAYER_DECAY != 1.0:
        raise ConfigError(
            f"SOLVER.LAYER_DECAY = {solver.LAYER_DECAY}: only backbones of timm have layers. Set it to 1."
        )
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            slowed.update({id(p): _OFFSETS_MULTIPLIER for p in module.sampling_offsets.parameters()})
    undecayed = {id(backbone.get_parameter(name)) for name in backbone.undecayed_parameters()} if is_timm else set()
    # Split the groups into one per parameter, and merge those with equal settings again.
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    for group in single:
        parameter = id(group["params"][0])
        group["lr"] *= slowed.get(parameter, 1.0)
        if parameter in undecayed:
            group["weight_decay"] = solver.WEIGHT_DECAY_NORM
    return reduce_param_groups(single)


def _layer_factors(backbone: TimmBackbone, decay: float) -> dict[int, float]:
    """Factor on the learning rate of each parameter, by its id."""
    if not 0 < decay <= 1:
        raise ConfigError(f"SOLVER.LAYER_DECAY = {decay}: use a factor above 0, 1 at most.")
    layers = backbone.parameter_layers()
    count = max(layers.values()) + 1
    return {id(backbone.get_parameter(name)): decay ** (count - layer) for name, layer in layers.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue with the state of each parameter, but the learning rates and weight decays that ``optimizer`` has.

    Args:
        state: of an optimiser whose parameters may be grouped otherwise.

    Raises:
        CheckpointError: it is of an optimiser of another kind, or of other parameters.
    """
    own, groups = optimizer.state_dict(), state["param_groups"]
    if any(("betas" in group) != ("betas" in own["param_groups"][0]) for group in groups):
        kinds = ("ADAMW", "SGD") if "betas" in groups[0] else ("SGD", "ADAMW")
        raise CheckpointError(
            f"SOLVER.OPTIMIZER = {kinds[1]!r}: the run was trained with {kinds[0]!r} so far. Set it back, or start "
            "from its checkpoint by MODEL.WEIGHTS and without --resume."
        )
    if all("param_names" in group for group in [*groups, *own["param_groups"]]):
        index, saved = _by_name(own["param_groups"]), _by_name(groups)
    elif [len(group["params"]) for group in groups] == [len(group["params"]) for group in own["param_groups"]]:
        index, saved = _by_position(own["param_groups"]), _by_position(groups)
    else:  # of an earlier version, which kept no names
        raise CheckpointError(
            "The optimiser's parameters are grouped otherwise than in the run so far. Set the options of SOLVER and "
            "MODEL.BACKBONE.FREEZE_AT back, or start from its checkpoint by MODEL.WEIGHTS and without --resume."
        )
    if index.keys() != saved.keys():
        name = sorted(index.keys() ^ saved.keys())[0]
        now, before = ("is", "was not") if name in index else ("is not", "was")
        raise CheckpointError(
            f"{name} {now} trained now, but {before} in the run so far. Set MODEL.BACKBONE.FREEZE_AT back, or start "
            "from its checkpoint by MODEL.WEIGHTS and without --resume."
        )
    values = {index[key]: state["state"][i] for key, i in saved.items() if i in state["state"]}
    optimizer.load_state_dict({"state": values, "param_groups": own["param_groups"]})


def _by_name(groups: Sequence[dict[str, Any]]) -> dict[Any, int]:
    """Index in an optimiser's state of each parameter of its groups."""
    return {name: i for group in groups for name, i in zip(group["param_names"], group["params"], strict=True)}


def _by_position(groups: Sequence[dict[str, Any]]) -> dict[Any, int]:
    return dict(enumerate(i for group in groups for i in group["params"]))


def restart_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer) -> None:
    """Let a restored schedule use the optimiser's base learning rates instead of the restored ones."""
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate


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
    if solver.WARMUP_ITERS > solver.MAX_ITER / 2:
        logger.warning(
            "SOLVER.WARMUP_ITERS = %d, SOLVER.MAX_ITER = %d: the learning rate stays far below SOLVER.BASE_LR. Use a "
            "tenth of the iterations for warm-up.",
            *(solver.WARMUP_ITERS, solver.MAX_ITER),
        )
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
