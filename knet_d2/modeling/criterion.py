"""K-Net's training objective for every bank of kernels (paper, Sec. 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import distributed, nn

from ..errors import ConfigError, NonFiniteError
from ..tasks import Assignment, KernelBank, KernelGroup, get_task
from .layers import full_precision, no_autocast, send, upsampled_size
from .loss_batches import AssignedBatch, Comparison, LossBatch, MatchedBatch
from .losses import (
    center_focal_loss,
    dense_focal_loss,
    dice_loss,
    focal_loss,
    kernel_cross_entropy,
    lovasz_softmax_loss,
    mask_loss,
    quality_focal_loss,
    resized_to,
)
from .matcher import HungarianMatcher
from .sampled_points import SampledPoints
from .structures import KernelState, Match, StageOutput, Targets, TrainingGroup
from .targets import UNOWNED, center_map, dense_labels, rank_targets

# The weighted scalar of a term, and the count of this process that normalises it
Value = tuple[torch.Tensor, int | torch.Tensor]
# (matches, targets) of all images -> weighted means by name, each with the count of this process that normalises it
Association = Callable[[Sequence[Match], Sequence[Targets]], dict[str, tuple[torch.Tensor, torch.Tensor]]]
# The terms of groups that exist in training only; rank and dense compare kernels that share the pixels out
GROUP_TERMS = ("class", "mask", "dice")


class Part(NamedTuple):
    """One term of the loss at one stage, before it is normalised.

    Attributes:
        value: weighted scalar: a mean over ``number``, or the sum that ``number`` is to divide.
        number: count of this process.
        is_sum: see :class:`Term`.
        is_global: whether all processes together normalise it by one count.
    """

    value: torch.Tensor
    number: int | torch.Tensor
    is_sum: bool
    is_global: bool


class KNetCriterion(nn.Module):
    """Losses of the static kernels (stage 0) and of every update stage (1 to S).

    The set of keys depends on the configuration alone, never on what a batch holds.

    Attributes:
        failure: why the last batch can't be matched, where there are several processes; else None. All losses are then
            NaN: raising the error would make the other processes wait for the gradients of this one.
    """

    @configurable
    def __init__(
        self,
        *,
        bank: KernelBank,
        matcher: HungarianMatcher,
        weights: dict[str, float],
        focal_alpha: float,
        focal_gamma: float,
        ignore_value: int,
        auxiliary_weight: float = 0.0,
        global_normalizers: bool = False,
        num_points: int = 0,
        quality_exponent: float = 0.0,
        lovasz_weight: float = 0.0,
        label_weights: Sequence[float] = (),
    ):
        """
        Args:
            weights: from the name of a term (a key of TERMS) to its weight; the losses are summed in this order.
            auxiliary_weight: of the auxiliary head's cross entropy.
            num_points: see :class:`.sampled_points.SampledPoints`; 0: masks are compared at every pixel.
            quality_exponent: the class target of a positive kernel is the IoU of its mask to this power; 0: it is 1.
            lovasz_weight: of the Lovász-Softmax loss beside each cross entropy of label maps, the auxiliary head's too.
            label_weights: K factors on the cross entropy of each class's pixels in label maps; none: 1 for all.
            global_normalizers: True divides every term by a count over all processes, so that the mean of their losses
                is what one process computes for all their images. False, as in the official release, divides class
                losses by the mean count over the processes, and all other terms by the process's own count.
        """
        super().__init__()
        self.bank = bank
        self.matcher = matcher
        self.weights = weights
        self.focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.ignore_value = ignore_value
        self.auxiliary_weight = auxiliary_weight
        self.global_normalizers = global_normalizers
        self.num_points = num_points
        self.quality_exponent = quality_exponent
        self.lovasz_weight = lovasz_weight
        self.failure: NonFiniteError | None = None
        self.register_buffer("label_weights", torch.tensor(label_weights) if label_weights else None, persistent=False)
        self.register_buffer("class_mask", bank.class_mask(), persistent=False)
        kernel_of_class = torch.full((bank.num_classes,), -1)
        kernel_of_class[bank.fixed_class_ids] = torch.arange(bank.num_matched, bank.num_kernels)
        self.register_buffer("kernel_of_class", kernel_of_class, persistent=False)

    @classmethod
    def from_config(cls, cfg, bank: KernelBank) -> dict[str, Any]:
        loss, matcher = cfg.MODEL.KNET.LOSS, cfg.MODEL.KNET.MATCHER
        task, ignore_value = get_task(cfg), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        weights = {**loss, "RANK_WEIGHT": task.rank_weight} if loss.RANK_WEIGHT < 0 else loss
        if bank.fixed_class_ids and 0 <= ignore_value < bank.num_classes:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE = {ignore_value} is one of the {bank.num_classes} classes' labels."
            )
        if loss.NUM_POINTS < 0:
            raise ConfigError(
                f"MODEL.KNET.LOSS.NUM_POINTS = {loss.NUM_POINTS}: use 0 for every pixel, or more, such as 12544."
            )
        if loss.QUALITY_EXPONENT < 0:
            raise ConfigError(f"MODEL.KNET.LOSS.QUALITY_EXPONENT = {loss.QUALITY_EXPONENT}: use 0 for none, or more.")
        if loss.LOVASZ_WEIGHT < 0 or (loss.LOVASZ_WEIGHT and "label_map" not in task.losses):
            raise ConfigError(
                f"MODEL.KNET.LOSS.LOVASZ_WEIGHT = {loss.LOVASZ_WEIGHT}: use 0, or more for semantic segmentation."
            )
        if loss.LOVASZ_WEIGHT and not weights["RANK_WEIGHT"]:
            raise ConfigError(
                f"MODEL.KNET.LOSS.LOVASZ_WEIGHT = {loss.LOVASZ_WEIGHT} has no effect, since it is multiplied by "
                "MODEL.KNET.LOSS.RANK_WEIGHT = 0, as the cross entropy is: use a RANK_WEIGHT above 0."
            )
        if loss.LOVASZ_WEIGHT and loss.GLOBAL_NORMALIZERS:
            raise ConfigError(
                f"MODEL.KNET.LOSS.LOVASZ_WEIGHT = {loss.LOVASZ_WEIGHT} compares the images of a process together, so "
                "that MODEL.KNET.LOSS.GLOBAL_NORMALIZERS = True can't make it independent of the number of processes: "
                "use one of them."
            )
        cls._check_label_weights(loss.LABEL_WEIGHTS, bank.num_classes, "label_map" in task.losses)
        if loss.LABEL_WEIGHTS and not weights["RANK_WEIGHT"]:
            raise ConfigError(
                f"MODEL.KNET.LOSS.LABEL_WEIGHTS = {loss.LABEL_WEIGHTS} has no effect on the stages, whose cross "
                "entropy is multiplied by MODEL.KNET.LOSS.RANK_WEIGHT = 0: use a RANK_WEIGHT above 0."
            )
        return {
            "bank": bank,
            "matcher": HungarianMatcher(
                class_weight=matcher.CLASS_WEIGHT,
                mask_weight=matcher.MASK_WEIGHT,
                dice_weight=matcher.DICE_WEIGHT,
                focal_alpha=loss.FOCAL_ALPHA,
                focal_gamma=loss.FOCAL_GAMMA,
            ),
            "weights": {name: weights[TERMS[name].weight_key] for name in task.losses},
            "focal_alpha": loss.FOCAL_ALPHA,
            "focal_gamma": loss.FOCAL_GAMMA,
            "ignore_value": ignore_value,
            "auxiliary_weight": loss.AUXILIARY_WEIGHT,
            "global_normalizers": loss.GLOBAL_NORMALIZERS,
            "num_points": loss.NUM_POINTS,
            "quality_exponent": loss.QUALITY_EXPONENT,
            "lovasz_weight": loss.LOVASZ_WEIGHT,
            "label_weights": [float(x) for x in loss.LABEL_WEIGHTS],
        }

    @staticmethod
    def _check_label_weights(weights: Sequence[float], num_classes: int, has_label_maps: bool) -> None:
        """Raise a ConfigError for weights that make no sense."""
        key = f"MODEL.KNET.LOSS.LABEL_WEIGHTS = {list(weights)}"
        if weights and not has_label_maps:
            raise ConfigError(f"{key}: use [] for this task, or weights for semantic segmentation.")
        if weights and len(weights) != num_classes:
            raise ConfigError(f"{key} has {len(weights)} numbers: use one for each of {num_classes} classes, or [].")
        are_numbers = all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in weights)
        if not are_numbers or weights and not any(weights):
            raise ConfigError(f"{key}: use numbers of at least 0, of which some are above 0.")

    def forward(
        self,
        state: KernelState,
        stages: Sequence[StageOutput],
        targets: Sequence[Targets],
        auxiliary_logits: torch.Tensor | None = None,
        association: Association | None = None,
        training_groups: Sequence[TrainingGroup] = (),
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            state: the static kernels.
            stages: predictions of the S update stages.
            targets: ground truth of every image.
            auxiliary_logits: the auxiliary head's [B, K, h, w], if there is one.
            association: the losses of embeddings from the matches of the last stage's input and the targets, if there
                are some; see :meth:`.association.VideoKernels.losses`.
            training_groups: kernels that exist in training only; they change no other loss.

        Returns:
            "loss_<log_name>_s<stage>" -> weighted scalar, "loss_<log_name>_<group>_s<stage>", "loss_auxiliary",
            and the losses of ``association``.
        """
        parts: dict[str, Part] = {}
        with no_autocast(state.feature):
            comparison = self._compare(state, targets)
            batch = self._own_batch(state, stages, comparison)
            groups = [self._group_batch(group, comparison, i) for i, group in enumerate(training_groups, start=1)]
            self.failure = self._match([batch, *(x for x in groups if isinstance(x, MatchedBatch))])
            for stage in range(len(stages) + 1):
                for name, weight in self.weights.items():
                    self._add_term(parts, batch, name, stage, weight)
            if auxiliary_logits is not None:
                value, number = _label_map_loss(self, comparison, full_precision(auxiliary_logits))
                parts["loss_auxiliary"] = Part(self.auxiliary_weight * value, number, False, self.global_normalizers)
            if association is not None:
                found = association(batch.matches[-1], targets)
                for name, (value, number) in found.items():
                    parts[name] = Part(value, number, False, self.global_normalizers)
            for group, group_batch in zip(training_groups, groups):
                for stage in range(group_batch.first_stage, len(stages) + 1):
                    for name in GROUP_TERMS:
                        weight = group.weight * self.weights[name]
                        self._add_term(parts, group_batch, name, stage, weight, group.name)
            losses = self._normalize(parts)
        if self.failure is not None:
            losses = {name: loss * math.nan for name, loss in losses.items()}
        return losses

    def _compare(self, state: KernelState, targets: Sequence[Targets]) -> Comparison:
        if not self.num_points:
            return Comparison(targets)
        masks = full_precision(state.mask_logits)
        return SampledPoints(targets, masks, upsampled_size(masks), self.num_points)

    def _own_batch(self, state: KernelState, stages: Sequence[StageOutput], comparison: Comparison) -> MatchedBatch:
        own = TrainingGroup("", state, list(stages), weight=1.0)
        return MatchedBatch(own, comparison, self.class_mask, self.bank, self.kernel_of_class)

    def _group_batch(self, group: TrainingGroup, comparison: Comparison, stream: int) -> LossBatch:
        things_only = self.class_mask[:1]  # the row of the first kernel, which is matched
        if group.instances is not None:
            return AssignedBatch(group, comparison, things_only, stream)
        things = KernelGroup(group.state.mask_logits.shape[1], Assignment.HUNGARIAN, range(self.bank.num_things))
        bank = KernelBank([things], self.bank.num_classes)
        return MatchedBatch(group, comparison, things_only, bank, self.kernel_of_class, stream)

    def _match(self, batches: Sequence[MatchedBatch]) -> NonFiniteError | None:
        """Match the kernels of all groups to the instances, with one transfer to the CPU.

        Returns:
            why that is impossible, where there are several processes; one process alone raises the error.
        """
        targets = batches[0].targets
        classes, masks = [t.classes for t in targets], [t.masks for t in targets]
        candidates = [stage for batch in batches for stage in batch.candidates()]
        if not candidates:
            return None
        try:
            found = iter(self.matcher.match(candidates, classes, masks))
        except NonFiniteError as error:
            if comm.get_world_size() == 1:
                raise
            for batch in batches:
                batch.matches = batch.placeholder_matches()
            return error
        for batch in batches:
            batch.matches = [next(found) for _ in batch.stages]
        return None

    def _add_term(
        self, parts: dict[str, Part], batch: LossBatch, name: str, stage: int, weight: float, group: str = ""
    ) -> None:
        """Compute a term of a stage, where it applies."""
        term = TERMS[name]
        if term.applies(stage, weight):
            value, count = term.compute(self, batch, stage, weight)
            key = f"loss_{term.log_name}{'_' * bool(group)}{group}_s{stage}"
            parts[key] = Part(value, count, term.is_sum, bool(group) or self.global_normalizers)

    def _normalize(self, parts: dict[str, Part]) -> dict[str, torch.Tensor]:
        """The losses, with counts of all processes where these are needed: by one all-reduce for all terms."""
        world_size = comm.get_world_size()
        shared = [name for name, part in parts.items() if part.is_sum or part.is_global]
        if world_size == 1 or not shared:
            return {name: x.value / max(x.number, 1) if x.is_sum else x.value for name, x in parts.items()}
        numbers = mean_over_processes([parts[name].number for name in shared], parts[shared[0]].value)
        # All processes together count at least 1, as one process alone does
        least = [1 / world_size if parts[name].is_global else 1.0 for name in shared]
        means = dict(zip(shared, numbers.clamp(min=send(torch.tensor(least, dtype=numbers.dtype), numbers.device))))
        losses = {}
        for name, (value, number, is_sum, _) in parts.items():
            if is_sum:
                value = value / means[name]
            elif name in means:
                own = number.clamp(min=1).to(value.dtype) if isinstance(number, torch.Tensor) else max(number, 1)
                value = value * (own / means[name])
            losses[name] = value
        return losses


