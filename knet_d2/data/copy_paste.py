"""Copy-paste augmentation: objects of another training image on top of an image (Ghiasi et al., arXiv:2012.07177)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances

from ..errors import ConfigError
from ..tasks import VIDEO_SWITCHES, get_task
from .mapper import KNetDatasetMapper

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


class CopyPasteMapper:
    """A mapper that pastes objects of another record of the data set onto an example with a certain probability.

    Both images are augmented on their own before. All draws come from NumPy's generator, which the loader seeds by the
    position of the sample in the run.
    """

    def __init__(self, mapper: Mapper, records: Sequence[dict[str, Any]], sources: Sequence[int], probability: float):
        """
        Args:
            mapper: gives "image" and "instances", perhaps "sem_seg".
            records: of the data set.
            sources: indices of those that have objects to paste.
            probability: with which an image gets objects.
        """
        self._mapper = mapper
        self._records, self._sources = records, sources
        self._probability = probability

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        example = self._mapper(record)
        if np.random.uniform() >= self._probability:
            return example
        start, count = np.random.randint(len(self._sources)), len(self._sources)
        candidates = (self._records[self._sources[(start + i) % count]] for i in range(count))
        other = next((x for x in candidates if x["file_name"] != record["file_name"]), None)
        return example if other is None else paste(example, self._mapper(other))


def with_copy_paste(cfg: CfgNode, mapper: KNetDatasetMapper, records: Sequence[dict[str, Any]]) -> Mapper:
    """The mapper with INPUT.COPY_PASTE, which takes objects of those records that have some.

    Args:
    Raises:
        ConfigError: it is no probability, the task has no instances, or the model learns to follow objects.
    """
    probability, task = cfg.INPUT.COPY_PASTE, get_task(cfg)
    if not 0 <= probability <= 1:
        raise ConfigError(f"INPUT.COPY_PASTE = {probability}: use a probability from 0 to 1.")
    if probability and "instances" not in task.annotations:
        raise ConfigError(
            f"INPUT.COPY_PASTE = {probability}: set it to 0. MODEL.KNET.TASK {task.name!r} has no objects."
        )
    if probability and any(cfg.MODEL.KNET.VIDEO[key] for key in VIDEO_SWITCHES):
        raise ConfigError(
            f"INPUT.COPY_PASTE = {probability}: set it to 0. In pairs of frames, pasted objects would be on no track."
        )
    if not probability:
        return mapper
    # An image without objects would leave its partner as it is, so that fewer images than stated were changed
    num_things = cfg.MODEL.KNET.NUM_THING_CLASSES
    sources = [i for i, x in enumerate(records) if any(c < num_things for c in mapper.annotated_classes(x))]
    return CopyPasteMapper(mapper, records, sources, probability) if sources else mapper


def paste(example: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """An example with some objects of another one on top of it.

    A random number of random objects is taken, at least one, and moved together: where the other image is larger, it
    is cropped at a random place, and where it is smaller, it is placed at one. Objects that lie under the pasted ones
    lose these pixels, or vanish.

    Args:
        example: "image" [C, h, w], "instances" with masks, perhaps "sem_seg" [h, w]; it stays as it is.
        other: the same, of any size.
    """
    own, source = example["instances"], other["instances"]
    if not len(source):
        return example
    size = tuple(example["image"].shape[-2:])
    chosen = np.sort(np.random.permutation(len(source))[: np.random.randint(1, len(source) + 1)])
    spaces = [length - n for length, n in zip(size, other["image"].shape[-2:])]
    offset = [int(np.random.randint(min(space, 0), max(space, 0) + 1)) for space in spaces]
    pasted = moved(source.gt_masks.tensor[chosen], offset, size)
    covered = pasted.any(dim=0)
    masks = torch.cat([own.gt_masks.tensor & ~covered, pasted])
    classes = torch.cat([own.gt_classes, source.gt_classes[chosen]])
    seen = masks.flatten(1).any(dim=1)
    result = {**example, "instances": Instances(size, gt_classes=classes[seen], gt_masks=BitMasks(masks[seen]))}
    for key in {"image", "sem_seg"} & example.keys():
        result[key] = torch.where(covered, moved(other[key], offset, size), example[key])
    return result


def moved(x: torch.Tensor, offset: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """Maps [..., H, W] moved by an offset (down, right) on a canvas of 0 of another size: [..., *size]."""
    canvas = x.new_zeros(*x.shape[:-2], *size)
    targets = tuple(slice(max(start, 0), max(start + n, 0)) for start, n in zip(offset, x.shape[-2:]))
    part = canvas[..., targets[0], targets[1]]
    top, left = (max(-start, 0) for start in offset)
    part.copy_(x[..., top : top + part.shape[-2], left : left + part.shape[-1]])
    return canvas
