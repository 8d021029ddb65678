"""Draws pictures of segments by Detectron2's Visualizer. All images are uint8 RGB [H, W, 3]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw

from ..data.classes import ClassTable
from .segment import Segment

# Pictures whose shorter side is smaller are enlarged, because the text would not be readable.
_READABLE_SIZE = 320
_MARGIN = 8
_TITLE_HEIGHT = 20
_LONGEST_TEXT = 40


def draw_segments(image: np.ndarray, segments: Sequence[Segment], classes: ClassTable) -> np.ndarray:
    """Paint segments with class names and scores over an image, small segments over large ones.

    The result is a multiple of the image's size if the image is small.
    """
    factor = max(1, -(-_READABLE_SIZE // min(image.shape[:2])))
    visualizer = Visualizer(_enlarge(image, factor))
    for number, segment in enumerate(sorted(segments, key=lambda x: -x.mask.sum())):
        is_thing = segment.label < classes.num_things
        text = drawable_text(classes.names[segment.label])
        visualizer.draw_binary_mask(
            _enlarge(segment.mask, factor).astype(np.uint8),
            color=_vary(classes.colors[segment.label], number if is_thing else 0),
            edge_color="white" if is_thing else None,
            text=text if segment.score is None else f"{text} {segment.score:.0%}",
            alpha=0.5,
            area_threshold=0,
        )
    return visualizer.get_output().get_image()


def drawable_text(text: str) -> str:
    """Make a class name safe for Matplotlib: one line, not too long, and without formulas ("$")."""
    line = "".join(x if x.isprintable() else " " for x in text)
    if len(line) > _LONGEST_TEXT:
        line = line[: _LONGEST_TEXT - 3] + "..."
    return line.replace("$", r"\$")


def _vary(color: tuple[int, int, int], number: int) -> tuple[float, ...]:
    """Return a colour in 0 .. 1, darker or lighter by number, so that neighbours of one class look different."""
    lightness = (0.0, -0.3, 0.3, -0.15, 0.15)[number % 5]
    return tuple(c / 255 * (1 + lightness) if lightness < 0 else c / 255 + (1 - c / 255) * lightness for c in color)


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


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