# The terms: each gives its weighted scalar for one stage, and what that is normalised by


def _class_term(criterion: KNetCriterion, batch: LossBatch, stage: int, weight: float) -> Value:
    """Focal loss on the kernels' classes, over the classes that each kernel can take."""
    logits, positives = batch.stages[stage - 1].class_logits, batch.positives(stage)
    one_hot = torch.zeros_like(logits)
    index = (positives.image_index, positives.kernel_index, positives.classes)
    loss, value = focal_loss, logits.new_ones(())  # made on the device; a number would be copied there
    if criterion.quality_exponent:
        loss, value = quality_focal_loss, batch.mask_qualities(stage) ** criterion.quality_exponent
    one_hot.index_put_(index, value)
    total = loss(logits, one_hot, batch.class_mask.to(logits.dtype), **criterion.focal)
    return weight * total, len(positives.kernel_index)


def _mask_term(criterion: KNetCriterion, batch: LossBatch, stage: int, weight: float) -> Value:
    """Binary cross entropy on the masks of the positive kernels."""
    logits, targets = batch.positive_pairs(stage)
    return weight * mask_loss(logits, targets), logits.numel()


def _dice_term(criterion: KNetCriterion, batch: LossBatch, stage: int, weight: float) -> Value:
    """Dice loss on the masks of the positive kernels."""
    logits, targets = batch.positive_pairs(stage)
    return weight * dice_loss(logits, targets), len(logits)


