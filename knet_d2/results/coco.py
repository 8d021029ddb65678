"""A model's outputs as plain data for JSON and PNG files. The schema is described in demo/README.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BoxMode, Instances


def instance_results(instances: Instances, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Instances as in COCO's result format: category_id, score, bbox (x, y, width, height) and RLE."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    columns = zip(instances.pred_classes.tolist(), instances.scores.tolist(), boxes, instances.pred_masks)
    return [
        {"category_id": category_ids[c], "score": score, "bbox": box, "segmentation": encode_mask(mask)}
        for c, score, box, mask in columns
    ]


def semantic_results(sem_seg: torch.Tensor, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The classes in a semantic map, each with its pixels.

    Args:
        sem_seg: scores [K, H, W].
    """
    labels = sem_seg.argmax(dim=0)
    masks = ((c, labels == c) for c in labels.unique().tolist())
    return [
        {"category_id": category_ids[c], "area": int(mask.sum()), "segmentation": encode_mask(mask)}
        for c, mask in masks
    ]


def panoptic_png(segment_ids: torch.Tensor) -> np.ndarray:
    """A panoptic map [H, W] as the RGB picture of COCO's format: id = R + 256 G + 65536 B."""
    ids = segment_ids.numpy().astype(np.uint32)
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def encode_mask(mask: torch.Tensor) -> dict[str, Any]:
    """A bool mask [H, W] as COCO's compressed RLE, with text instead of bytes."""
    rle = mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
