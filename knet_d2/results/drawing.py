"""Pictures of ground truth and predictions, drawn by Detectron2's Visualizer. All images are uint8 RGB [H, W, 3]."""

import gc
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw
from torch import nn

from ..data import KNetDatasetMapper, build_mapper, load_dataset
from ..data.classes import ClassTable, class_table
from ..data.files import read_image

# Shorter side below which a picture is enlarged, as text has a smallest readable size.
_READABLE_SIZE = 320
_MARGIN = 8
_TITLE_HEIGHT = 20
# Instances below this score are left out of validation pictures.
_PICTURE_SCORE = 0.3


def output_metadata(classes: ClassTable, output: str) -> Metadata:
    """What Detectron2's visualizers need to draw one kind of output ("instances", "panoptic_seg" or "sem_seg").

    Instances and semantic maps count classes as the model does, panoptic segments as the data set's metadata does.
    """
    is_panoptic = output == "panoptic_seg"
    ids = classes.category_ids if is_panoptic else range(len(classes.names))
    names = {i: name for i, name in zip(ids, classes.names)}
    colors = {i: color for i, color in zip(ids, classes.colors)}
    listed = range(max(names, default=-1) + 1)
    all_names = [names.get(i, "") for i in listed]
    all_colors = [colors.get(i, (0, 0, 0)) for i in listed]
    return Metadata().set(
        thing_classes=all_names, stuff_classes=all_names, thing_colors=all_colors, stuff_colors=all_colors
    )


def main_output(outputs: dict[str, Any]) -> str:
    """Which of a model's outputs is drawn."""
    return next(key for key in ("panoptic_seg", "instances", "sem_seg") if key in outputs)


class Drawable(Protocol):
    """What can be drawn: see :class:`Segment`."""

    @property
    def mask(self) -> np.ndarray: ...

    @property
    def label(self) -> int: ...

    @property
    def score(self) -> float | None: ...


class Segment(NamedTuple):
    """A mask to draw.

    Attributes:
        mask: bool [H, W].
        label: index in a :class:`ClassTable`.
        score: None for ground truth and semantic maps.
    """

    mask: np.ndarray
    label: int
    score: float | None = None


def prediction_segments(outputs: dict[str, Any], classes: ClassTable) -> list[Segment]:
    """What to draw of a model's outputs for one image."""
    kind = main_output(outputs)
    result = to_cpu(outputs)[kind]
    if kind == "panoptic_seg":
        label_of = {category: i for i, category in enumerate(classes.category_ids)}
        ids = result[0].numpy()
        return [Segment(ids == x["id"], label_of[x["category_id"]], x["score"]) for x in result[1]]
    if kind == "instances":
        columns = zip(result.pred_masks.numpy(), result.pred_classes.tolist(), result.scores.tolist())
        return [Segment(*column) for column in columns]
    return _label_segments(result.argmax(dim=0).numpy(), len(classes.names))


def ground_truth_segments(cfg: CfgNode, record: dict[str, Any]) -> list[Segment]:
    """What to draw of those annotations of a data set's record that the model of ``cfg`` learns from."""
    options = {**KNetDatasetMapper.from_config(cfg, True), "augmentations": [], "pad_size": None}
    example = KNetDatasetMapper(**options)(record)
    segments = []
    if "sem_seg" in example:
        labels = example["sem_seg"].numpy()
        num_things = len(cfg.MODEL.KNET.THING_CATEGORY_IDS)
        segments = [x for x in _label_segments(labels, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) if x.label >= num_things]
    if "instances" in example:
        things = example["instances"]
        segments += [Segment(*x) for x in zip(things.gt_masks.tensor.numpy(), things.gt_classes.tolist())]
    return segments


def _label_segments(labels: np.ndarray, end: int) -> list[Segment]:
    return [Segment(labels == label, int(label)) for label in np.unique(labels) if label < end]


