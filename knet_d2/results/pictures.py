"""Draws pictures of segments. All images are uint8 RGB [H, W, 3]."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.classes import ClassTable
from .segment import Segment

# Pictures whose shorter side is smaller are enlarged, because the text would not be readable.
_READABLE_SIZE = 320
_FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_SMALLEST_TEXT, _TEXT_PART = 9, 0.02  # height of letters: pixels, and part of the picture's shorter side
# Largest side of the mask in which the place of a label is searched
_LABEL_SEARCH = 64
# Parts of white (above 0) and black that tell things of a class from each other, in this order
_SHADES = (0.0, 0.4, -0.4)
_MARGIN = 8
_TITLE_HEIGHT = 20
_LONGEST_TEXT = 40


class Drawn(NamedTuple):
    """How a segment is drawn.

    Attributes:
        color: uint8 RGB; None: the image shows as it is.
        text: its label.
        outlined: whether a white line surrounds it.
    """

    segment: Segment
    color: tuple[int, int, int] | None
    text: str
    outlined: bool


def draw_segments(image: np.ndarray, segments: Sequence[Segment], classes: ClassTable) -> np.ndarray:
    """Paint segments in the colours of their classes, with names and scores.

    Things have a white outline, and those of a class three shades in turn. A background class has its name alone, so
    that the picture shows what lies there.

    The result is a multiple of the image's size if the image is small.
    """
    factor = max(1, -(-_READABLE_SIZE // min(image.shape[:2])))
    items = []
    things: Counter[int] = Counter()
    for segment in segments:
        text = drawable_text(classes.names[segment.label])
        text = text if segment.score is None else f"{text} {segment.score:.0%}"
        is_thing = segment.label < classes.num_things
        color = class_color(classes, segment.label)
        if is_thing:
            color = _shaded(color, _SHADES[things[segment.label] % len(_SHADES)])
            things[segment.label] += 1
        items.append(Drawn(_enlarged_segment(segment, factor), color, text, is_thing))
    return write_labels(paint(_enlarge(image, factor), items), items)


def class_color(classes: ClassTable, label: int) -> tuple[int, int, int] | None:
    """The colour that a class is painted in; None for a background class."""
    return None if classes.is_background(label) else classes.colors[label]


def _shaded(color: Sequence[int], part: float) -> tuple[int, int, int]:
    """A colour mixed with a part of white, or with one of black below 0."""
    red, green, blue = (round((1 - abs(part)) * x + max(part, 0) * 255) for x in color)
    return red, green, blue


def paint(image: np.ndarray, items: Sequence[Drawn]) -> np.ndarray:
    """Paint segments that have a colour over an image, half transparent, small segments over large ones."""
    colors = image.copy()
    items = sorted((x for x in items if x.color is not None), key=lambda x: -x.segment.area)
    for segment, color, _, _ in items:
        colors[segment.window][segment.crop] = color
    drawn = cv2.addWeighted(image, 0.5, colors, 0.5, -0.25)  # the mean, rounded down
    for segment, _, _, outlined in items:
        if outlined:
            outlines, _ = cv2.findContours(segment.crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(drawn, outlines, -1, (255, 255, 255), 1, offset=segment.corner[::-1])
    return drawn


def write_labels(drawn: np.ndarray, items: Sequence[Drawn]) -> np.ndarray:
    """Write the label of each segment into it: inside the picture, in white with a black rim, beside other labels."""
    picture = Image.fromarray(drawn)
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.truetype(_FONT, max(_SMALLEST_TEXT, round(_TEXT_PART * min(drawn.shape[:2]))))
    taken: list[tuple[float, float, float, float]] = []
    for segment, _, text, _ in sorted(items, key=lambda x: -x.segment.area):
        if text:
            width, height = canvas.textbbox((0, 0), text, font, stroke_width=1)[2:]
            box = _free_box(inner_point(segment), (width, height), drawn.shape[:2], taken)
            taken.append(box)
            canvas.text(box[:2], text, "white", font, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def _free_box(
    center: tuple[int, int],
    size: tuple[float, float],
    picture: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a text inside the picture, near a point, where no other text is.

    Where all places nearby are taken, it is that at the point.
    """
    (x, y), (width, height), (rows, columns) = center, size, picture
    left = round(min(max(x - width / 2, 1), max(columns - width - 1, 1)))
    boxes = []
    for steps in (0, 1, -1, 2, -2):
        top = round(min(max(y - height / 2 + steps * height, 1), max(rows - height - 1, 1)))
        boxes.append((left, top, left + width, top + height))
    free = (b for b in boxes if not any(_overlap(b, other) for other in taken))
    return next(free, boxes[0])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inner_point(segment: Segment) -> tuple[int, int]:
    """(x, y) of the point that is about the farthest from the edge of a segment."""
    step = max(1, -(-max(segment.crop.shape) // _LABEL_SEARCH))
    mask = np.pad(segment.crop[::step, ::step].astype(np.uint8), 1)
    if not mask.any():  # a line that the steps leave out
        rows, columns = segment.crop.nonzero()
        return segment.corner[1] + int(columns[0]), segment.corner[0] + int(rows[0])
    row, column = np.unravel_index(cv2.distanceTransform(mask, cv2.DIST_L2, 3).argmax(), mask.shape)
    return segment.corner[1] + (int(column) - 1) * step, segment.corner[0] + (int(row) - 1) * step


def drawable_text(text: str) -> str:
    """Make a class name safe to draw: one line, and not too long."""
    line = "".join(x if x.isprintable() else " " for x in text)
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 3] + "..."


def _enlarged_segment(segment: Segment, factor: int) -> Segment:
    top, left = segment.corner
    height, width = segment.size
    size = (height * factor, width * factor)
    return segment._replace(crop=_enlarge(segment.crop, factor), corner=(top * factor, left * factor), size=size)


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array if factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def picture_sheet(pictures: Sequence[np.ndarray], columns: int, title: str) -> np.ndarray:
    """Arrange pictures on a white sheet below a line of text, each scaled to the width of the first one."""
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
