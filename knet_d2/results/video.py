"""Draws predictions on the frames of a video; an object keeps its colour from frame to frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.video_visualizer import VideoVisualizer

from ..data.classes import ClassTable
from .pictures import drawable_text
from .prediction import Prediction


class VideoDrawer:
    """Draws predictions by Detectron2's VideoVisualizer."""

    def __init__(self, classes: ClassTable):
        names, colors = [drawable_text(name) for name in classes.names], classes.colors
        metadata = Metadata().set(thing_classes=names, stuff_classes=names, thing_colors=colors, stuff_colors=colors)
        self._visualizer = VideoVisualizer(metadata)

    def draw(self, frame: np.ndarray, key: str, prediction: Prediction) -> np.ndarray:
        """Paint the segments over a frame, uint8 RGB [H, W, 3].

        Args:
            frame: the frame.
            key: key of the model's output from which the prediction was made.
            prediction: the segments.
        """
        return _DRAW[key](self._visualizer, frame, prediction).get_image()


def _draw_instances(visualizer: VideoVisualizer, frame: np.ndarray, prediction: Prediction) -> Any:
    segments = prediction.segments
    boxes = torch.tensor([x.box for x in segments], dtype=torch.float).reshape(-1, 4)
    instances = Instances(
        prediction.size,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        scores=torch.tensor([x.score for x in segments]),
        pred_classes=torch.tensor([x.label for x in segments], dtype=torch.int64),
        pred_masks=torch.from_numpy(prediction.masks()),
    )
    return visualizer.draw_instance_predictions(frame, instances)


def _draw_panoptic(visualizer: VideoVisualizer, frame: np.ndarray, prediction: Prediction) -> Any:
    infos = [
        {"id": i, "category_id": x.label, "isthing": x.label < prediction.classes.num_things, "area": x.area}
        for i, x in enumerate(prediction.segments, start=1)
    ]
    return visualizer.draw_panoptic_seg_predictions(frame, torch.from_numpy(prediction.segment_map()), infos)


def _draw_semantic(visualizer: VideoVisualizer, frame: np.ndarray, prediction: Prediction) -> Any:
    nothing = len(prediction.classes.names)
    labels = np.array([nothing, *(x.label for x in prediction.segments)])[prediction.segment_map()]
    return visualizer.draw_sem_seg(frame, torch.from_numpy(labels))


_DRAW: dict[str, Callable[[VideoVisualizer, np.ndarray, Prediction], Any]] = {
    "instances": _draw_instances,
    "panoptic_seg": _draw_panoptic,
    "sem_seg": _draw_semantic,
}
