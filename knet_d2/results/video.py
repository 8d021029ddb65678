"""Draws predictions on the frames of a video; an object keeps its colour from frame to frame."""

from __future__ import annotations

import colorsys
import os
from collections import deque

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.classes import ClassTable
from .pictures import drawable_text
from .prediction import Prediction
from .segment import Segment

_FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_SMALLEST_TEXT, _TEXT_PART = 9, 0.02  # height of letters: pixels, and part of the frame's shorter side
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
        drawn = frame.copy()
        segments = sorted(prediction.segments, key=lambda x: -x.area)
        for segment in segments:
            pixels, color = drawn[segment.window], self._color(segment)
            pixels[segment.crop] = pixels[segment.crop] // 2 + color // 2
            if self._is_thing(segment):
                outlines, _ = cv2.findContours(segment.crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(drawn, outlines, -1, (255, 255, 255), 1, offset=segment.corner[::-1])
        self._draw_paths(drawn, segments)
        return self._with_text(drawn, segments)

    def _is_thing(self, segment: Segment) -> bool:
        return segment.label < self._classes.num_things

    def _color(self, segment: Segment) -> np.ndarray:
        if segment.track_id is None or not self._is_thing(segment):
            return np.array(self._classes.colors[segment.label], np.uint8)
        return track_color(segment.track_id)

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

    def _with_text(self, drawn: np.ndarray, segments: list[Segment]) -> np.ndarray:
        picture = Image.fromarray(drawn)
        canvas = ImageDraw.Draw(picture)
        font = ImageFont.truetype(_FONT, max(_SMALLEST_TEXT, round(_TEXT_PART * min(drawn.shape[:2]))))
        for segment in segments:
            text = drawable_text(self._classes.names[segment.label])
            if segment.track_id is not None and self._is_thing(segment):
                text += f" {segment.track_id}"
            canvas.text(_center(segment), text, "white", font, "mm", stroke_width=1, stroke_fill="black")
        return np.asarray(picture)


def track_color(track_id: int) -> np.ndarray:
    """The colour of a track, uint8 RGB [3]; those of successive ids differ."""
    color = colorsys.hsv_to_rgb(track_id * _GOLDEN_RATIO % 1, 0.75, 1.0)
    return (255 * np.array(color)).round().astype(np.uint8)


def _center(segment: Segment) -> tuple[int, int]:
    """(x, y), the mean of the pixels."""
    rows, columns = segment.crop.nonzero()
    return segment.corner[1] + int(columns.mean()), segment.corner[0] + int(rows.mean())
