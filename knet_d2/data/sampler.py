"""Selects the samples of each training batch, as a pure function of the seed and the iteration.

The selection does not depend on earlier iterations. A resumed run therefore gets exactly the batches of an
uninterrupted run, and a checkpoint needs no state of the loader.
"""

import bisect
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch.utils.data


class SampleKey(NamedTuple):
    """The address of a training sample.

    Attributes:
        index: index of the record in the data set.
        position: position in the endless stream of training samples; it seeds the random augmentation.
    """

    index: int  # type: ignore[assignment]  # NamedTuple has a method of this name
    position: int


class VideoSampler(torch.utils.data.Sampler):
    """Yields this process's share of the frames of a data set in their order; no video is divided."""

    def __init__(self, records: list[dict], rank: int, world_size: int) -> None:
        """
        Args:
            records: with "video_id"; those of one video follow each other.
            rank, world_size: number of this process, and of all processes.
        """
        videos = [list(frames) for _, frames in groupby(range(len(records)), key=lambda i: records[i]["video_id"])]
        shares: list[list[list[int]]] = [[] for _ in range(world_size)]
        for frames in sorted(videos, key=lambda x: -len(x)):  # the longest one first, to the process with the fewest
            min(shares, key=lambda share: sum(map(len, share))).append(frames)
        self._indices = [i for frames in sorted(shares[rank]) for i in frames]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class TrainingBatchSampler(torch.utils.data.Sampler):
    """Yields this process's share of each batch, a list of SampleKey, without end.

    Each epoch goes through the data set in a new random order. A batch may contain the end of one epoch and the start
    of the next. With groups, all samples of a batch are of one group: each group is a separate stream with its own
    epochs, and gets a number of batches in proportion to its size. With repeat factors, an epoch has each sample as
    often as its factor says; the fraction of a factor is the probability of one more time.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
        groups: list[int] | None = None,
        repeat_factors: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            size: number of samples in the data set.
            batch_size: number of samples in a batch, over all processes.
            seed: a number >= 0, the same for all processes.
            rank, world_size: number of this process, and of all processes.
            start_iter: the first iteration.
            groups: group number of each sample; None: all samples are one group.
            repeat_factors: mean number of times that an epoch has each sample, at least 1; None: once.
        """
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not divisible by world_size {world_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iter = start_iter
        labels = np.zeros(size, np.int64) if groups is None else np.asarray(groups)
        self._groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._repeat_factors = repeat_factors
        # The share of a group in the batches: the number of samples in its epochs
        self._sizes = [
            len(group) if repeat_factors is None else round(repeat_factors[group].sum()) for group in self._groups
        ]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        # First place of each epoch in the stream of a group, as far as it is known
        self._starts = [[0] for _ in self._groups]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        share = self.batch_size // self.world_size
        iteration = self.start_iter
        while True:
            yield self.batch(iteration)[self.rank * share : (self.rank + 1) * share]
            iteration += 1

    def batch(self, iteration: int) -> list[SampleKey]:
        """Return the batch of an iteration, over all processes."""
        group, turn = self._turn(iteration)
        keys = []
        for i in range(self.batch_size):
            index = self._sample(group, turn * self.batch_size + i)
            keys.append(SampleKey(index, iteration * self.batch_size + i))
        return keys

    def _turn(self, iteration: int) -> tuple[int, int]:
        """Return the group that an iteration draws from, and the number of earlier iterations of this group.

        With two groups of a and b samples, the second group gets floor(i * b / (a + b)) of the first i iterations.
        With more groups, the same rule separates each group from all later groups.
        """
        for group, size in enumerate(self._sizes[:-1]):
            total = sum(self._sizes[group:])
            later = iteration * (total - size) // total
            if (iteration + 1) * (total - size) // total == later:
                return group, iteration - later
            iteration = later
        return len(self._sizes) - 1, iteration

    def _sample(self, group: int, place: int) -> int:
        starts = self._starts[group]
        while starts[-1] <= place:
            starts.append(starts[-1] + len(self._members(group, len(starts) - 1)))
        epoch = bisect.bisect_right(starts, place) - 1
        if self._orders.get(group, (None,))[0] != epoch:
            members = self._members(group, epoch)
            self._orders[group] = (epoch, np.random.default_rng([self.seed, group, epoch]).permutation(members))
        return int(self._orders[group][1][place - starts[epoch]])

    def _members(self, group: int, epoch: int) -> np.ndarray:
        """Return the samples of an epoch of a group, by index; repeated ones follow each other."""
        members = self._groups[group]
        if self._repeat_factors is None:
            return members
        factors = self._repeat_factors[members]
        more = np.random.default_rng([self.seed, group, epoch, 1]).random(len(members)) < factors % 1
        return np.repeat(members, factors.astype(np.int64) + more)
