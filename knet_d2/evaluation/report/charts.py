"""Line charts as SVG text, which takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from .section import Curve

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40
# The style sheet has this number of colours
NUM_COLORS = 6
# Points of a curve that are drawn
_MOST_POINTS = 400


def line_chart(
    curves: Sequence[Curve], x_title: str, y_title: str, limits: tuple[float, float, float, float] | None = None
) -> str:
    """Draw curves with axes and a legend; a curve is interrupted where y is not finite.

    Args:
        curves: at most NUM_COLORS curves have different colours.
        x_title, y_title: titles of the axes.
        limits: smallest and largest x, smallest and largest y; None: those of the curves.

    Returns:
        HTML; "" if no curve has a finite point.
    """
    points = [_thinned_points(curve) for curve in curves]
    every = np.concatenate([p[np.isfinite(p).all(axis=1)] for p in points]) if points else np.zeros((0, 2))
    if not len(every):
        return ""
    x_axis, y_axis = (
        (_ticks(*limits[:2]), _ticks(*limits[2:]))
        if limits
        else (
            _ticks(*_bounds(every[:, 0])),
            _ticks(*_bounds(every[:, 1])),
        )
    )
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_axis[0]) / (x_axis[-1] - x_axis[0]) * (right - _LEFT),
            bottom - (y - y_axis[0]) / (y_axis[-1] - y_axis[0]) * (bottom - _TOP),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">']
    for y in y_axis:
        _, v = place(x_axis[0], y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{_number(y, y_axis)}</text>')
    for x in x_axis:
        h, _ = place(x, y_axis[0])
        parts.append(f'<text x="{h:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(x, x_axis)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    for i, line in enumerate(points):
        for piece in _pieces(line):
            places = [place(*p) for p in piece.tolist()]
            if len(places) == 1:
                parts.append(
                    f'<circle class="c{i % NUM_COLORS}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
                )
            else:
                text = " ".join(f"{h:.1f},{v:.1f}" for h, v in places)
                parts.append(f'<polyline class="c{i % NUM_COLORS}" points="{text}"/>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="c{i % NUM_COLORS}"></i>{escape(curve.name)}</span>' for i, curve in enumerate(curves)
    )
    return f'<figure><figcaption>{escape(y_title)}</figcaption>{"".join(parts)}<p class="legend">{legend}</p></figure>'


def _thinned_points(curve: Curve) -> np.ndarray:
    """Return at most _MOST_POINTS of the points [n, 2]; the first and the last are among them."""
    points = np.array([curve.x, curve.y], np.float64).T.reshape(-1, 2)
    if len(points) > _MOST_POINTS:
        points = points[np.linspace(0, len(points) - 1, _MOST_POINTS).astype(int)]
    return points


def _pieces(points: np.ndarray) -> list[np.ndarray]:
    """Split points at those that are not finite."""
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    pieces = np.split(points, wrong)
    pieces = [piece[np.isfinite(piece).all(axis=1)] for piece in pieces]
    return [piece for piece in pieces if len(piece)]


def _bounds(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high == low:  # a constant: 0 to twice its value
        return (-1.0, 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * low))
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Return 3 to 7 round numbers; the first is at most low, the last at least high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(x * power for x in (1, 2, 5, 10) if x * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(x: float, ticks: Sequence[float]) -> str:
    """A tick's number, with the digits that tell it from the next one."""
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{x + 0.0:,.{digits}f}"
