"""Ground truth as the losses need it: padded like the batch, and resized to the masks' resolution."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks

from ..errors import DataError
from ..tasks import KernelBank
from .structures import Targets


def build_targets(
    x: dict[str, Any],
    padded_size: tuple[int, int],
    mask_size: tuple[int, int],
    bank: KernelBank,
    ignore_value: int,
    like: torch.Tensor,
) -> Targets:
    """Ground truth of one image.

    Args:
        x: "instances" and / or "sem_seg" as the mapper gives them.
        padded_size: height and width of the batch.
        mask_size: height and width of the masks in the losses.
        bank: tells which of the two are needed.
        ignore_value: label of pixels without a class.
        like: a tensor of the type and device that the targets get.

    Raises:
        DataError: something is missing in x, or a class is out of range.
    """
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, *padded_size)
    classes, masks = _instance_targets(x, bank) if bank.num_matched else empty
    stuff_classes, stuff_masks, sem_seg = *empty, None
    if bank.fixed_class_ids:
        labels = _semantic_labels(x, bank, ignore_value)
        if bank.num_matched:
            stuff_classes = labels.unique()
            stuff_classes = stuff_classes[torch.isin(stuff_classes, labels.new_tensor(bank.fixed_class_ids))]
            stuff_masks = labels == stuff_classes[:, None, None]
        padding = (0, padded_size[1] - labels.shape[1], 0, padded_size[0] - labels.shape[0])
        sem_seg = F.pad(labels, padding, value=ignore_value).to(like.device, non_blocking=True)
    return Targets(
        classes.to(like.device, non_blocking=True),
        resize_masks(masks, padded_size, mask_size, like),
        stuff_classes.to(like.device, non_blocking=True),
        resize_masks(stuff_masks, padded_size, mask_size, like),
        sem_seg,
    )


def _instance_targets(x: dict[str, Any], bank: KernelBank) -> tuple[torch.Tensor, torch.Tensor]:
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


def _semantic_labels(x: dict[str, Any], bank: KernelBank, ignore_value: int) -> torch.Tensor:
    labels = _require(x, "sem_seg").long()
    image_size = tuple(x["image"].shape[-2:])
    if tuple(labels.shape) != image_size:
        raise DataError(f"{_name(x)}: 'sem_seg' is {tuple(labels.shape)}, but its image is {image_size}.")
    wrong = (labels != ignore_value) & ((labels < 0) | (labels >= bank.num_classes))
    if wrong.any():
        raise DataError(
            f"{_name(x)}: 'sem_seg' has labels {labels[wrong].unique().tolist()}; expected 0 .. "
            f"{bank.num_classes - 1}, or {ignore_value} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE) for no class."
        )
    return labels


def _name(x: dict[str, Any]) -> str:
    return x.get("file_name", "A training example")


def _require(x: dict[str, Any], key: str) -> Any:
    if key not in x:
        raise DataError(
            f"{_name(x)} has no {key!r}, which MODEL.KNET.TASK needs: check the data sets in DATASETS.TRAIN."
        )
    return x[key]


def instance_masks(instances: Instances) -> torch.Tensor:
    """The masks of Detectron2's ground truth, bitmaps or polygons, as one tensor [G, H, W]."""
    if len(instances) == 0:
        return torch.zeros(0, *instances.image_size)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor if isinstance(masks, BitMasks) else masks


def resize_masks(
    masks: torch.Tensor, padded_size: tuple[int, int], mask_size: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """Pad with 0 to the batch's size, then bilinear to the masks' size: [G, H, W] -> [G, h, w], soft at the borders."""
    if len(masks) == 0:
        return like.new_zeros(0, *mask_size)
    masks = masks.to(like.device, non_blocking=True)
    masks = F.pad(masks, (0, padded_size[1] - masks.shape[2], 0, padded_size[0] - masks.shape[1])).to(like.dtype)
    return F.interpolate(masks[None], mask_size, mode="bilinear", align_corners=False)[0]
