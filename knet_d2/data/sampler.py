"""Which samples a training batch is made of: a pure function of the seed and the iteration.

Because nothing depends on what happened before, a run that is resumed at an iteration sees exactly what it would have
seen, and no loader state needs saving.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.utils.data


class SampleKey(NamedTuple):
    """index: place in the data set; position: place in the endless stream of training samples."""

    index: int  # type: ignore[assignment]  # NamedTuple has a method of this name
    position: int


class TrainingBatchSampler(torch.utils.data.Sampler):
    """An endless stream of this process's share of each batch: lists of SampleKey.

    Every data set is walked through in a new order each epoch, and batches run on from one epoch to the next. With
    groups, a batch has samples of one group only: each group is such a stream of its own, and the batches are dealt
    out to the groups in proportion to their sizes.
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
    ) -> None:
        """
        Args:
            size: samples in the data set.
            batch_size: samples in a batch of all processes together.
            seed: a number >= 0, the same for all processes.
            rank, world_size: this process's number, and how many there are.
            start_iter: the first iteration.
            groups: a number per sample; samples with the same number are batched together. None: no groups.
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
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[list[SampleKey]]:
        share = self.batch_size // self.world_size
        iteration = self.start_iter
        while True:
            yield self.batch(iteration)[self.rank * share : (self.rank + 1) * share]
            iteration += 1

    def batch(self, iteration: int) -> list[SampleKey]:
        """The whole batch of an iteration, of all processes."""
        group, turn = self._turn(iteration)
        keys = []
        for i in range(self.batch_size):
            index = self._sample(group, turn * self.batch_size + i)
            keys.append(SampleKey(index, iteration * self.batch_size + i))
        return keys

    def _turn(self, iteration: int) -> tuple[int, int]:
        """The group whose turn an iteration is, and how many turns the group had before.

        With two groups of a and b samples, group 1 had floor(i * b / (a + b)) turns in the first i iterations; more
        groups are told apart in the same way, one against all later ones.
        """
        remaining = [len(group) for group in self._groups]
        for group, size in enumerate(remaining[:-1]):
            total = sum(remaining[group:])
            later = iteration * (total - size) // total
            if (iteration + 1) * (total - size) // total == later:
                return group, iteration - later
            iteration = later
        return len(remaining) - 1, iteration

    def _sample(self, group: int, place: int) -> int:
        members = self._groups[group]
        epoch, offset = divmod(place, len(members))
        if self._orders.get(group, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, group, epoch]).permutation(members)
            self._orders[group] = (epoch, order)
        return int(self._orders[group][1][offset])
