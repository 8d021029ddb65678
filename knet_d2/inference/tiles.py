"""Segments large images in tiles.

The result of a pixel comes from the tile in which the pixel is farthest from the border. Objects of neighbouring tiles
are joined if their masks agree in the strip where the tiles overlap.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..errors import ConfigError
from ..results.prediction import Prediction
from ..results.segment import Segment

# Smallest IoU of the masks of one object in the strip where two tiles overlap
MIN_IOU = 0.5


class Span(NamedTuple):
    """A tile along one axis: it covers pixels [start, stop), and gives the result of pixels [own_start, own_stop)."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def tile_spans(length: int, tile_size: int, overlap: int) -> list[Span]:
    """Return the fewest tiles that cover ``length`` pixels, with neighbours that overlap by at least ``overlap``."""
    if length <= tile_size:
        return [Span(0, length, 0, length)]
    count = -(-(length - overlap) // (tile_size - overlap))
    starts = np.linspace(0, length - tile_size, count).round().astype(int).tolist()
    borders = [(following + start + tile_size) // 2 for start, following in zip(starts, starts[1:])]
    return [Span(s, s + tile_size, a, b) for s, a, b in zip(starts, [0, *borders], [*borders, length])]


def tiles_of(size: Sequence[int], tile_size: int, overlap: int) -> list[tuple[Span, Span]]:
    """The tiles of an image of a size (height, width), as (rows, columns)."""
    rows, columns = (tile_spans(length, tile_size, overlap) for length in size)
    return [(y, x) for y in rows for x in columns]


class _Part(NamedTuple):
    """A segment of one tile: ``seen`` is its whole mask, ``own`` the part in the pixels that the tile gives."""

    seen: Segment
    own: Segment | None


def predict_tiles(
    predict: Callable[[np.ndarray], Prediction], image: np.ndarray, tile_size: int, overlap: int
) -> Prediction:
    """Predict an image tile by tile, and join the predictions.

    Args:
        predict: function from an image to its prediction.
        image: [H, W, C].
        tile_size, overlap: in pixels.
    """
    return predict_outputs(lambda tile: {"": predict(tile)}, image, tile_size, overlap)[""]


def predict_outputs(
    predict: Callable[[np.ndarray], Mapping[str, Prediction]], image: np.ndarray, tile_size: int, overlap: int
) -> dict[str, Prediction]:
    """:func:`predict_tiles` for a function that gives predictions by output, and is called once for each tile."""
    if not 0 < overlap < tile_size:
        raise ConfigError(f"tile_overlap = {overlap}: use 1 to {tile_size - 1} pixels (tile_size = {tile_size}).")
    size = image.shape[:2]
    tiles = tiles_of(size, tile_size, overlap)
    if len(tiles) == 1:
        return dict(predict(image))
    parts: dict[str, list[list[_Part]]] = {}
    for y, x in tiles:
        predictions = predict(image[y.start : y.stop, x.start : x.stop])
        for output, prediction in predictions.items():
            parts.setdefault(output, []).append([_place(segment, y, x, size) for segment in prediction.segments])
    classes = prediction.classes
    joined = {output: _join(tiles, found, classes.num_things) for output, found in parts.items()}
    return {output: Prediction(size, segments, classes).named() for output, segments in joined.items()}


def _place(segment: Segment, y: Span, x: Span, size: tuple[int, int]) -> _Part:
    seen = segment._replace(corner=(segment.corner[0] + y.start, segment.corner[1] + x.start), size=size)
    return _Part(seen, clip(seen, (y.own_start, y.own_stop), (x.own_start, x.own_stop)))


def clip(segment: Segment, y: tuple[int, int], x: tuple[int, int]) -> Segment | None:
    """Return the part of a segment in a rectangle of rows and columns [start, stop); None if it is empty."""
    (top, left), (height, width) = segment.corner, segment.crop.shape
    first, last = (max(y[0], top), max(x[0], left)), (min(y[1], top + height), min(x[1], left + width))
    if first[0] >= last[0] or first[1] >= last[1]:
        return None
    crop = segment.crop[first[0] - top : last[0] - top, first[1] - left : last[1] - left]
    return Segment.from_mask(crop, segment.label, segment.score, corner=first, size=segment.size)


def _join(tiles: list[tuple[Span, Span]], parts: list[list[_Part]], num_things: int) -> list[Segment]:
    """Return one segment per object and per stuff class, in descending order of score."""
    owner = {(t, i): (t, i) for t, found in enumerate(parts) for i in range(len(found))}

    def root(key: tuple[int, int]) -> tuple[int, int]:
        while owner[key] != key:
            key = owner[key]
        return key

    first_of_stuff: dict[int, tuple[int, int]] = {}
    for key in owner:
        label = parts[key[0]][key[1]].seen.label
        if label >= num_things:
            owner[key] = first_of_stuff.setdefault(label, key)
    for a, b in combinations(range(len(tiles)), 2):
        strip = [(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(tiles[a], tiles[b])]
        if all(start < stop for start, stop in strip):
            for i, j in _same_objects(parts[a], parts[b], strip, num_things):
                owner[root((b, j))] = root((a, i))

    groups: dict[tuple[int, int], list[_Part]] = {}
    for key in owner:
        groups.setdefault(root(key), []).append(parts[key[0]][key[1]])
    joined = [_union(group) for group in groups.values() if any(part.own is not None for part in group)]
    return sorted(joined, key=lambda x: (-(x.score or 0), x.label))


def _same_objects(
    a: list[_Part], b: list[_Part], strip: list[tuple[int, int]], num_things: int
) -> list[tuple[int, int]]:
    """Return pairs of things of one class in two tiles whose masks agree where the tiles overlap."""
    clipped = [[(i, clip(part.seen, *strip)) for i, part in enumerate(found)] for found in (a, b)]
    rows, columns = ([(i, s) for i, s in found if s is not None and s.label < num_things] for found in clipped)
    ious = np.array([[_iou(p, q) if p.label == q.label else 0.0 for _, q in columns] for _, p in rows])
    if not ious.size:
        return []
    pairs = zip(*linear_sum_assignment(ious, maximize=True))
    return [(rows[i][0], columns[j][0]) for i, j in pairs if ious[i, j] >= MIN_IOU]


def _iou(a: Segment, b: Segment) -> float:
    shared = clip(a, *((window.start, window.stop) for window in b.window))
    if shared is None:
        return 0.0
    y, x = shared.corner[0] - b.corner[0], shared.corner[1] - b.corner[1]
    common = int((shared.crop & b.crop[y : y + shared.crop.shape[0], x : x + shared.crop.shape[1]]).sum())
    return common / (a.area + b.area - common)


def _union(group: list[_Part]) -> Segment:
    """Join the own parts of a group to one segment with the best score."""
    own = [part.own for part in group if part.own is not None]
    top, left = (min(segment.corner[axis] for segment in own) for axis in (0, 1))
    bottom, right = (max(segment.window[axis].stop for segment in own) for axis in (0, 1))
    crop = np.zeros((bottom - top, right - left), bool)
    for segment in own:
        y, x = segment.corner[0] - top, segment.corner[1] - left
        crop[y : y + segment.crop.shape[0], x : x + segment.crop.shape[1]] |= segment.crop
    scores = [part.seen.score for part in group if part.seen.score is not None]
    return Segment(own[0].label, max(scores, default=None), crop, (top, left), own[0].size)
