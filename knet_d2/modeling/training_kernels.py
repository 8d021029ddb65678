"""Groups of kernels that exist in training only, beside the model's own: more positives for the same cascade.

Few of a model's kernels have an instance to learn from. These groups go through the same cascade, which each group
passes alone, so that the model's own kernels, and their losses, do not depend on them:

* denoising kernels start from the noised mask of an instance, which they have to restore (Mask DINO, arXiv:2206.02777,
  Sec. 3.4). They are not matched;
* one-to-many kernels are learned ones, of which several are matched to each instance (H-DETR, arXiv:2207.13080).

An evaluated or exported model computes none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from ..tasks import KernelBank
from .cascade import KernelUpdateCascade, gather_group_features
from .layers import full_precision, no_autocast
from .sampled_points import generator_of, seed_of
from .static_kernels.semantic_fpn import LearnedKernels
from .structures import KernelState, Targets, TrainingGroup
from .targets import own_cells

# Names the draws of noise among those of an image's seed; points have two numbers, of which the first is a stage
NOISE_KEY = (0, 0, 1)
# Group number of kernels that only fill a batch up
PADDING = -1


class DenoisingKernels(nn.Module):
    """Kernels that start from the noised masks of instances, one each: K_0 = a learned vector + F under that mask.

    The instances of an image are repeated, with other noise, as often as there are kernels for all of them. Of more
    instances than kernels, some are drawn. In the interaction, a kernel sees those of the same repetition.
    """

    def __init__(self, dim: int, num_kernels: int, noise: float, weight: float):
        """
        Args:
            dim: C.
            num_kernels: the most of an image.
            noise: see :func:`noised_masks`.
            weight: factor on the losses.
        """
        super().__init__()
        self.num_kernels, self.noise, self.weight = num_kernels, noise, weight
        self.start = nn.Parameter(torch.randn(dim))

    def forward(self, cascade: KernelUpdateCascade, state: KernelState, targets: Sequence[Targets]) -> TrainingGroup:
        """The predictions for a batch; n is the largest number of an image, and at least 1."""
        feature = full_precision(state.feature)
        masks, repetitions, instances = zip(*(self._start(target, feature) for target in targets))
        length = max(1, *map(len, instances))
        mask_weights = torch.stack([F.pad(x, (0, 0, 0, 0, 0, length - len(x))) for x in masks])
        groups = torch.stack([F.pad(x, (0, length - len(x)), value=PADDING) for x in repetitions])
        kernels = self.start + gather_group_features(mask_weights, feature)
        noised = KernelState(feature, kernels, 2 * mask_weights - 1, pyramid_feature=state.pyramid_feature)
        stages = cascade(noised, visible=groups[:, :, None] == groups[:, None, :])
        return TrainingGroup("dn", noised, stages, self.weight, instances=list(instances))

    @torch.no_grad()
    def _start(self, target: Targets, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The m kernels of an image: noised masks, 0 and 1, [m, H, W]; repetitions and instances, int64 [m] each."""
        count = len(target.classes)
        generator = generator_of(seed_of(target), feature.device, *NOISE_KEY)
        if count > self.num_kernels:
            instances = torch.randperm(count, generator=generator, device=feature.device)[: self.num_kernels]
        else:
            instances = torch.arange(count, device=feature.device).repeat(self.num_kernels // max(count, 1))
        # float32, so that models of other types draw the same numbers
        draws = 2 * torch.rand(len(instances), 4, generator=generator, device=feature.device) - 1
        masks = noised_masks(target.covered[instances], self.noise * draws.to(feature.dtype))
        repetitions = torch.arange(len(instances), device=feature.device) // max(count, 1)
        return masks.to(feature.dtype), repetitions, instances


def noised_masks(covered: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Masks whose boxes are shifted and scaled, as DN-DETR does with boxes (arXiv:2203.01305, Sec. 4.2).

    Args:
        covered: share of each cell that is in the mask, [m, H, W]. A mask's own cells are those with at least half of
            its largest share, so that small masks have a cell.
        draws: [m, 4]: shift of the box to the right and down, as a share of half its side; growth of its width and
            height, above -1.

    Returns:
        bool [m, H, W]. A mask that would have no cell left stays where it is.
    """
    if len(covered) == 0:
        return covered > 0
    most = covered.amax(dim=(1, 2), keepdim=True)
    own = own_cells(covered)
    middles, halves = zip(*(_middle_and_half(own.any(dim=axis).to(covered)) for axis in (1, 2)))
    shifts, scales = torch.stack(halves, dim=1) * draws[:, :2], 1 + draws[:, 2:]
    # Where each place comes from: middle + (place - middle - shift) / scale, along each axis from -1 to 1
    offsets = torch.stack(middles, dim=1) - (torch.stack(middles, dim=1) + shifts) / scales
    theta = torch.cat([torch.diag_embed(1 / scales), offsets[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [len(covered), 1, *covered.shape[1:]], align_corners=False)
    moved = F.grid_sample(covered[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    noised = (moved >= most / 2) & (most > 0)
    return torch.where(noised.flatten(1).any(dim=1)[:, None, None], noised, own)


def _middle_and_half(covers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and half lengths of boxes on an axis from -1 to 1: [m, L], 1 inside of each box -> [m] each."""
    length = covers.shape[1]
    first, end = covers.argmax(dim=1), length - covers.flip(1).argmax(dim=1)
    return (first + end).to(covers) / length - 1, (end - first).to(covers) / length


class OneToManyKernels(nn.Module):
    """Learned kernels, of which several are matched to each instance at every stage."""

    def __init__(self, dim: int, num_kernels: int, repeats: int, weight: float):
        """
        Args:
            dim: C.
            num_kernels: of the group.
            repeats: number of kernels that each instance is matched with.
            weight: factor on the losses.
        """
        super().__init__()
        self.repeats, self.weight = repeats, weight
        self.kernels = LearnedKernels(dim, num_kernels, norm="", stride=1)
        self.kernels.init_weights()

    def forward(self, cascade: KernelUpdateCascade, state: KernelState, targets: Sequence[Targets]) -> TrainingGroup:
        """The predictions for a batch."""
        feature, localization = full_precision(state.feature), full_precision(state.localization_feature)
        learned, masks, *_ = self.kernels.first_masks(feature, localization, None)
        kernels = learned + gather_group_features((masks > 0).to(feature.dtype), feature)
        first = KernelState(feature, kernels, masks, pyramid_feature=state.pyramid_feature)
        return TrainingGroup("o2m", first, cascade(first), self.weight, self.repeats)


class TrainingKernels(nn.Module):
    """The groups that a config asks for."""

    def __init__(self, groups: dict[str, nn.Module]):
        """
        Args:
            groups: by the name in the parameters' names; (cascade, state, targets) -> TrainingGroup.
        """
        super().__init__()
        self.groups = nn.ModuleDict(groups)

    def forward(
        self, cascade: KernelUpdateCascade, state: KernelState, targets: Sequence[Targets]
    ) -> list[TrainingGroup]:
        """What the groups predict for a batch.

        Args:
            cascade, state: of the model; each group goes through the cascade by itself.
            targets: ground truth of every image.

        Returns:
            none in evaluation, as for the loss on validation images.
        """
        if not self.training:
            return []
        with no_autocast(state.feature):
            return [group(cascade, state, targets) for group in self.groups.values()]


def build_training_kernels(cfg: Any, bank: KernelBank) -> TrainingKernels | None:
    """The groups that a config asks for; None if there are none, as by default.

    Raises:
        ConfigError: the options make no sense.
    """
    dim, denoising, one_to_many = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.KNET.DENOISING, cfg.MODEL.KNET.ONE_TO_MANY
    _check("DENOISING", denoising, bank)
    _check("ONE_TO_MANY", one_to_many, bank)
    groups: dict[str, nn.Module] = {}
    if denoising.NUM_KERNELS:
        groups["denoising"] = DenoisingKernels(dim, denoising.NUM_KERNELS, denoising.NOISE, denoising.WEIGHT)
    if one_to_many.NUM_KERNELS:
        arguments = one_to_many.NUM_KERNELS, one_to_many.REPEATS, one_to_many.WEIGHT
        groups["one_to_many"] = OneToManyKernels(dim, *arguments)
    return TrainingKernels(groups) if groups else None


def _check(name: str, options, bank: KernelBank) -> None:
    """Raise a ConfigError for a value that makes no sense."""
    number = options.NUM_KERNELS
    faults = {
        "NUM_KERNELS": "0 for a model without instances" if number and not bank.num_matched else "",
        "WEIGHT": "" if options.WEIGHT > 0 else "a number above 0, and NUM_KERNELS 0 to leave these kernels out",
        "NOISE": "" if 0 <= options.get("NOISE", 0) < 1 else "0 or more, less than 1",
        "REPEATS": "" if options.get("REPEATS", 1) >= 1 else "1 or more",
    }
    if number < 0:
        faults["NUM_KERNELS"] = "0 to leave these kernels out, or more"
    for key, advice in faults.items():
        if advice:
            raise ConfigError(f"MODEL.KNET.{name}.{key} = {options[key]}: use {advice}.")
