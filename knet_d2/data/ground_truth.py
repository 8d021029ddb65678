"""Ground truth of one image as it is sent to a device: checked, and eight mask pixels in each byte.

The loaders make it in their workers, so that the main process neither checks labels nor copies large masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks

from ..errors import DataError
from ..tasks import KernelBank

# Largest label that is counted by bincount(), whose memory grows with it
_LARGEST_COUNTED = 2**16


class GroundTruth(NamedTuple):
    """What the model learns from one image of h x w pixels.

    Attributes:
        classes: int64 [G], thing class of every instance.
        packed_masks: uint8 [G, h, ceil(w / 8)], the instances' masks; the first pixel is the highest bit.
        stuff_classes: int64 [U], the stuff classes in the image, ascending; empty where stuff is no separate target.
        labels: [h, w] or None, class of every pixel, or the ignore value; uint8 where that holds them.
        size: (h, w).
        seed: of what is drawn for this image in the losses; it follows the image's position in the run. None: unknown.
        track_ids: int64 [G], numbers of the instances that are the same in all frames of a video; None for images.
    """

    classes: torch.Tensor
    packed_masks: torch.Tensor
    stuff_classes: torch.Tensor
    labels: torch.Tensor | None
    size: tuple[int, int]
    seed: int | None = None
    track_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> GroundTruth:
        """A copy on a device. From pinned memory the copy does not make the CPU wait."""
        tensors = {name: x for name, x in self._asdict().items() if isinstance(x, torch.Tensor)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return self._replace(**moved)

    def masks(self) -> torch.Tensor:
        """The instances' masks: uint8 [G, h, w], 0 and 1."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.packed_masks.device)
        bits = self.packed_masks.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1)
        return bits.flatten(-2)[..., : self.size[1]]


class CompactMapper:
    """A mapper whose training examples have "ground_truth" in place of "instances" and "sem_seg"."""

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]], bank: KernelBank, ignore_value: int):
        self._mapper, self._bank, self._ignore_value = mapper, bank, ignore_value

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        return compact_example(self._mapper(record), self._bank, self._ignore_value)


def compact_example(x: dict[str, Any], bank: KernelBank, ignore_value: int) -> dict[str, Any]:
    """A training example with "ground_truth" in place of "instances" and "sem_seg"; see :func:`ground_truth_of`."""
    kept = {key: value for key, value in x.items() if key not in ("instances", "sem_seg")}
    truth = ground_truth_of(x, bank, ignore_value)
    # The loader seeds the generator by the image's position in the run, and restores it afterwards
    return {**kept, "ground_truth": truth._replace(seed=int(torch.randint(2**62, ())))}


def ground_truth_of(x: dict[str, Any], bank: KernelBank, ignore_value: int) -> GroundTruth:
    """The checked ground truth of a training example.

    Args:
        x: "image" with "ground_truth", or with "instances" and / or "sem_seg" as the mapper gives them; "seed" if the
            image has one.
        bank: tells which of the two are needed, and which classes there are.
        ignore_value: label of pixels without a class.

    Raises:
        DataError: something is missing in x, of another size than the image, or a class is out of range.
    """
    if "ground_truth" in x:
        return x["ground_truth"]
    height, width = x["image"].shape[-2:]
    classes, masks = torch.zeros(0, dtype=torch.int64), torch.zeros(0, height, width, dtype=torch.bool)
    stuff_classes, labels = classes, None
    track_ids = None
    if bank.num_matched:
        classes, masks = _checked_instances(x, bank)
        track_ids = x["instances"].get("gt_track_ids") if x["instances"].has("gt_track_ids") else None
    if bank.fixed_class_ids:
        labels, present = _checked_labels(x, bank, ignore_value)
        if bank.num_matched:
            stuff_classes = torch.tensor(sorted(present & set(bank.fixed_class_ids)), dtype=torch.int64)
    return GroundTruth(classes, _pack(masks), stuff_classes, labels, (height, width), x.get("seed"), track_ids)


def _pack(masks: torch.Tensor) -> torch.Tensor:
    """bool [G, h, w] -> uint8 [G, h, ceil(w / 8)]."""
    if masks.device.type == "cpu":
        return torch.from_numpy(np.packbits(masks.numpy(), axis=-1))
    bits = F.pad(masks.byte(), (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)).sum(-1, dtype=torch.uint8)


def _checked_instances(x: dict[str, Any], bank: KernelBank) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes int64 [G] and masks bool [G, h, w]."""
    instances = _require(x, "instances")
    classes = instances.gt_classes
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < bank.num_things:
        raise DataError(
            f"{_name(x)}: instance classes {sorted(set(classes.tolist()))} are not all in 0 .. {bank.num_things - 1}: "
            "check MODEL.KNET.NUM_THING_CLASSES and the categories of the annotation file."
        )
    if len(instances) and not instances.has("gt_masks"):
        raise DataError(f"{_name(x)}: its instances have no masks; annotations need a 'segmentation'.")
    masks, image_size = instance_masks(instances), tuple(x["image"].shape[-2:])
    if tuple(masks.shape[1:]) != image_size:
        raise DataError(f"{_name(x)}: its instance masks are {tuple(masks.shape[1:])}, but its image is {image_size}.")
    return classes, masks


def _checked_labels(x: dict[str, Any], bank: KernelBank, ignore_value: int) -> tuple[torch.Tensor, set[int]]:
    """Class of every pixel [h, w], as uint8 where that holds them, and the labels that occur."""
    labels = _require(x, "sem_seg")
    image_size = tuple(x["image"].shape[-2:])
    if tuple(labels.shape) != image_size:
        raise DataError(f"{_name(x)}: 'sem_seg' is {tuple(labels.shape)}, but its image is {image_size}.")
    present = _present_labels(labels)
    wrong = sorted(label for label in present if label != ignore_value and not 0 <= label < bank.num_classes)
    if wrong:
        raise DataError(
            f"{_name(x)}: 'sem_seg' has labels {wrong}; expected 0 .. {bank.num_classes - 1}, or {ignore_value} "
            "(MODEL.SEM_SEG_HEAD.IGNORE_VALUE) for no class."
        )
    return labels.byte() if not present or 0 <= min(present) <= max(present) <= 255 else labels, present


def _present_labels(labels: torch.Tensor) -> set[int]:
    """The labels that occur; counting them is many times as fast as sorting them."""
    if not labels.numel():
        return set()
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high > _LARGEST_COUNTED:
        return set(labels.unique().tolist())
    return set(labels.flatten().bincount().nonzero().flatten().tolist())


def _name(x: dict[str, Any]) -> str:
    return x.get("file_name", "A training example")


def _require(x: dict[str, Any], key: str) -> Any:
    if key not in x:
        raise DataError(
            f"{_name(x)} has no {key!r}, which MODEL.KNET.TASK needs: check the data sets in DATASETS.TRAIN."
        )
    return x[key]


def instance_masks(instances: Instances) -> torch.Tensor:
    """The masks of Detectron2's ground truth, bitmaps or polygons, as one bool tensor [G, h, w]."""
    if len(instances) == 0:
        return torch.zeros(0, *instances.image_size, dtype=torch.bool)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor if isinstance(masks, BitMasks) else masks.bool()
