"""The data that flows through a K-Net.

Shape legend (used in every docstring of this project):
    B: images in the batch          N: kernels             K: classes (things first, then stuff)
    C: channels of the feature      H, W: feature size     S: kernel update stages
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch


class Assignment(Enum):
    """How the kernels of a group find what they have to segment in training."""

    HUNGARIAN = "hungarian"  # one-to-one matching to the image's instances
    IDENTITY = "identity"  # kernel i segments the group's i-th class, in every image


class KernelGroup(NamedTuple):
    """Consecutive kernels of one kind.

    Attributes:
        count: number of kernels.
        assignment: how its kernels are assigned to targets.
        class_ids: the classes that its kernels can take; with identity assignment, one per kernel.
    """

    count: int  # type: ignore[assignment]  # NamedTuple has a method of this name
    assignment: Assignment
    class_ids: Sequence[int]


class KernelBank:
    """All kernels of a K-Net, as groups; :mod:`knet_d2.tasks` has those of each task (paper, Sec. 3.1)."""

    def __init__(self, groups: Sequence[KernelGroup], num_classes: int):
        """
        Args:
            groups: in the order of the kernel axis; a matched group, if there is one, comes first.
            num_classes: K.
        """
        for group in groups:
            if group.assignment is Assignment.IDENTITY and len(group.class_ids) != group.count:
                raise ValueError(f"{group.count} kernels can't stand for {len(group.class_ids)} classes one by one")
        if any(group.assignment is Assignment.HUNGARIAN for group in groups[1:]):
            raise ValueError("only the first group of a kernel bank can be matched to instances")
        self.groups = tuple(groups)
        self.num_classes = num_classes

    @property
    def num_kernels(self) -> int:
        """N."""
        return sum(group.count for group in self.groups)

    @property
    def num_matched(self) -> int:
        """Number of kernels that are matched to instances; they come first."""
        return sum(group.count for group in self.groups if group.assignment is Assignment.HUNGARIAN)

    @property
    def num_things(self) -> int:
        """Number of thing classes; their ids come first."""
        return sum(len(group.class_ids) for group in self.groups if group.assignment is Assignment.HUNGARIAN)

    @property
    def fixed_class_ids(self) -> list[int]:
        """Class of each of the fixed kernels, which follow the matched ones."""
        return [c for group in self.groups if group.assignment is Assignment.IDENTITY for c in group.class_ids]

    def class_mask(self, device: torch.device | None = None) -> torch.Tensor:
        """Which classes each kernel can take: bool [N, K]. Other columns are neither trained nor read."""
        mask = torch.zeros(self.num_kernels, self.num_classes, dtype=torch.bool, device=device)
        mask[: self.num_matched, : self.num_things] = True
        fixed = range(self.num_matched, self.num_kernels)
        for kernel, class_id in zip(fixed, self.fixed_class_ids):
            mask[kernel, class_id] = True
        return mask


class KernelState(NamedTuple):
    """What the producer of the static kernels hands to the cascade.

    Attributes:
        feature: F, [B, C, H, W], which all kernels are convolved with.
        kernels: K_0, [B, N, C].
        mask_logits: M_0, [B, N, H, W].
        semantic_logits: S_0, [B, K, H, W], or None where M_0 are the semantic logits themselves.
    """

    feature: torch.Tensor
    kernels: torch.Tensor
    mask_logits: torch.Tensor
    semantic_logits: torch.Tensor | None = None


class StageOutput(NamedTuple):
    """What one kernel update stage predicts.

    Attributes:
        kernels: K_i, [B, N, C].
        mask_logits: M_i, [B, N, H, W].
        class_logits: [B, N, K], or None without a class branch.
    """

    kernels: torch.Tensor
    mask_logits: torch.Tensor
    class_logits: torch.Tensor | None = None


class NetworkOutput(NamedTuple):
    """What one pass through the network gives.

    Attributes:
        features: the backbone's, by name.
        state: the static kernels.
        stages: predictions of the S kernel update stages.
    """

    features: dict[str, torch.Tensor]
    state: KernelState
    stages: list[StageOutput]


class Targets(NamedTuple):
    """Ground truth of one image, padded to the batch's size Hp x Wp.

    Attributes:
        classes: int64 [G], thing class of every instance.
        masks: [G, h, w], the instances' masks at the resolution of the mask losses; soft at their borders.
        stuff_classes: int64 [U], the stuff classes in the image.
        stuff_masks: [U, h, w], likewise.
        sem_seg: int64 [Hp, Wp] or None, class of every pixel; the ignore value where nothing is known.
    """

    classes: torch.Tensor
    masks: torch.Tensor
    stuff_classes: torch.Tensor
    stuff_masks: torch.Tensor
    sem_seg: torch.Tensor | None = None


# (indices of kernels, indices of instances), both int64 [min(N, G)], the first one ascending
Match = tuple[torch.Tensor, torch.Tensor]
