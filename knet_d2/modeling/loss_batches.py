"""Predictions of a group of kernels beside the ground truth, as the terms of the loss read them (paper, Sec. 3.4)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..tasks import KernelBank
from .layers import full_precision, send, upsample_masks
from .losses import mask_ious
from .matcher import Candidates, place_cost
from .structures import Match, Positives, Targets, TrainingGroup
from .targets import own_cells


class Comparison:
    """Where masks are compared with the ground truth: at every pixel of the up-sampled masks (paper, official release).

    :class:`.sampled_points.SampledPoints` compares them at fewer places.

    Attributes:
        targets: of every image, with the masks where all kernels are compared.
        full_targets: as they are given.
    """

    def __init__(self, targets: Sequence[Targets]):
        """
        Args:
            targets: with masks of h x w.
        """
        self.targets = self.full_targets = targets

    def read(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """Logits where all kernels are compared: [B, N, H, W] -> [B, N, h, w]."""
        return upsample_masks(mask_logits)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Class of every pixel, or the ignore value: int64 [B, Hp, Wp]."""
        return torch.stack([target.sem_seg for target in self.full_targets])

    def label_pairs(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, N, H, W] and labels [B, Hp, Wp] of the cross entropy of label maps, which resizes the logits."""
        return logits, self.labels

    def positive_pairs(self, batch: LossBatch, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets that the mask and dice loss of the positive kernels compare, [P, h, w] each."""
        positives = batch.positives(stage)
        return batch.compared_logits(stage)[positives.image_index, positives.kernel_index], positives.target_masks

    def positive_masks(self, batch: LossBatch, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The up-sampled masks of the positive kernels and their targets, bool [P, h, w] each; no gradient passes."""
        logits, targets = self.positive_pairs(batch, stage)
        return logits > 0, targets > 0.5

    def foreground_count(self, batch: LossBatch, labels: torch.Tensor, background: int) -> torch.Tensor:
        """Number of the labels [B, h, w] of the dense loss that are not the background."""
        return (labels != background).sum()


class LossBatch(ABC):
    """Predictions of a group of kernels beside the ground truth; what several terms share is computed when asked for.

    A stage is given by its number: 0 for the static kernels, 1 to S for the update stages. At stage 0, mask, dice and
    rank losses are computed for the matched kernels only; the static stuff kernels learn from the dense term.

    Attributes:
        first_stage: the first one that has losses.
        class_mask: which classes each kernel can take, bool [B or 1, N or 1, K].
        stream: number of the group, which points that are drawn for it depend on.
    """

    first_stage = 0

    def __init__(self, group: TrainingGroup, comparison: Comparison, class_mask: torch.Tensor, stream: int = 0):
        self.state, self.stages, self.comparison = group.state, group.stages, comparison
        self.targets = comparison.targets
        self.class_mask, self.stream = class_mask, stream
        self.matches: list[list[Match]] = []
        self._compared: dict[int, torch.Tensor] = {}
        self._positive_pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def mask_logits(self, stage: int) -> torch.Tensor:
        """All kernels' masks of a stage at the head's resolution: [B, N, H, W]."""
        return self.stages[stage - 1].mask_logits if stage else full_precision(self.state.mask_logits)

    def compared_logits(self, stage: int) -> torch.Tensor:
        """The masks of a stage where all kernels are compared, see :class:`Comparison`: [B, N, h, w]."""
        if stage not in self._compared:
            self._compared[stage] = self.comparison.read(self.mask_logits(stage))
        return self._compared[stage]

    @abstractmethod
    def positives(self, stage: int) -> Positives:
        """What the kernels of a stage have to segment."""

    def positive_pairs(self, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets of the positive kernels' masks: [P, h, w] each."""
        if stage not in self._positive_pairs:
            self._positive_pairs[stage] = self.comparison.positive_pairs(self, stage)
        return self._positive_pairs[stage]

    def mask_qualities(self, stage: int) -> torch.Tensor:
        """IoU of each positive kernel's up-sampled mask with its target: [P].

        At sampled points, many small objects would have no point, and the others too few to tell.
        """
        return mask_ious(*self.comparison.positive_masks(self, stage)).to(self.mask_logits(stage).dtype)


class MatchedBatch(LossBatch):
    """The kernels of a bank, some of which are matched to the instances.

    Attributes:
        matches: per stage, per image: the matches of all stages but the last one, which no loss needs.
    """

    def __init__(
        self,
        group: TrainingGroup,
        comparison: Comparison,
        class_mask: torch.Tensor,
        bank: KernelBank,
        kernel_of_class: torch.Tensor,
        stream: int = 0,
    ):
        """
        Args:
            bank: the kernels of the group.
            kernel_of_class: int64 [K], the index of the fixed kernel that stands for each class.
        """
        super().__init__(group, comparison, class_mask, stream)
        self._bank, self._repeats, self._name = bank, group.repeats, group.name
        self._kernel_of_class = kernel_of_class
        self._positives: dict[int, Positives] = {}

    def compared_logits(self, stage: int) -> torch.Tensor:
        """See :class:`LossBatch`; at stage 0 only the masks of the matched kernels, which come first."""
        if stage == 0 and stage not in self._compared:
            self._compared[0] = self.comparison.read(self.mask_logits(0)[:, : self._bank.num_matched])
        return super().compared_logits(stage)

    def positives(self, stage: int) -> Positives:
        """What the kernels of a stage have to segment.

        Stages 0 and 1 learn from the match of stage 0, and stage i from that of stage i - 1, which is its input.
        """
        if stage not in self._positives:
            matches, has_stuff = self.matches[max(stage - 1, 0)], bool(self._bank.fixed_class_ids)
            self._positives[stage] = self._build_positives(matches, with_stuff=has_stuff and stage > 0)
        return self._positives[stage]

    def placeholder_matches(self) -> list[list[Match]]:
        """Matches without a meaning, of the form of :attr:`matches`."""
        counts = [len(target.classes) for target in self.targets]
        index = [torch.arange(min(self._bank.num_matched, x), device=self.state.feature.device) for x in counts]
        return [[(x, x) for x in index] for _ in self.stages]

    def candidates(self) -> list[list[Candidates]]:
        """Per stage, per image: what is matched to the instances. The static kernels have no classes."""
        num_matched, num_things = self._bank.num_matched, self._bank.num_things
        if not num_matched:
            return []
        # Each instance of a crowded image is given a kernel before another gets its second
        repeats = [min(self._repeats, max(1, num_matched // max(len(t.classes), 1))) for t in self.targets]
        place_costs = self._place_costs() or [None] * len(repeats)
        candidates = []
        for i in range(len(self.stages)):
            name = f"stage {i} of the group {self._name!r}" if self._name else ""
            classes = [None] * len(repeats)
            if i:
                classes = list(self.stages[i - 1].class_logits[:, :num_matched, :num_things])
            images = zip(self.compared_logits(i)[:, :num_matched], classes, place_costs, repeats)
            candidates.append([Candidates(*image, name) for image in images])
        return candidates

    def _place_costs(self) -> list[torch.Tensor] | None:
        """Per image: the costs of the kernels' places, [N, G], or None for kernels without places."""
        places = self.state.places
        if places is None:
            return None
        own = [own_cells(x.covered).flatten(1) for x in self.targets]
        inside = [cells_of_image[:, cells].T for cells_of_image, cells in zip(own, places.cells)]
        return [place_cost(*item) for item in zip(places.probs, inside)]

    def _build_positives(self, matches: Sequence[Match], *, with_stuff: bool) -> Positives:
        counts, images, kernels, classes, masks, index = [], [], [], [], [], []
        for b, ((matched, instances), target) in enumerate(zip(matches, self.targets)):
            image_kernels, image_classes = [matched], [target.classes[instances]]
            masks.append(target.masks[instances])
            index.append(instances)
            if with_stuff:
                image_kernels.append(self._kernel_of_class[target.stuff_classes])
                image_classes.append(target.stuff_classes)
                masks.append(target.stuff_masks)
                number = len(target.masks)
                index.append(torch.arange(number, number + len(target.stuff_masks), device=instances.device))
            kernels.extend(image_kernels)
            classes.extend(image_classes)
            counts.append(sum(map(len, image_kernels)))
            images.append(matched.new_full((counts[-1],), b))
        return Positives(counts, *map(torch.cat, (images, kernels, classes, masks, index)))


class AssignedBatch(LossBatch):
    """Kernels that start from an instance of their own, and have to give this instance; padding may follow them."""

    first_stage = 1

    def __init__(self, group: TrainingGroup, comparison: Comparison, class_mask: torch.Tensor, stream: int):
        """class_mask: of every kernel that is not padding, bool [1, 1 or N, K]."""
        counts = torch.tensor([len(x) for x in group.instances])
        is_used = torch.arange(group.state.kernels.shape[1]) < counts[:, None]
        is_used = send(is_used, group.state.feature.device)[..., None]
        super().__init__(group, comparison, is_used & class_mask, stream)
        self._instances = group.instances

    def positives(self, stage: int) -> Positives:
        """The same for every stage."""
        return self._assigned

    @functools.cached_property
    def _assigned(self) -> Positives:
        counts = [len(x) for x in self._instances]
        chosen = list(zip(self.targets, self._instances))
        return Positives(
            counts,
            torch.cat([x.new_full((len(x),), b) for b, x in enumerate(self._instances)]),
            torch.cat([torch.arange(count, device=self.state.feature.device) for count in counts]),
            torch.cat([target.classes[index] for target, index in chosen]),
            torch.cat([target.masks[index] for target, index in chosen]),
            torch.cat(self._instances),
        )
