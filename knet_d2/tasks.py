"""What a task of segmentation is: its kernels, classes, annotations, losses, results and metric.

Nothing else in the package asks which task a model is for; it asks the :class:`Task` for what it needs to know. What a
new task needs beside its entry of ``TASKS`` is listed in docs/ARCHITECTURE.md.

Shapes: N kernels, K classes (things first, then stuff).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from detectron2.config import CfgNode

from .errors import ConfigError

# Options of MODEL.KNET.VIDEO that make a model learn to follow objects, from pairs of frames
VIDEO_SWITCHES = ("EMBEDDING", "LINKING", "FUSING")


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
    """All kernels of a K-Net, as groups; what distinguishes one task from another (paper, Sec. 3.1)."""

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

    @functools.cached_property
    def num_kernels(self) -> int:
        """N."""
        return sum(group.count for group in self.groups)

    @functools.cached_property
    def num_matched(self) -> int:
        """Number of kernels that are matched to instances; they come first."""
        return sum(group.count for group in self.groups if group.assignment is Assignment.HUNGARIAN)

    @functools.cached_property
    def num_things(self) -> int:
        """Number of thing classes; their ids come first."""
        return sum(len(group.class_ids) for group in self.groups if group.assignment is Assignment.HUNGARIAN)

    @functools.cached_property
    def fixed_class_ids(self) -> list[int]:
        """Class of each of the fixed kernels, which follow the matched ones."""
        return [c for group in self.groups if group.assignment is Assignment.IDENTITY for c in group.class_ids]

    def class_mask(self) -> torch.Tensor:
        """Which classes each kernel can take: bool [N, K]. Other columns are neither trained nor read."""
        mask = torch.zeros(self.num_kernels, self.num_classes, dtype=torch.bool)
        mask[: self.num_matched, : self.num_things] = True
        fixed = range(self.num_matched, self.num_kernels)
        for kernel, class_id in zip(fixed, self.fixed_class_ids):
            mask[kernel, class_id] = True
        return mask


class Task(NamedTuple):
    """A task of segmentation (paper, Sec. 3.1).

    Attributes:
        name: value of MODEL.KNET.TASK.
        groups: (number of matched kernels, thing classes, stuff classes) -> the groups of kernels.
        things: which classes of a data set's metadata become the model's thing classes: "things", or None for none.
        stuff: which become its stuff classes: "stuff" (classes that are stuff only), "all", or None.
        annotations: what is learned from: "instances" (masks and classes of things), "sem_seg" (a class per pixel).
        annotation_files: what a data set must have for that, in words.
        losses: terms of the loss, keys of :data:`knet_d2.modeling.criterion.TERMS`, in the order in which they are
            summed.
        rank_weight: weight of the cross entropy over kernels where MODEL.KNET.LOSS.RANK_WEIGHT leaves it to the task.
        soft_gather: whether group features are assembled by a softmax over the kernels instead of hard masks.
        has_class_branch: whether a stage classifies its kernels; without, each kernel is its class.
        pads_images: whether images of several sizes may share a padded batch in evaluation.
        min_stages: fewest kernel update stages that give a result.
        outputs: results that a model can give; the first one is the default.
    """

    name: str
    groups: Callable[[int, Sequence[int], Sequence[int]], tuple[KernelGroup, ...]]
    things: str | None
    stuff: str | None
    annotations: tuple[str, ...]
    annotation_files: str
    losses: tuple[str, ...]
    rank_weight: float
    soft_gather: bool
    has_class_branch: bool
    pads_images: bool
    min_stages: int
    outputs: tuple[str, ...]

    def bank(self, *, num_matched: int, num_things: int, num_stuff: int) -> KernelBank:
        """The kernels of a model.

        Args:
            num_matched: kernels of the group that is matched to instances, where the task has one.
            num_things, num_stuff: numbers of classes; those of a kind that the task does not have are not counted.
        """
        num_things, num_stuff = num_things if self.things else 0, num_stuff if self.stuff else 0
        num_classes = num_things + num_stuff
        groups = self.groups(num_matched, range(num_things), range(num_things, num_classes))
        return KernelBank(groups, num_classes)

    def checked_outputs(self, outputs: Sequence[str]) -> tuple[str, ...]:
        """The results that MODEL.KNET.TEST.OUTPUTS asks for; none stands for the default.

        Raises:
            ConfigError: the task does not have one of them.
        """
        unknown = sorted(set(outputs) - set(self.outputs))
        if unknown:
            raise ConfigError(f"MODEL.KNET.TEST.OUTPUTS has {unknown}: a {self.name} model gives {self.outputs}.")
        return tuple(outputs) or self.outputs[:1]


# Functions of the module, since a Task is pickled where data loading processes are spawned


def _instance_groups(num_matched: int, things: Sequence[int], stuff: Sequence[int]) -> tuple[KernelGroup, ...]:
    return (KernelGroup(num_matched, Assignment.HUNGARIAN, things),)


def _semantic_groups(num_matched: int, things: Sequence[int], stuff: Sequence[int]) -> tuple[KernelGroup, ...]:
    return (KernelGroup(len(stuff), Assignment.IDENTITY, stuff),)


def _panoptic_groups(num_matched: int, things: Sequence[int], stuff: Sequence[int]) -> tuple[KernelGroup, ...]:
    return _instance_groups(num_matched, things, stuff) + _semantic_groups(num_matched, things, stuff)


_TASKS = (
    Task(
        name="instance",
        groups=_instance_groups,
        things="things",
        stuff=None,
        annotations=("instances",),
        annotation_files="annotations with instance masks",
        losses=("class", "mask", "dice", "rank", "dense", "center"),
        rank_weight=0.0,
        soft_gather=False,
        has_class_branch=True,
        pads_images=True,
        min_stages=1,
        outputs=("instances",),
    ),
    Task(
        name="panoptic",
        groups=_panoptic_groups,
        things="things",
        stuff="stuff",
        annotations=("instances", "sem_seg"),
        annotation_files="a panoptic PNG with segments, or instance masks and a label map",
        losses=("class", "mask", "dice", "rank", "dense", "center"),
        rank_weight=0.1,
        soft_gather=False,
        has_class_branch=True,
        pads_images=True,
        min_stages=1,
        outputs=("panoptic_seg", "instances", "sem_seg"),
    ),
    Task(
        name="semantic",
        groups=_semantic_groups,
        things=None,
        stuff="all",
        annotations=("sem_seg",),
        annotation_files="a label map or a panoptic PNG",
        losses=("label_map",),
        rank_weight=1.0,
        soft_gather=True,
        has_class_branch=False,
        pads_images=False,
        min_stages=0,
        outputs=("sem_seg",),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def get_task(cfg: CfgNode) -> Task:
    """The task of a config.

    Raises:
        ConfigError: MODEL.KNET.TASK names none.
    """
    name = cfg.MODEL.KNET.TASK
    if name not in TASKS:
        raise ConfigError(f"MODEL.KNET.TASK = {name!r}: use one of {', '.join(TASKS)}.")
    return TASKS[name]


def build_bank(cfg) -> KernelBank:
    """The kernels of a config's model; its classes must be resolved (see resolve_classes)."""
    knet = cfg.MODEL.KNET
    return get_task(cfg).bank(
        num_matched=knet.NUM_KERNELS, num_things=knet.NUM_THING_CLASSES, num_stuff=knet.NUM_STUFF_CLASSES
    )