def draw_segments(image: np.ndarray, segments: Sequence[Drawable], classes: ClassTable) -> np.ndarray:
    """Paint segments over an image, small ones over large ones, with class names and scores; small images enlarged."""
    factor = max(1, -(-_READABLE_SIZE // min(image.shape[:2])))
    visualizer = Visualizer(_enlarge(image, factor))
    for number, segment in enumerate(sorted(segments, key=lambda x: -x.mask.sum())):
        if not segment.mask.any():
            continue
        is_thing = segment.label < classes.num_things
        text = classes.names[segment.label]
        visualizer.draw_binary_mask(
            _enlarge(segment.mask, factor).astype(np.uint8),
            color=_vary(classes.colors[segment.label], number if is_thing else 0),
            edge_color="white" if is_thing else None,
            text=text if segment.score is None else f"{text} {segment.score:.0%}",
            alpha=0.5,
            area_threshold=0,
        )
    return visualizer.get_output().get_image()


def _vary(color: tuple[int, int, int], number: int) -> tuple[float, ...]:
    """A colour in 0 .. 1, darker or lighter such that neighbours of one class can be told apart."""
    lightness = (0.0, -0.3, 0.3, -0.15, 0.15)[number % 5]
    return tuple(c / 255 * (1 + lightness) if lightness < 0 else c / 255 + (1 - c / 255) * lightness for c in color)


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_prediction(image: np.ndarray, outputs: dict[str, Any], classes: ClassTable) -> np.ndarray:
    """Draw the model's outputs for one image: the panoptic map, else the instances, else the semantic map."""
    return draw_segments(image, prediction_segments(outputs, classes), classes)


def to_cpu(outputs: dict[str, Any]) -> dict[str, Any]:
    """A model's outputs for one image with all tensors on the CPU."""
    outputs = dict(outputs)
    for key in ("instances", "sem_seg"):
        if key in outputs:
            outputs[key] = outputs[key].to("cpu")
    if "panoptic_seg" in outputs:
        segments, info = outputs["panoptic_seg"]
        outputs["panoptic_seg"] = segments.cpu(), [dict(segment) for segment in info]  # the visualizer writes to it
    return outputs


def draw_validation_pictures(cfg: CfgNode, model: nn.Module, number: int) -> dict[str, np.ndarray]:
    """Ground truth beside prediction for ``number`` images, evenly spread over the first test set.

    Returns:
        Pictures by the names of the image files.
    """
    records = load_dataset(cfg.DATASETS.TEST[0], "DATASETS.TEST")
    mapper, classes = build_mapper(cfg, False), class_table(cfg)
    pictures = {}
    training = model.training
    model.eval()
    try:
        for i in np.unique(np.linspace(0, len(records) - 1, min(number, len(records))).astype(int)):
            sample = mapper(records[i])
            with torch.no_grad():
                outputs = model([sample])[0]
            if "instances" in outputs:
                outputs["instances"] = outputs["instances"][outputs["instances"].scores >= _PICTURE_SCORE]
            image = read_image(records[i]["file_name"], "RGB")
            truth = draw_segments(image, ground_truth_segments(cfg, records[i]), classes)
            drawn = draw_prediction(image, outputs, classes)
            gap = np.full((truth.shape[0], _MARGIN // 2, 3), 255, np.uint8)
            pictures[os.path.basename(records[i]["file_name"])] = np.concatenate([truth, gap, drawn], axis=1)
    finally:
        model.train(training)
    # Matplotlib's figures refer to themselves; Python by itself would keep them for hundreds of pictures
    gc.collect()
    return pictures


def picture_sheet(pictures: Sequence[np.ndarray], columns: int, title: str) -> np.ndarray:
    """All pictures on one white sheet under a line of text, each scaled to the width of the first one."""
    width = pictures[0].shape[1]
    cells = [Image.fromarray(p).resize((width, round(p.shape[0] * width / p.shape[1]))) for p in pictures]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _MARGIN for row in rows]
    size = (len(rows[0]) * (width + _MARGIN) + _MARGIN, sum(heights) + _TITLE_HEIGHT + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN // 2), title, fill="black")
    top = _TITLE_HEIGHT + _MARGIN // 2
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + i * (width + _MARGIN), top))
        top += height
    return np.asarray(sheet)
