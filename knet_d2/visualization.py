"""Pictures of ground truth and predictions, drawn by Detectron2's Visualizer. All images are uint8 RGB [H, W, 3]."""

import os
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw
from torch import nn

from knet_d2.data import build_mapper
from knet_d2.errors import DataError

# Shorter side below which a picture is enlarged, as text has a smallest readable size.
_READABLE_SIZE = 320
_MARGIN = 8
_TITLE_HEIGHT = 20


def read_image(path: str) -> np.ndarray:
    """An image file as RGB, turned as its EXIF says."""
    try:
        return utils.read_image(path, format="RGB")
    except Exception as e:  # Pillow's readers raise many types for damaged files
        reason = "there is no such file" if isinstance(e, FileNotFoundError) else f"can't be read as an image ({e})"
        raise DataError(f"{path}: {reason}.") from e


def display_metadata(cfg: CfgNode) -> Metadata:
    """Names and colours of the classes that a model of ``cfg`` gives; ids are the names where none are known."""
    names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
    known = MetadataCatalog.get(names[0]).as_dict() if names and names[0] in MetadataCatalog.list() else {}
    knet = cfg.MODEL.KNET
    stuff_ids = knet.STUFF_CATEGORY_IDS or range(knet.NUM_STUFF_CLASSES)
    classes = {
        "thing_classes": [str(i) for i in range(knet.NUM_THING_CLASSES)],
        "stuff_classes": [str(i) for i in range(max(stuff_ids, default=-1) + 1)],
    }
    for key in ("thing_classes", "stuff_classes"):
        if len(known.get(key, ())) >= len(classes[key]):
            classes[key] = list(known[key])
    colors = {
        key: list(known[key])
        for key in ("thing_colors", "stuff_colors")
        if len(known.get(key, ())) >= len(classes[key.replace("colors", "classes")])
    }
    return Metadata().set(**classes, **colors)


def draw_prediction(image: np.ndarray, outputs: Dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the model's outputs for one image: the panoptic map, else the instances, else the semantic map."""
    visualizer = Visualizer(image, metadata, scale=_scale(image))
    outputs = to_cpu(outputs)
    if "panoptic_seg" in outputs:
        drawn = visualizer.draw_panoptic_seg(*outputs["panoptic_seg"])
    elif "instances" in outputs:
        drawn = visualizer.draw_instance_predictions(outputs["instances"])
    else:
        drawn = visualizer.draw_sem_seg(outputs["sem_seg"].argmax(dim=0), alpha=0.5)
    return drawn.get_image()


def draw_ground_truth(image: np.ndarray, sample: Dict[str, Any], metadata: Metadata, task: str) -> np.ndarray:
    """Draw the annotations of one record of a data set that ``task`` learns from."""
    key = {"instance": "annotations", "panoptic": "pan_seg_file_name", "semantic": "sem_seg_file_name"}[task]
    # the "separated" form of a panoptic data set has instances and a semantic map instead of one PNG
    keys = {key, "segments_info"} if key in sample else {"annotations", "sem_seg_file_name"}
    visualizer = Visualizer(image, metadata, scale=_scale(image))
    return visualizer.draw_dataset_dict({k: v for k, v in sample.items() if k in keys}).get_image()


def to_cpu(outputs: Dict[str, Any]) -> Dict[str, Any]:
    """A model's outputs for one image with all tensors on the CPU."""
    outputs = dict(outputs)
    for key in ("instances", "sem_seg"):
        if key in outputs:
            outputs[key] = outputs[key].to("cpu")
    if "panoptic_seg" in outputs:
        segments, info = outputs["panoptic_seg"]
        outputs["panoptic_seg"] = segments.cpu(), info
    return outputs


def draw_validation_pictures(cfg: CfgNode, model: nn.Module, number: int) -> Dict[str, np.ndarray]:
    """Ground truth beside prediction for ``number`` images, evenly spread over the first test set.

    Instances below a score of 0.3 are not drawn.

    Returns:
        Pictures by the names of the image files.
    """
    samples = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    mapper = build_mapper(cfg, False)
    chosen = sorted({int(i) for i in np.linspace(0, len(samples) - 1, min(number, len(samples)))})
    pictures = {}
    training = model.training
    model.eval()
    with torch.no_grad():
        for sample in (samples[i] for i in chosen):
            image = read_image(sample["file_name"])
            outputs = model([mapper(sample)])[0]
            if "instances" in outputs:
                outputs["instances"] = outputs["instances"][outputs["instances"].scores >= 0.3]
            truth = draw_ground_truth(image, sample, metadata, cfg.MODEL.KNET.TASK)
            drawn = draw_prediction(image, outputs, metadata)
            pictures[os.path.basename(sample["file_name"])] = np.concatenate([truth, drawn], axis=1)
    model.train(training)
    return pictures


def picture_sheet(pictures: Sequence[np.ndarray], columns: int, title: str) -> np.ndarray:
    """All pictures on one white sheet under a line of text, each scaled to the width of the first one."""
    width = pictures[0].shape[1]
    cells = [Image.fromarray(p).resize((width, round(p.shape[0] * width / p.shape[1]))) for p in pictures]
    rows: List[List[Image.Image]] = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _MARGIN for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + _MARGIN) + _MARGIN, sum(heights) + _TITLE_HEIGHT + _MARGIN), "white")
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN // 2), title, fill="black")
    top = _TITLE_HEIGHT + _MARGIN // 2
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + i * (width + _MARGIN), top))
        top += height
    return np.asarray(sheet)


def _scale(image: np.ndarray) -> float:
    return max(1.0, _READABLE_SIZE / min(image.shape[:2]))
