"""K-Net's training objective for every bank of kernels (paper, Sec. 3.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import nn

from ..errors import ConfigError, NonFiniteError
from ..tasks import KernelBank, get_task
from .layers import full_precision, no_autocast
from .losses import dense_focal_loss, dice_loss, focal_loss, kernel_cross_entropy, mask_loss
from .matcher import Candidates, HungarianMatcher
from .resize import upsample_masks
from .structures import KernelState, Match, StageOutput, Targets

# Pixels of the rank loss's targets that no kernel owns
UNOWNED = -1


class Positives(NamedTuple):
    """The P kernels of a batch that have something to segment, ordered by image, then by kernel.

    Attributes:
        counts: number of positive kernels of each image; they sum to P.
        image_index, kernel_index: int64 [P], which kernels these are.
        classes: int64 [P], the classes that they have to predict.
        target_masks: [P, h, w], the masks that they have to predict.
    """

    counts: list[int]
    image_index: torch.Tensor
    kernel_index: torch.Tensor
    classes: torch.Tensor
    target_masks: torch.Tensor


class KNetCriterion(nn.Module):
    """Losses of the static kernels (stage 0) and of every update stage (1 to S).

    The set of keys depends on the configuration alone, never on what a batch holds.
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
    ):
        """
        Args:
            weights: from the name of a term (a key of TERMS) to its weight; the losses are summed in this order.
            auxiliary_weight: of the auxiliary head's cross entropy.
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
        self.register_buffer("class_mask", bank.class_mask(), persistent=False)
        kernel_of_class = torch.full((bank.num_classes,), -1)
        kernel_of_class[bank.fixed_class_ids] = torch.arange(bank.num_matched, bank.num_kernels)
        self.register_buffer("kernel_of_class", kernel_of_class, persistent=False)

    @classmethod
    def from_config(cls, cfg, bank: KernelBank) -> dict[str, Any]:
        loss, matcher = cfg.MODEL.KNET.LOSS, cfg.MODEL.KNET.MATCHER
        ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        if bank.fixed_class_ids and 0 <= ignore_value < bank.num_classes:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE = {ignore_value} is one of the {bank.num_classes} classes' labels."
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
            "weights": {name: loss[TERMS[name].weight_key] for name in get_task(cfg).losses},
            "focal_alpha": loss.FOCAL_ALPHA,
            "focal_gamma": loss.FOCAL_GAMMA,
            "ignore_value": ignore_value,
            "auxiliary_weight": loss.AUXILIARY_WEIGHT,
            "global_normalizers": loss.GLOBAL_NORMALIZERS,
        }

    def forward(
        self,
        state: KernelState,
        stages: Sequence[StageOutput],
        targets: Sequence[Targets],
        auxiliary_logits: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            state: the static kernels.
            stages: predictions of the S update stages.
            targets: ground truth of every image.
            auxiliary_logits: the auxiliary head's [B, K, h, w], if there is one.

        Returns:
            "loss_<log_name>_s<stage>" -> weighted scalar, and "loss_auxiliary".
        """
        losses = {}
        with no_autocast(state.feature):
            batch = MatchedBatch(self, state, stages, targets)
            for stage in range(len(stages) + 1):
                for name, weight in self.weights.items():
                    term = TERMS[name]
                    if term.applies(stage, weight):
                        losses[f"loss_{term.log_name}_s{stage}"] = term.compute(self, batch, stage, weight)
            if auxiliary_logits is not None:
                labels = batch.labels
                loss = kernel_cross_entropy(full_precision(auxiliary_logits), labels, self.ignore_value)
                losses["loss_auxiliary"] = (
                    self.auxiliary_weight * loss * self.normalizer_correction(labels.numel(), loss)
                )
        return losses

    def normalizer_correction(self, count: int | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
        """Factor that turns a mean over this process's ``count`` into one over all processes; 1 where that is off."""
        if not self.global_normalizers:
            return 1.0
        # All processes together count at least 1, as one process alone does
        total = average_over_ranks(count, like).clamp(min=1 / comm.get_world_size())
        return scalar_like(count, like).clamp(min=1) / total


class MatchedBatch:
    """Predictions, ground truth and matches of a batch; what several terms share is computed when first asked for.

    A stage is given by its number: 0 for the static kernels, 1 to S for the update stages. At stage 0, mask, dice and
    rank losses are computed for the matched kernels only; the static stuff kernels learn from the dense term.
    """

    def __init__(
        self,
        criterion: KNetCriterion,
        state: KernelState,
        stages: Sequence[StageOutput],
        targets: Sequence[Targets],
    ):
        self.state, self.stages, self.targets = state, stages, targets
        self._bank, self._matcher = criterion.bank, criterion.matcher
        self._kernel_of_class = criterion.kernel_of_class
        self._upsampled: dict[int, torch.Tensor] = {}
        self._positives: dict[int, Positives] = {}
        self._positive_logits: dict[int, torch.Tensor] = {}

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Class of every pixel: int64 [B, Hp, Wp]."""
        return torch.stack([target.sem_seg for target in self.targets])

    def mask_logits(self, stage: int) -> torch.Tensor:
        """All kernels' masks of a stage at the head's resolution: [B, N, H, W]."""
        return self.stages[stage - 1].mask_logits if stage else full_precision(self.state.mask_logits)

    def upsampled_logits(self, stage: int) -> torch.Tensor:
        """The masks of a stage at the resolution of the mask losses: [B, N, h, w].

        Of stage 0, only those of the matched kernels, which come first.
        """
        if stage not in self._upsampled:
            logits = self.mask_logits(stage)
            self._upsampled[stage] = upsample_masks(logits if stage else logits[:, : self._bank.num_matched])
        return self._upsampled[stage]

    def positives(self, stage: int) -> Positives:
        """What the kernels of a stage have to segment.

        Stages 0 and 1 learn from the match of stage 0, and stage i from that of stage i - 1, which is its input.
        """
        if stage not in self._positives:
            matches = self.matches[max(stage - 1, 0)]
            self._positives[stage] = self._build_positives(matches, with_stuff=stage > 0)
        return self._positives[stage]

    def positive_logits(self, stage: int) -> torch.Tensor:
        """The masks of the positive kernels: [P, h, w]."""
        if stage not in self._positive_logits:
            positives = self.positives(stage)
            self._positive_logits[stage] = self.upsampled_logits(stage)[positives.image_index, positives.kernel_index]
        return self._positive_logits[stage]

    @functools.cached_property
    def matches(self) -> list[list[Match]]:
        """Per stage, per image: the matches of all stages but the last one, which no loss needs."""
        candidates = self._candidates()
        matches, failure = [], None
        try:
            classes, masks = [t.classes for t in self.targets], [t.masks for t in self.targets]
            matches = self._matcher.match(candidates, classes, masks)
        except NonFiniteError as error:
            failure = error
        _raise_in_all_processes(failure)
        return matches

    def _candidates(self) -> list[list[Candidates]]:
        """Per stage, per image: what is matched to the instances. The static kernels have no classes."""
        num_matched, num_things = self._bank.num_matched, self._bank.num_things
        candidates = [[Candidates(masks, None) for masks in self.upsampled_logits(0)]]
        for i, stage in enumerate(self.stages[:-1], start=1):
            class_logits = stage.class_logits[:, :num_matched, :num_things]
            candidates.append(
                [Candidates(*item) for item in zip(self.upsampled_logits(i)[:, :num_matched], class_logits)]
            )
        return candidates

    def _build_positives(self, matches: Sequence[Match], *, with_stuff: bool) -> Positives:
        counts, images, kernels, classes, masks = [], [], [], [], []
        for b, ((matched, instances), target) in enumerate(zip(matches, self.targets)):
            image_kernels, image_classes = [matched], [target.classes[instances]]
            masks.append(target.masks[instances])
            if with_stuff:
                image_kernels.append(self._kernel_of_class[target.stuff_classes])
                image_classes.append(target.stuff_classes)
                masks.append(target.stuff_masks)
            kernels.extend(image_kernels)
            classes.extend(image_classes)
            counts.append(sum(map(len, image_kernels)))
            images.append(matched.new_full((counts[-1],), b))
        return Positives(counts, *map(torch.cat, (images, kernels, classes, masks)))


# The terms: each gives the weighted scalar of one stage


def _class_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Focal loss on the kernels' classes, over the classes that each kernel can take."""
    logits, positives = batch.stages[stage - 1].class_logits, batch.positives(stage)
    one_hot = torch.zeros_like(logits)
    index = (positives.image_index, positives.kernel_index, positives.classes)
    one_hot.index_put_(index, logits.new_ones(()))  # made on the device; a number would be copied there
    total = focal_loss(logits, one_hot, criterion.class_mask.to(logits.dtype), **criterion.focal)
    count = len(positives.kernel_index)
    if criterion.global_normalizers:
        return weight * total / max(count, 1) * criterion.normalizer_correction(count, logits)
    return weight * total / average_over_ranks(count, logits).clamp(min=1)


def _mask_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Binary cross entropy on the masks of the positive kernels."""
    logits = batch.positive_logits(stage)
    return (
        weight
        * mask_loss(logits, batch.positives(stage).target_masks)
        * criterion.normalizer_correction(logits.numel(), logits)
    )


def _dice_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Dice loss on the masks of the positive kernels."""
    logits = batch.positive_logits(stage)
    return (
        weight
        * dice_loss(logits, batch.positives(stage).target_masks)
        * criterion.normalizer_correction(len(logits), logits)
    )


def _rank_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Cross entropy over the kernels at the pixels that a positive kernel owns."""
    labels = rank_targets(batch.positives(stage))
    loss = kernel_cross_entropy(batch.upsampled_logits(stage), labels, UNOWNED)
    return weight * loss * criterion.normalizer_correction(labels.numel(), loss)


def _dense_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Focal loss on the static semantic logits at every pixel."""
    logits = upsample_masks(full_precision(batch.state.semantic_logits))
    background = criterion.bank.num_classes
    labels = torch.stack([dense_labels(*item, background) for item in zip(batch.targets, batch.matches[0])])
    total = dense_focal_loss(logits, labels, **criterion.focal)
    count = (labels != background).sum()
    return weight * total / count.clamp(min=1) * criterion.normalizer_correction(count, logits)


def _label_map_term(criterion: KNetCriterion, batch: MatchedBatch, stage: int, weight: float) -> torch.Tensor:
    """Cross entropy over kernels that each stand for a class, whose target is the label map itself."""
    logits = batch.mask_logits(stage)
    loss = kernel_cross_entropy(logits, batch.labels, criterion.ignore_value)
    return weight * criterion.normalizer_correction(batch.labels.numel(), logits) * loss


class Term(NamedTuple):
    """A term of the loss.

    Attributes:
        log_name: names it in "loss_<log_name>_s<stage>".
        weight_key: its weight in MODEL.KNET.LOSS.
        compute: (criterion, batch, stage, weight) -> weighted scalar.
        at_static, at_updates: whether it is computed for stage 0, and for the stages 1 to S.
        is_optional: whether a weight of 0 leaves it out, with its key. The other terms are kept with the value 0, since
            parameters depend on them alone, and DistributedDataParallel needs a gradient of every parameter.
    """

    log_name: str
    weight_key: str
    compute: Callable[[KNetCriterion, MatchedBatch, int, float], torch.Tensor]
    at_static: bool = True
    at_updates: bool = True
    is_optional: bool = False

    def applies(self, stage: int, weight: float) -> bool:
        """Whether there is this term at a stage."""
        return (self.at_updates if stage else self.at_static) and (weight != 0 or not self.is_optional)


TERMS: dict[str, Term] = {
    "class": Term("class", "CLASS_WEIGHT", _class_term, at_static=False),
    "mask": Term("mask", "MASK_WEIGHT", _mask_term, is_optional=True),
    "dice": Term("dice", "DICE_WEIGHT", _dice_term, is_optional=True),
    "rank": Term("rank", "RANK_WEIGHT", _rank_term, is_optional=True),
    "dense": Term("dense", "DENSE_WEIGHT", _dense_term, at_updates=False),
    # The same cross entropy as "rank", with the label map as target, and under the same name in the log
    "label_map": Term("rank", "RANK_WEIGHT", _label_map_term),
}


def _raise_in_all_processes(failure: NonFiniteError | None) -> None:
    """Raise the failure of any process in every one: the others would wait for its losses and gradients."""
    if comm.get_world_size() == 1:
        if failure is not None:
            raise failure
        return
    # Through the CPU: the device need not be waited for
    messages = comm.all_gather(failure and str(failure))
    rank = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if rank is None:
        return
    error = NonFiniteError(messages[rank])
    error.rank = rank
    raise error from failure


def scalar_like(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number as a scalar of the given tensor's type and device, where it is made, not copied to."""
    return value.to(like) if isinstance(value, torch.Tensor) else like.new_full((), value)


def average_over_ranks(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Mean of a number over all processes, as a scalar of the given tensor's type and device."""
    mean = scalar_like(value, like)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean = mean / comm.get_world_size()
    return mean


def last_nonzero(masks: torch.Tensor, values: torch.Tensor, background: int) -> torch.Tensor:
    """Value of the last mask that is above 0 at each pixel.

    Args:
        masks: [P, h, w], painted in this order, each over the ones before.
        values: int64 [P].
        background: value where no mask is.

    Returns:
        int64 [h, w].
    """
    order = torch.arange(1, len(masks) + 1, dtype=torch.int32, device=masks.device)
    last = torch.where(masks > 0, order[:, None, None], 0)
    last = torch.cat([last.new_zeros(1, *masks.shape[1:]), last]).amax(dim=0)
    return torch.cat([values.new_full((1,), background), values])[last]


def rank_targets(positives: Positives) -> torch.Tensor:
    """The kernel that owns each pixel: int64 [B, h, w]; where several are positive the last one wins."""
    masks, kernels = positives.target_masks.split(positives.counts), positives.kernel_index.split(positives.counts)
    return torch.stack([last_nonzero(*item, background=UNOWNED) for item in zip(masks, kernels)])


def dense_labels(targets: Targets, match: Match, background: int) -> torch.Tensor:
    """Class of every pixel for the static semantic logits: int64 [h, w].

    Stuff is painted first, the matched things over it in the order of their kernels; the rest is background.
    """
    _, instances = match
    masks = torch.cat([targets.stuff_masks, targets.masks[instances]])
    classes = torch.cat([targets.stuff_classes, targets.classes[instances]])
    return last_nonzero(masks, classes, background)
