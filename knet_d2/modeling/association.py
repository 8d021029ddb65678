"""By what objects are followed, and what a K-Net learns for it: association embedding, kernel linking, kernel fusing.

The three are switches of MODEL.KNET.VIDEO (Video K-Net, CVPR 2022). Without any, a model has none of these parameters
and computes what an image model computes.

Shapes: as in :mod:`.structures`; E: channels of an embedding; N_m: matched kernels, which come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, DataError
from ..tasks import VIDEO_SWITCHES, KernelBank, get_task
from .cascade import AdaptiveKernelUpdate, KernelInteraction, KernelUpdateCascade, mean_under_masks
from .layers import no_autocast
from .losses import contrastive_loss, cosine_loss
from .structures import KernelMemory, KernelState, Match, NetworkOutput, StageOutput, Targets

LOSS_NAMES = ("loss_track_contrast", "loss_track_cosine")


def group_embeddings(feature: torch.Tensor, mask_logits: torch.Tensor, num_matched: int) -> torch.Tensor:
    """By what objects are followed if kernels only correct masks: the mean feature under each mask, centred.

    What all objects of an image have in common is subtracted. It would make all cosines alike, so that the tracker's
    softmaxes could not tell the objects apart.

    Args:
        feature: F, [B, C, H, W].
        mask_logits: [B, N, H, W].
        num_matched: N_m.

    Returns:
        [B, N, C], 0 for the fixed kernels.
    """
    means = mean_under_masks(mask_logits[:, :num_matched], feature)
    return F.pad(means - means.mean(dim=1, keepdim=True), (0, 0, 0, mask_logits.shape[1] - num_matched))


class EmbeddingHead(nn.Sequential):
    """Kernels to association embeddings, [..., C] -> [..., E] ("KAE")."""

    def __init__(self, dim: int, embedding_dim: int):
        super().__init__(
            *(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim)),
            *(nn.Linear(dim, embedding_dim), nn.ReLU(), nn.Linear(embedding_dim, embedding_dim), nn.ReLU()),
            nn.Linear(embedding_dim, embedding_dim),
        )


class KernelFusing(nn.Module):
    """Mixes the previous frame's kernels with the group features of the current one ("KF")."""

    def __init__(self, dim: int, *, update_dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.kernel_update = AdaptiveKernelUpdate(update_dim)
        self.interaction = KernelInteraction(dim, num_heads=num_heads, ffn_dim=ffn_dim)

    def forward(self, group_features: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """[B, N, C] each: the current group features, the previous frame's kernels -> the last stage's input."""
        return self.interaction(self.kernel_update(group_features, kernels))


class VideoKernels(nn.Module):
    """The cascade of a model that learns to follow objects, and the embeddings of its kernels."""

    def __init__(
        self,
        bank: KernelBank,
        *,
        dim: int,
        embedding_dim: int | None,
        linking: bool,
        fusing: bool,
        interaction: dict[str, int],
        update_dim: int,
        loss_weights: tuple[float, float],
    ):
        """
        Args:
            dim: C.
            embedding_dim: E; None: objects are followed by their kernels.
            linking: whether kernels attend to the previous frame's kernels before the embedding.
            fusing: whether the previous frame's kernels enter the last stage.
            interaction: ``num_heads`` and ``ffn_dim`` of both.
            update_dim: channels of the adaptive update of kernel fusing.
            loss_weights: of the contrastive and of the cosine loss.
        """
        super().__init__()
        self.num_matched, self.dim = bank.num_matched, dim
        self.linking = KernelInteraction(dim, **interaction) if linking else None
        self.embedding = EmbeddingHead(dim, embedding_dim) if embedding_dim else None
        self.fusing = KernelFusing(dim, update_dim=update_dim, **interaction) if fusing else None
        self.loss_weights = loss_weights
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    def uses_memory(self) -> bool:
        """Whether the previous frame's kernels change anything."""
        return self.linking is not None or self.fusing is not None

    def forward(
        self, cascade: KernelUpdateCascade, state: KernelState, memory: KernelMemory | None
    ) -> tuple[list[StageOutput], torch.Tensor | None]:
        """The stages, and embeddings [B, N, E] of the last stage's kernels (0 for the fixed ones), or None.

        Args:
            memory: of the previous frames; None: there are none. Without a previous frame, the current kernels stand
                in for its kernels.
        """

        def fuse(group_features: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
            assert self.fusing is not None
            return self.fusing(group_features, _previous(memory, kernels))

        stages = cascade(state, None if self.fusing is None else fuse)
        if self.embedding is None:
            return stages, None
        kernels = stages[-1].kernels
        with no_autocast(kernels):
            things = kernels[:, : self.num_matched]
            if self.linking is not None:
                things = self.linking(things, _previous(memory, kernels)[:, : self.num_matched])
            embeddings = self.embedding(things)
        return stages, F.pad(embeddings, (0, 0, 0, kernels.shape[1] - self.num_matched))

    def losses(
        self, embeddings: torch.Tensor, matches: Sequence[Match], targets: Sequence[Targets]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Weighted losses of the embeddings, each with the number of things that it is a mean over.

        Args:
            embeddings: [2 B, N, E] of B key frames, followed by their reference frames.
            matches: of these frames, the input of the last stage.
            targets: of these frames, with ``track_ids``.
        """
        frames = [_matched(*frame) for frame in zip(embeddings, matches, targets)]
        halves = frames[: len(frames) // 2], frames[len(frames) // 2 :]
        pairs = [(key, other, ids[:, None] == other_ids) for (key, ids), (other, other_ids) in zip(*halves)]
        nothing = embeddings.sum() * 0  # parameters get gradients also where there is nothing to compare
        found = {}
        for name, loss, weight in zip(LOSS_NAMES, (contrastive_loss, cosine_loss), self.loss_weights):
            sums, numbers = zip(*(loss(*pair) for pair in pairs))
            number = torch.stack(numbers).sum()
            found[name] = (weight * (nothing + torch.stack(sums).sum()) / number.clamp(min=1), number)
        return found


def build_video_kernels(cfg: Any, bank: KernelBank) -> VideoKernels | None:
    """What MODEL.KNET.VIDEO asks for; None if it is an image model.

    Raises:
        ConfigError: the options make no sense.
    """
    video, head = cfg.MODEL.KNET.VIDEO, cfg.MODEL.KNET.UPDATE_HEAD
    switches = [key for key in VIDEO_SWITCHES if video[key]]
    if not switches:
        return None
    prefix = f"MODEL.KNET.VIDEO.{switches[0]} = True"
    if not bank.num_matched:
        raise ConfigError(f"{prefix}: a {get_task(cfg).name} model has no objects to follow. Set it to False.")
    if video.LINKING and not video.EMBEDDING:
        raise ConfigError("MODEL.KNET.VIDEO.LINKING = True: it changes embeddings only. Set EMBEDDING to True, too.")
    if video.EMBEDDING_DIM < 1:
        raise ConfigError(f"MODEL.KNET.VIDEO.EMBEDDING_DIM = {video.EMBEDDING_DIM}: use at least 1.")
    if video.REFERENCE_RANGE < 1:
        raise ConfigError(f"MODEL.KNET.VIDEO.REFERENCE_RANGE = {video.REFERENCE_RANGE}: use 1 or more frames.")
    weights = (video.CONTRAST_WEIGHT, video.COSINE_WEIGHT)
    if min(weights) < 0 or not any(weights):
        raise ConfigError(
            f"MODEL.KNET.VIDEO.CONTRAST_WEIGHT = {weights[0]} and COSINE_WEIGHT = {weights[1]}: use 0 or more, and one "
            "above 0."
        )
    return VideoKernels(
        bank,
        dim=cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        embedding_dim=video.EMBEDDING_DIM if video.EMBEDDING else None,
        linking=video.LINKING,
        fusing=video.FUSING,
        interaction={"num_heads": head.NUM_HEADS, "ffn_dim": head.FFN_DIM},
        update_dim=head.FEATURE_DIM,
        loss_weights=weights,
    )


def with_references(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Key frames, followed by their reference frames in the same order; without any, the examples as they are.

    Raises:
        DataError: some examples have a "reference" and some have none.
    """
    references = [x["reference"] for x in examples if "reference" in x]
    if references and len(references) < len(examples):
        missing = next(x for x in examples if "reference" not in x)
        raise DataError(f"{missing.get('file_name', 'A training example')} has no 'reference', but others have one.")
    return [*examples, *references]


def network_of_pairs(model: Any, images: torch.Tensor, image_sizes: torch.Tensor) -> NetworkOutput:
    """The network for key frames, followed by their reference frames, as they follow each other in a video.

    The reference frame is computed first, without a memory. Its kernels are the memory of the key frame.

    Args:
        model: a KNet.
        images: [2 B, C, H, W], the key frames first.
        image_sizes: int64 [2 B, 2].
    """
    (keys, references), (key_sizes, reference_sizes) = images.chunk(2), image_sizes.chunk(2)
    second = model.network(references, reference_sizes)
    first = model.network(keys, key_sizes, KernelMemory.of_frame(second.stages[-1].kernels))
    return NetworkOutput(
        {name: torch.cat([x, second.features[name]]) for name, x in first.features.items()},
        _join(first.state, second.state),
        [_join(*stages) for stages in zip(first.stages, second.stages)],
        _join(first.embeddings, second.embeddings),
    )


def _join(first: Any, second: Any) -> Any:
    """Two batches as one: tensors, None, or named tuples of these."""
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    return type(first)(*(_join(x, y) for x, y in zip(first, second)))


def _previous(memory: KernelMemory | None, kernels: torch.Tensor) -> torch.Tensor:
    """The previous frame's kernels [B, N, C]; the current ones where there is no previous frame."""
    if memory is None:
        return kernels
    return torch.where(memory.known[:, None, None], memory.kernels.to(kernels.dtype), kernels)


def _matched(embeddings: torch.Tensor, match: Match, target: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [P, E] of a frame's matched kernels, and the track ids of their instances, int64 [P]."""
    if target.track_ids is None:
        raise DataError("Frames of a pair have no 'track_ids': DATASETS.TRAIN must name data sets of videos.")
    kernels, instances = match
    return embeddings[kernels], target.track_ids[instances]
