"""Sampled points at which masks are compared with the ground truth, instead of every pixel.

They are those of Mask2Former (arXiv:2112.01527, Sec. 3.2.2): one uniform set of an image for what compares all
kernels (matching, rank and dense loss, the cross entropy of label maps), and for the mask and dice loss of each kernel
the points where its mask is least certain, as in PointRend (arXiv:1912.08193, Sec. 3.1). Nothing is up-sampled then:
logits are read at the head's resolution, ground truth at that of the input; both bilinearly, but for labels.

Shapes: as in :mod:`.structures`; Hp x Wp is the padded input. L points are held as a map of 1 x L, so that they take
the place of maps of h x w. Points are (x, y) from 0 to 1 over the padded input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .layers import sample, upsample_masks
from .loss_batches import Comparison, LossBatch
from .structures import Targets
from .targets import MASKS_AT_ONCE

# At most this share of the pixels of the up-sampled masks is sampled: small images have few
LARGEST_SHARE = 0.25
# PointRend's rule: candidates per point, and the share of the points that are the least certain candidates
CANDIDATES = 3
UNCERTAIN_SHARE = 0.75


class SampledPoints(Comparison):
    """L points of every image, drawn inside of it.

    The draws depend on ``Targets.seed`` and the stage alone.
    """

    def __init__(self, targets: Sequence[Targets], like: torch.Tensor, mask_size: tuple[int, int], num_points: int):
        """
        Args:
            targets: with masks of full resolution, uint8 [., Hp, Wp].
            like: a tensor of the type and device of the logits.
            mask_size: height and width that up-sampled masks would have.
            num_points: L, where that is not more than LARGEST_SHARE of the up-sampled pixels.
        """
        self.full_targets, self._mask_size = targets, mask_size
        self.num_points = max(1, min(num_points, round(LARGEST_SHARE * mask_size[0] * mask_size[1])))
        self._seeds = [seed_of(target) for target in targets]
        self._extents = [self._extent(target) for target in targets]
        self._points = torch.stack(
            [self._uniform(b, self._generator(b, like), (1, self.num_points), like) for b in range(len(targets))]
        )
        self.targets = [self._at_points(target, points) for target, points in zip(targets, self._points)]

    def read(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """[B, N, H, W] -> [B, N, 1, L], at one uniform set for all kernels of an image."""
        return sample(mask_logits, self._points)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Class of the pixel that each point is in, or the ignore value: int64 [B, 1, L]."""
        maps = torch.stack([target.sem_seg for target in self.full_targets])
        height, width = maps.shape[-2:]
        x = (self._points[..., 0] * width).long().clamp(max=width - 1)
        y = (self._points[..., 1] * height).long().clamp(max=height - 1)
        return maps.flatten(1).gather(1, (y * width + x)[:, 0])[:, None]

    def label_pairs(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, 1, L] and [B, 1, L], at one uniform set for all kernels of an image."""
        return self.read(logits), self.labels

    def positive_pairs(self, batch: LossBatch, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, 1, L] each, at points of each kernel's own."""
        positives = batch.positives(stage)
        logits = batch.mask_logits(stage)[positives.image_index, positives.kernel_index]
        pairs = zip(logits.split(positives.counts), positives.target_index.split(positives.counts))
        found = [self._image_pairs(b, (stage, batch.stream), *pair) for b, pair in enumerate(pairs)]
        return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])

    def positive_masks(self, batch: LossBatch, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Comparison`: at every pixel, since small objects have too few points."""
        positives = batch.positives(stage)
        logits = batch.mask_logits(stage).detach()[positives.image_index, positives.kernel_index]
        # The masks are the batch, which may be empty, as channels may not
        masks = [upsample_masks(some[:, None])[:, 0] > 0 for some in logits.split(MASKS_AT_ONCE)]
        index = positives.target_index.split(positives.counts)
        return torch.cat(masks), torch.cat([own[some] for own, some in zip(self._upsampled_targets, index)])

    @functools.cached_property
    def _upsampled_targets(self) -> list[torch.Tensor]:
        """Per image: instances and stuff at the pixels of the up-sampled masks, bool [., h, w]."""
        found = []
        for target in self.full_targets:
            parts = torch.cat([target.masks, target.stuff_masks])[:, None].split(MASKS_AT_ONCE)
            # Resized as where masks are compared at every pixel
            resized = [F.interpolate(x.float(), self._mask_size, mode="bilinear")[:, 0] > 0.5 for x in parts if len(x)]
            found.append(torch.cat(resized) if resized else target.masks.new_zeros(0, *self._mask_size).bool())
        return found

    def foreground_count(self, batch: LossBatch, labels: torch.Tensor, background: int) -> torch.Tensor:
        """Pixels of the up-sampled maps that are not the background, times points per pixel; labels are not read."""
        count = self._points.new_zeros(())  # not in a half type, which ends at 65,504
        for target, extent, (_, instances) in zip(self.full_targets, self._extents, batch.matches[0]):
            covered = torch.cat([target.stuff_masks, target.masks[instances]]).any(dim=0)
            covered = F.interpolate(covered[None, None].float(), self._mask_size, mode="bilinear") > 0
            num_pixels = extent[0] * self._mask_size[1] * extent[1] * self._mask_size[0]
            count += covered.sum().to(count) * (self.num_points / num_pixels)
        return count

    def _image_pairs(
        self, image: int, key: tuple[int, ...], logits: torch.Tensor, target_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets of the P kernels of one image at their points: [P, H, W] -> [P, 1, L] each."""
        generator = self._generator(image, logits, *key)
        points = self._uncertain(image, generator, logits)
        full = self.full_targets[image]
        masks = torch.cat([full.masks, full.stuff_masks])
        return sample(logits[:, None], points)[:, 0], sample_masks(masks, target_index, points)

    def _uncertain(self, image: int, generator: torch.Generator, logits: torch.Tensor) -> torch.Tensor:
        """PointRend's rule for logits [P, H, W]: [P, 1, L, 2]."""
        count, num_uncertain = len(logits), round(UNCERTAIN_SHARE * self.num_points)
        candidates = self._uniform(image, generator, (count, 1, CANDIDATES * self.num_points), logits)
        with torch.no_grad():
            certainty = sample(logits[:, None], candidates)[:, 0].abs()
        index = certainty.topk(num_uncertain, largest=False).indices
        chosen = candidates.gather(2, index[..., None].expand(-1, -1, -1, 2))
        others = self._uniform(image, generator, (count, 1, self.num_points - num_uncertain), logits)
        return torch.cat([chosen, others], dim=2)

    def _uniform(
        self, image: int, generator: torch.Generator, shape: tuple[int, ...], like: torch.Tensor
    ) -> torch.Tensor:
        """Points inside of an image: [*shape, 2]. In float32, so that a model of another type has the same ones."""
        points = torch.rand(*shape, 2, generator=generator, device=like.device)
        width, height = self._extents[image]
        return torch.stack([points[..., 0] * width, points[..., 1] * height], dim=-1).to(like.dtype)

    def _extent(self, target: Targets) -> tuple[float, float]:
        """Share of the padded input that an image covers, (across, down)."""
        height, width = target.masks.shape[-2:]
        return target.image_size[1] / width, target.image_size[0] / height

    def _generator(self, image: int, like: torch.Tensor, *key: int) -> torch.Generator:
        return generator_of(self._seeds[image], like.device, *key)

    def _at_points(self, target: Targets, points: torch.Tensor) -> Targets:
        """The target with its masks read at the points [1, L, 2]: [., 1, L]."""
        masks, stuff_masks = (
            sample_masks(x, torch.arange(len(x), device=x.device), points.expand(len(x), -1, -1, -1))
            for x in (target.masks, target.stuff_masks)
        )
        return target._replace(masks=masks, stuff_masks=stuff_masks)


def seed_of(target: Targets) -> int:
    """The image's seed. Images that do not come from a loader have none: theirs follows PyTorch's generator."""
    return int(torch.randint(2**62, ())) if target.seed is None else target.seed


def generator_of(seed: int, device: torch.device, *key: int) -> torch.Generator:
    """A generator for one purpose, which the key names, of the image with a seed."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def sample_masks(masks: torch.Tensor, index: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Some masks of 0 and 1 at their own points, a few of them at a time.

    Args:
        masks: uint8 [G, H, W].
        index: int64 [P], which masks.
        points: [P, 1, L, 2].

    Returns:
        [P, 1, L], of the points' type.
    """
    parts = [
        sample(masks[some, None].to(places.dtype), places)[:, 0]
        for some, places in zip(index.split(MASKS_AT_ONCE), points.split(MASKS_AT_ONCE))
    ]
    return torch.cat(parts) if parts else points.new_zeros(0, *points.shape[1:3])
