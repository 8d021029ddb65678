"""Draws predictions on the frames of a video; an object keeps its colour from frame to frame."""

from __future__ import annotations

import colorsys
from collections import deque

import cv2
import numpy as np

from ..data.classes import ClassTable
from .pictures import Drawn, class_color, drawable_text, paint, write_labels
from .prediction import Prediction
from .segment import Segment

_GOLDEN_RATIO = 0.618


class VideoDrawer:
    """Draws things in the colours of their tracks, and stuff and things without a track in those of their classes."""

    def __init__(self, classes: ClassTable, trail: int = 0):
        """
        Args:
            trail: number of frames for which the path of a thing's centre is drawn; 0: no path.
        """
        self._classes, self._trail = classes, trail
        self._frame = 0
        self._paths: dict[int, deque[tuple[int, tuple[int, int]]]] = {}

    def draw(self, frame: np.ndarray, prediction: Prediction) -> np.ndarray:
        """Paint the segments over a frame, uint8 RGB [H, W, 3], small segments over large ones."""
        items = [self._drawn(x) for x in prediction.segments]
        drawn = paint(frame, items)
        self._draw_paths(drawn, prediction.segments)
        return write_labels(drawn, items)

    def _drawn(self, segment: Segment) -> Drawn:
        color, text = class_color(self._classes, segment.label), drawable_text(self._classes.names[segment.label])
        if segment.track_id is not None and self._is_thing(segment):
            color, text = tuple(track_color(segment.track_id).tolist()), f"{text} {segment.track_id}"
        return Drawn(segment, color, text, self._is_thing(segment))

    def _is_thing(self, segment: Segment) -> bool:
        return segment.label < self._classes.num_things

    def _draw_paths(self, drawn: np.ndarray, segments: list[Segment]) -> None:
        for segment in segments if self._trail else ():
            if segment.track_id is not None and self._is_thing(segment):
                path = self._paths.setdefault(segment.track_id, deque())
                path.append((self._frame, _center(segment)))
        for track_id, path in list(self._paths.items()):
            while path and path[0][0] <= self._frame - self._trail:
                path.popleft()
            if not path:
                del self._paths[track_id]
            points = np.array([point for _, point in path], np.int32).reshape(-1, 1, 2)
            cv2.polylines(drawn, [points], False, track_color(track_id).tolist(), 2)
        self._frame += 1


def track_color(track_id: int) -> np.ndarray:
    """The colour of a track, uint8 RGB [3]; those of successive ids differ."""
    color = colorsys.hsv_to_rgb(track_id * _GOLDEN_RATIO % 1, 0.75, 1.0)
    return (255 * np.array(color)).round().astype(np.uint8)


def _center(segment: Segment) -> tuple[int, int]:
    """(x, y), the mean of the pixels."""
    rows, columns = segment.crop.nonzero()
    return segment.corner[1] + int(columns.mean()), segment.corner[0] + int(rows.mean())