def _rank_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> Value:
    """Cross entropy over the kernels at the pixels that a positive kernel owns."""
    labels = rank_targets(batch.positives(stage))
    return weight * kernel_cross_entropy(batch.compared_logits(stage), labels, UNOWNED), labels.numel()


def _dense_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> Value:
    """Focal loss on the static semantic logits at every pixel."""
    logits = batch.comparison.read(full_precision(batch.state.semantic_logits))
    background = criterion.bank.num_classes
    labels = torch.stack([dense_labels(*item, background) for item in zip(batch.targets, batch.matches[0])])
    total = dense_focal_loss(logits, labels, **criterion.focal)
    count = batch.comparison.foreground_count(batch, labels, background)
    return weight * total / count.clamp(min=1), count


def _center_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> Value:
    """Focal loss on the map of the instances' centres, per instance."""
    maps = torch.stack([center_map(target.covered) for target in batch.targets])
    total = center_focal_loss(full_precision(batch.state.center_logits), maps)
    return weight * total, sum(len(target.classes) for target in batch.targets)


def _label_map_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> Value:
    """Cross entropy over kernels that each stand for a class, whose target is the label map itself."""
    loss, number = _label_map_loss(criterion, batch.comparison, batch.mask_logits(stage))
    return weight * loss, number


