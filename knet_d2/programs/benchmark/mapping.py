"""Measures the time of K-Net's mapper for an image of COCO's size with a panoptic PNG."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from ...data.mapper import build_mapper
from .measure import interleave, median
from .models import Subject
from .workload import draw_image

_SIZE = (480, 640)


def mapper_seconds(subject: Subject, rounds: int) -> float:
    """Return the median seconds for reading and augmenting one training image in this process."""
    mapper = build_mapper(subject.cfg, is_train=True)
    with tempfile.TemporaryDirectory() as folder:
        record = _write_example(subject.cfg, Path(folder))
        return median(interleave([lambda: mapper(record)], rounds, 1, torch.device("cpu"))[0])


def _write_example(cfg: Any, folder: Path) -> dict[str, Any]:
    """Write an image and its panoptic PNG; returns their record in the format of a registered data set."""
    x = draw_image(_SIZE, seed=0)
    knet, ids, segments = cfg.MODEL.KNET, x.stuff.numpy() + 1, []
    for number in np.unique(ids[ids > 0]).tolist():
        if knet.STUFF_CATEGORY_IDS:
            segments.append({"id": number, "category_id": knet.STUFF_CATEGORY_IDS[number - 1], "isthing": False})
        else:
            ids[ids == number] = 0  # an instance model has no stuff
    for number, (mask, label) in enumerate(zip(x.masks.numpy(), x.classes.tolist()), start=256):
        if (ids[mask] != number).any():
            ids[mask] = number
            segments.append({"id": number, "category_id": knet.THING_CATEGORY_IDS[label], "isthing": True})
    image_file, panoptic_file = str(folder / "image.jpg"), str(folder / "panoptic.png")
    Image.fromarray(x.image.permute(1, 2, 0).numpy()).save(image_file)
    Image.fromarray(id2rgb(ids)).save(panoptic_file)
    record = {"file_name": image_file, "image_id": 0, "height": _SIZE[0], "width": _SIZE[1]}
    return {**record, "pan_seg_file_name": panoptic_file, "segments_info": segments}
