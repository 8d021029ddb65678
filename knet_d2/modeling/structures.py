"""The data that flows through a K-Net.

Shapes:
    B: images in the batch          N: kernels, matched ones first      K: classes, things first
    C: channels of the feature      H, W: size of the feature           S: kernel update stages
    G: instances of an image        U: stuff classes in an image        h, w: size of the masks in the losses
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Places(NamedTuple):
    """Where in an image its N matched kernels are read, by a map of the instances' centres; without gradients.

    Attributes:
        cells: int64 [B, N_m] of the matched kernels, y W + x of the cell in a map of H x W.
        probs: [B, N_m], probabilities that the cells are centres.
        class_offsets: [B, N_m], added to the logits of all classes at every stage.
    """

    cells: torch.Tensor
    probs: torch.Tensor
    class_offsets: torch.Tensor


class MaskInputs(NamedTuple):
    """What the matched kernels' own networks make masks of, see :mod:`.mask_network`.

    Attributes:
        local: [B, w, H, W], the same for all kernels.
        across, down: [B, N, W] and [B, N, H], positions of columns and rows relative to the kernels' places.
    """

    local: torch.Tensor
    across: torch.Tensor
    down: torch.Tensor


class KernelState(NamedTuple):
    """What the producer of the static kernels hands to the cascade.

    Attributes:
        feature: F, [B, C, H, W], which all kernels are convolved with.
        kernels: K_0, [B, N, C].
        mask_logits: M_0, [B, N, H, W].
        semantic_logits: S_0, [B, K, H, W], or None where M_0 are the semantic logits themselves.
        center_logits: of a map of the instances' centres, [B, H, W], which learns by the term "center", or None.
        places: of the matched kernels, where they are read from the image, or None.
        localization_feature: F_loc, [B, C, H, W], which first masks are convolved with; in training only.
        mask_inputs: of the matched kernels' own networks, or None where they have none.
        pyramid_feature: [B, C', H, W], see :class:`.cascade.PooledClasses`; None without these.
    """

    feature: torch.Tensor
    kernels: torch.Tensor
    mask_logits: torch.Tensor
    semantic_logits: torch.Tensor | None = None
    center_logits: torch.Tensor | None = None
    places: Places | None = None
    localization_feature: torch.Tensor | None = None
    mask_inputs: MaskInputs | None = None
    pyramid_feature: torch.Tensor | None = None


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
        embeddings: [B, N, E], by which objects are followed, if not by their kernels: those that the model learned, or
            :func:`.association.group_embeddings`.
    """

    features: dict[str, torch.Tensor]
    state: KernelState
    stages: list[StageOutput]
    embeddings: torch.Tensor | None = None


class KernelMemory(NamedTuple):
    """The last stage's kernels in the previous frame of each video of a batch.

    Attributes:
        kernels: [B, N, C].
        known: bool [B], whether there was a previous frame.
    """

    kernels: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of_frame(cls, kernels: torch.Tensor) -> KernelMemory:
        """The memory of a frame with these kernels, [B, N, C]."""
        return cls(kernels, torch.ones(len(kernels), dtype=torch.bool, device=kernels.device))


class TrainingGroup(NamedTuple):
    """The model's own kernels in training, or n further ones beside them, see :mod:`.training_kernels`.

    Attributes:
        name: part of its losses' names, "loss_<term>_<name>_s<stage>"; "" for the model's own.
        state, stages: its kernels, masks and classes; all further kernels stand for things.
        weight: factor on its losses.
        repeats: number of kernels that each instance is matched with.
        instances: per image int64 [m], the instances that the first m kernels have to give; the other kernels of the
            image are padding. None: the kernels are matched.
    """

    name: str
    state: KernelState
    stages: list[StageOutput]
    weight: float
    repeats: int = 1
    instances: list[torch.Tensor] | None = None


class Targets(NamedTuple):
    """Ground truth of one image, padded to the batch's size Hp x Wp.

    Attributes:
        classes: int64 [G], thing class of every instance.
        masks: [G, h, w], the instances' masks at the resolution of the mask losses; soft at their borders.
        stuff_classes: int64 [U], the stuff classes in the image.
        stuff_masks: [U, h, w], likewise.
        sem_seg: int64 [Hp, Wp] or None, class of every pixel, or the ignore value; read by the label_map term and the
            auxiliary head.
        image_size: height and width of the image in the padded input.
        seed: of the points that are drawn for the image.
        track_ids: int64 [G], numbers of the instances that are the same in all frames of a video; None for images.
        covered: [G, H, W], share of each cell of F that an instance covers, where a loss or a group of kernels asks.

    Where masks are compared at sampled points, they are uint8 [., Hp, Wp] instead of soft [., h, w].
    """

    classes: torch.Tensor
    masks: torch.Tensor
    stuff_classes: torch.Tensor
    stuff_masks: torch.Tensor
    sem_seg: torch.Tensor | None = None
    image_size: tuple[int, int] = (0, 0)
    seed: int | None = None
    track_ids: torch.Tensor | None = None
    covered: torch.Tensor | None = None


# (indices of kernels, indices of instances), both int64 [min(N, G)], the first one ascending
Match = tuple[torch.Tensor, torch.Tensor]


class Positives(NamedTuple):
    """The P kernels of a batch that have something to segment, ordered by image, then by kernel.

    Attributes:
        counts: number of positive kernels of each image; they sum to P.
        image_index, kernel_index: int64 [P], which kernels these are.
        classes: int64 [P], the classes that they have to predict.
        target_masks: [P, h, w], the masks that they have to predict.
        target_index: int64 [P], which of its image's masks these are: of ``masks``, followed by ``stuff_masks``.
    """

    counts: list[int]
    image_index: torch.Tensor
    kernel_index: torch.Tensor
    classes: torch.Tensor
    target_masks: torch.Tensor
    target_index: torch.Tensor