def _label_map_loss(criterion: KNetCriterion, comparison: Comparison, logits: torch.Tensor) -> Value:
    """Loss of logits [B, K, H, W] where label maps are compared, without a weight: mean cross entropy, and Lovász."""
    logits, labels = comparison.label_pairs(logits)
    logits = resized_to(logits, labels)
    weights = None if criterion.label_weights is None else criterion.label_weights.to(logits.dtype)
    loss = kernel_cross_entropy(logits, labels, criterion.ignore_value, weights)
    if criterion.lovasz_weight:
        loss = loss + criterion.lovasz_weight * lovasz_softmax_loss(logits, labels, criterion.ignore_value)
    return loss, labels.numel()


class Term(NamedTuple):
    """A term of the loss.

    Attributes:
        log_name: names it in "loss_<log_name>_s<stage>".
        weight_key: its weight in MODEL.KNET.LOSS.
        compute: (criterion, batch, stage, weight) -> weighted scalar, and the count of this process that it is a mean
            over: the pixels of a mean over pixels, the masks of a mean over masks. With ``is_sum``, the scalar is the
            sum, which is still to be divided by the count.
        at_static, at_updates: whether it is computed for stage 0, and for the stages 1 to S.
        is_optional: whether a weight of 0 leaves it out, with its key. The other terms are kept with the value 0, since
            parameters depend on them alone, and DistributedDataParallel needs a gradient of every parameter.
        is_sum: whether the scalar is a sum; the mean of the processes' counts divides it, as in the official release.
    """

    log_name: str
    weight_key: str
    compute: Callable[[KNetCriterion, Any, int, float], Value]
    at_static: bool = True
    at_updates: bool = True
    is_optional: bool = False
    is_sum: bool = False

    def applies(self, stage: int, weight: float) -> bool:
        """Whether there is this term at a stage."""
        return (self.at_updates if stage else self.at_static) and (weight != 0 or not self.is_optional)


TERMS: dict[str, Term] = {
    "class": Term("class", "CLASS_WEIGHT", _class_term, at_static=False, is_sum=True),
    "mask": Term("mask", "MASK_WEIGHT", _mask_term, is_optional=True),
    "dice": Term("dice", "DICE_WEIGHT", _dice_term, is_optional=True),
    "rank": Term("rank", "RANK_WEIGHT", _rank_term, is_optional=True),
    "dense": Term("dense", "DENSE_WEIGHT", _dense_term, at_updates=False),
    "center": Term("center", "CENTER_WEIGHT", _center_term, at_updates=False, is_optional=True, is_sum=True),
    # The same cross entropy as "rank", with the label map as target, and under the same name in the log
    "label_map": Term("rank", "RANK_WEIGHT", _label_map_term),
}


def mean_over_processes(counts: Sequence[int | torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Mean of each of n numbers over all processes: [n], of the type and on the device of ``like``."""
    numbers = torch.tensor([0 if isinstance(x, torch.Tensor) else x for x in counts], dtype=like.dtype)
    means = send(numbers, like.device)
    for i, count in enumerate(counts):
        if isinstance(count, torch.Tensor):
            means[i] = count
    distributed.all_reduce(means)
    return means / comm.get_world_size()
