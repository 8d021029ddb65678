"""K-Net's training objective for every bank of kernels (paper, Sec. 3.4)."""

from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import nn

from ..errors import ConfigError, NonFiniteError
from .losses import dense_focal_loss, dice_loss, focal_loss, kernel_cross_entropy, mask_loss
from .matcher import HungarianMatcher, Prediction
from .precision import full_precision, no_autocast
from .resize import upsample_masks
from .structures import KernelBank, KernelState, Match, StageOutput, Targets


class LossWeights(NamedTuple):
    """Weight of every term; mask, dice and rank are left out, with their keys, where it is 0."""

    class_: float
    mask: float
    dice: float
    rank: float
    dense: float
    auxiliary: float


# Pixels of the rank target that no kernel owns; an index that no kernel has
UNOWNED = -1


class Positives(NamedTuple):
    """The P kernels of a batch that have something to segment, ordered by image, then by kernel.

    Attributes:
        counts: number of positive kernels of each image; they sum to P.
        images, kernels: int64 [P].
        classes: int64 [P].
        masks: [P, h, w].
    """

    counts: List[int]
    images: torch.Tensor
    kernels: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor


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
        weights: LossWeights,
        focal_alpha: float,
        focal_gamma: float,
        ignore_value: int,
        global_normalizers: bool = False,
    ):
        """
        Args:
            global_normalizers: whether every term is normalised by a count over all processes, such that their mean
                loss is what one process computes for their batches together. False, as in the official release:
                only the class losses are, by the mean over the processes; the other terms by each process's own.
        """
        super().__init__()
        self.bank = bank
        self.matcher = matcher
        self.weights = weights
        self.focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.ignore_value = ignore_value
        self.global_normalizers = global_normalizers
        self.register_buffer("class_mask", bank.class_mask(), persistent=False)
        kernel_of_class = torch.full((bank.num_classes,), -1)
        kernel_of_class[bank.fixed_class_ids] = torch.arange(bank.num_matched, bank.num_kernels)
        self.register_buffer("kernel_of_class", kernel_of_class, persistent=False)

    @classmethod
    def from_config(cls, cfg, bank: KernelBank):
        loss, matcher = cfg.MODEL.KNET.LOSS, cfg.MODEL.KNET.MATCHER
        ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        if bank.fixed_class_ids and 0 <= ignore_value < bank.num_classes:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE = {ignore_value} is one of the {bank.num_classes} classes' labels."
            )
        matched = bank.num_matched > 0
        return {
            "bank": bank,
            "matcher": HungarianMatcher(
                class_weight=matcher.CLASS_WEIGHT,
                mask_weight=matcher.MASK_WEIGHT,
                dice_weight=matcher.DICE_WEIGHT,
                focal_alpha=loss.FOCAL_ALPHA,
                focal_gamma=loss.FOCAL_GAMMA,
            ),
            "weights": LossWeights(
                class_=loss.CLASS_WEIGHT if matched else 0.0,
                mask=loss.MASK_WEIGHT if matched else 0.0,
                dice=loss.DICE_WEIGHT if matched else 0.0,
                rank=loss.RANK_WEIGHT,
                dense=loss.DENSE_WEIGHT if matched else 0.0,
                auxiliary=loss.AUXILIARY_WEIGHT,
            ),
            "focal_alpha": loss.FOCAL_ALPHA,
            "focal_gamma": loss.FOCAL_GAMMA,
            "ignore_value": ignore_value,
            "global_normalizers": loss.GLOBAL_NORMALIZERS,
        }

    def forward(
        self,
        state: KernelState,
        stages: Sequence[StageOutput],
        targets: Sequence[Targets],
        auxiliary_logits: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            state: the static kernels.
            stages: predictions of the S update stages.
            targets: ground truth of every image.
            auxiliary_logits: the auxiliary head's [B, K, h, w], if there is one.

        Returns:
            "loss_<term>_s<stage>" -> weighted scalar, and "loss_auxiliary".
        """
        with no_autocast(state.feature):
            if self.bank.num_matched:
                losses = self._matched_losses(state, stages, targets)
            else:
                losses = self._semantic_losses(state, stages, targets)
            if auxiliary_logits is not None:
                labels = _labels(targets)
                loss = kernel_cross_entropy(full_precision(auxiliary_logits), labels, self.ignore_value)
                losses["loss_auxiliary"] = self.weights.auxiliary * loss * self._share(labels.numel(), loss)
        return losses

    def _share(self, count: "int | torch.Tensor", like: torch.Tensor) -> "float | torch.Tensor":
        """What a mean over ``count`` things of this process has to be multiplied with, see ``global_normalizers``."""
        if not self.global_normalizers:
            return 1.0
        # At least 1 thing in all processes together, as one process alone has it
        total = average_over_ranks(count, like).clamp(min=1 / comm.get_world_size())
        return scalar_like(count, like).clamp(min=1) / total

    # Semantic: every kernel is its class, so that the label map is the target of the cross entropy over kernels

    def _semantic_losses(self, state, stages, targets) -> Dict[str, torch.Tensor]:
        labels = _labels(targets)
        all_logits = [full_precision(state.mask_logits), *(stage.mask_logits for stage in stages)]
        weight = self.weights.rank * self._share(labels.numel(), all_logits[0])
        return {
            f"loss_rank_s{i}": weight * kernel_cross_entropy(logits, labels, self.ignore_value)
            for i, logits in enumerate(all_logits)
        }

    # Instance and panoptic

    def _matched_losses(self, state, stages, targets) -> Dict[str, torch.Tensor]:
        num_matched = self.bank.num_matched
        static_masks = upsample_masks(full_precision(state.mask_logits[:, :num_matched]))
        stage_masks = [upsample_masks(stage.mask_logits) for stage in stages]
        matches = self._match(static_masks, stage_masks, stages, targets)

        losses = self._mask_losses(static_masks, self._positives(matches[0], targets, with_stuff=False), stage=0)
        semantic_logits = upsample_masks(full_precision(state.semantic_logits))
        losses["loss_dense_s0"] = self._dense_loss(semantic_logits, matches[0], targets)
        for i, (stage, masks) in enumerate(zip(stages, stage_masks), start=1):
            # A stage answers for the instances that its input kernels were matched to
            positives = self._positives(matches[i - 1], targets, with_stuff=True)
            losses[f"loss_class_s{i}"] = self._class_loss(stage.class_logits, positives)
            losses.update(self._mask_losses(masks, positives, stage=i))
        return losses

    def _match(self, static_masks, stage_masks, stages, targets) -> List[List[Match]]:
        """Matches of the static kernels and of all stages but the last one, which no loss needs."""
        num_matched, num_things = self.bank.num_matched, self.bank.num_things
        predictions = [[Prediction(masks, None) for masks in static_masks]]
        for stage, masks in list(zip(stages, stage_masks))[:-1]:
            class_logits = stage.class_logits[:, :num_matched, :num_things]
            predictions.append([Prediction(*item) for item in zip(masks[:, :num_matched], class_logits)])
        matches, failure = [], None
        try:
            matches = self.matcher.match(predictions, [t.classes for t in targets], [t.masks for t in targets])
        except NonFiniteError as error:
            failure = error
        _raise_in_all_processes(failure)
        return matches

    def _positives(self, matches: Sequence[Match], targets: Sequence[Targets], *, with_stuff: bool) -> Positives:
        counts, images, kernels, classes, masks = [], [], [], [], []
        for b, ((matched, instances), target) in enumerate(zip(matches, targets)):
            image_kernels, image_classes = [matched], [target.classes[instances]]
            masks.append(target.masks[instances])
            if with_stuff:
                image_kernels.append(self.kernel_of_class[target.stuff_classes])
                image_classes.append(target.stuff_classes)
                masks.append(target.stuff_masks)
            kernels.extend(image_kernels)
            classes.extend(image_classes)
            counts.append(sum(map(len, image_kernels)))
            images.append(matched.new_full((counts[-1],), b))
        return Positives(counts, *map(torch.cat, (images, kernels, classes, masks)))

    def _class_loss(self, logits: torch.Tensor, positives: Positives) -> torch.Tensor:
        one_hot = torch.zeros_like(logits)
        index = (positives.images, positives.kernels, positives.classes)
        one_hot.index_put_(index, logits.new_ones(()))  # made on the device; a number would be copied there
        total = focal_loss(logits, one_hot, self.class_mask.to(logits.dtype), **self.focal)
        count = len(positives.kernels)
        if self.global_normalizers:
            return self.weights.class_ * total / max(count, 1) * self._share(count, logits)
        return self.weights.class_ * total / average_over_ranks(count, logits).clamp(min=1)

    def _mask_losses(self, mask_logits: torch.Tensor, positives: Positives, stage: int) -> Dict[str, torch.Tensor]:
        losses = {}
        logits = mask_logits[positives.images, positives.kernels]
        if self.weights.mask:
            loss = mask_loss(logits, positives.masks)
            losses[f"loss_mask_s{stage}"] = self.weights.mask * loss * self._share(logits.numel(), logits)
        if self.weights.dice:
            loss = dice_loss(logits, positives.masks)
            losses[f"loss_dice_s{stage}"] = self.weights.dice * loss * self._share(len(logits), logits)
        if self.weights.rank:
            labels = rank_targets(positives)
            loss = kernel_cross_entropy(mask_logits, labels, UNOWNED)
            losses[f"loss_rank_s{stage}"] = self.weights.rank * loss * self._share(labels.numel(), logits)
        return losses

    def _dense_loss(self, logits: torch.Tensor, matches: Sequence[Match], targets: Sequence[Targets]) -> torch.Tensor:
        background = self.bank.num_classes
        labels = torch.stack([dense_labels(*item, background) for item in zip(targets, matches)])
        total = dense_focal_loss(logits, labels, **self.focal)
        count = (labels != background).sum()
        return self.weights.dense * total / count.clamp(min=1) * self._share(count, logits)


def _raise_in_all_processes(failure: Optional[NonFiniteError]) -> None:
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


def scalar_like(value: "float | torch.Tensor", like: torch.Tensor) -> torch.Tensor:
    """A number as a scalar of the given tensor's type and device, where it is made, not copied to."""
    return value.to(like) if isinstance(value, torch.Tensor) else like.new_full((), value)


def average_over_ranks(value: "float | torch.Tensor", like: torch.Tensor) -> torch.Tensor:
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
    masks, kernels = positives.masks.split(positives.counts), positives.kernels.split(positives.counts)
    return torch.stack([last_nonzero(*item, background=UNOWNED) for item in zip(masks, kernels)])


def dense_labels(targets: Targets, match: Match, background: int) -> torch.Tensor:
    """Class of every pixel for the static semantic logits: int64 [h, w].

    Stuff is painted first, the matched things over it in the order of their kernels; the rest is background.
    """
    _, instances = match
    masks = torch.cat([targets.stuff_masks, targets.masks[instances]])
    classes = torch.cat([targets.stuff_classes, targets.classes[instances]])
    return last_nonzero(masks, classes, background)


def _labels(targets: Sequence[Targets]) -> torch.Tensor:
    return torch.stack([target.sem_seg for target in targets])
