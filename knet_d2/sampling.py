"""Mask probabilities at the pixels of the result, computed tile by tile.

A mask goes from the head's resolution to the result's in the order that the official numbers need: up-sample the
logits x2, sigmoid, bilinear to the padded input size, crop to the image, bilinear to the original size. Behind the
sigmoid this is linear and separable: a small matrix per axis. So a tile of the result depends on a small block of
probabilities, and where the block shows that the tile is of no interest, nothing of it has to be computed.

Shapes: N masks, h x w up-sampled, H x W the result; a tile has p x q pixels, which depend on a x b probabilities.
"""

import itertools
from typing import Iterator, List, NamedTuple, Tuple

import numpy as np
import torch

from .modeling.resize import upsample_masks

# Bounds the memory of a tile's float maps: about 64 MB in float32
MAX_TILE_ELEMENTS = 1 << 24
# Small tiles skip more and stay in the caches, but every one costs some calls, which are dear on accelerators
CPU_TILE_SIDE = 56


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: Tuple[int, int]  # of the batch, the network's input
    image: Tuple[int, int]  # of the image in it, at the top left
    output: Tuple[int, int]  # of the result


def upsampled_probabilities(mask_logits: torch.Tensor) -> torch.Tensor:
    """What tiles are computed from: [N, h / 2, w / 2] logits of the head -> [N, h, w]."""
    return upsample_masks(mask_logits[:, None])[:, 0].sigmoid_()  # so that there may be none


class Span(NamedTuple):
    """A tile's extent on one axis.

    Attributes:
        pixels: of the result.
        source: the up-sampled probabilities that they depend on.
        weights: from the latter to the former, [p, a]; every row adds to one.
    """

    pixels: slice
    source: slice
    weights: torch.Tensor


class Tile(NamedTuple):
    """A rectangle of the result."""

    rows: Span
    columns: Span

    def source(self, probs: torch.Tensor) -> torch.Tensor:
        """What the tile depends on: [N, h, w] -> [N, a, b] (a view)."""
        return probs[:, self.rows.source, self.columns.source]

    def resize(self, source: torch.Tensor) -> torch.Tensor:
        """From :meth:`source`, or some of its masks: [n, a, b] -> [n, p, q]."""
        return self.rows.weights @ (source @ self.columns.weights.T)

    def of(self, result: torch.Tensor) -> torch.Tensor:
        """The tile's part of a result: [..., H, W] -> [..., p, q] (a view)."""
        return result[..., self.rows.pixels, self.columns.pixels]


class Tiles:
    """The tiles of the masks of one image, in the order of rows, then of columns."""

    def __init__(self, probs: torch.Tensor, geometry: ImageGeometry):
        """
        Args:
            probs: [N, h, w], :func:`upsampled_probabilities`.
        """
        self._probs = probs
        side = _tile_side(probs)
        # While a model is traced the sizes are tensors
        axes = zip(probs.shape[1:], *geometry)
        self._rows, self._columns = (_spans(probs, *map(int, sizes), side=side) for sizes in axes)

    def __iter__(self) -> Iterator[Tile]:
        return (Tile(rows, columns) for rows, columns in itertools.product(self._rows, self._columns))

    def bounds(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest probability that any pixel of a tile depends on: [N, number of tiles] each."""
        results = []
        for reduce in (torch.amin, torch.amax):
            bands = torch.stack([reduce(self._probs[:, row.source], dim=1) for row in self._rows], dim=1)
            blocks = torch.stack([reduce(bands[..., column.source], dim=2) for column in self._columns], dim=2)
            results.append(blocks.flatten(1))
        return results[0], results[1]


def _tile_side(probs: torch.Tensor) -> int:
    largest = max(1, int((MAX_TILE_ELEMENTS / max(1, len(probs))) ** 0.5))
    return min(largest, CPU_TILE_SIDE) if probs.device.type == "cpu" else largest


def _spans(like: torch.Tensor, length: int, padded: int, image: int, output: int, *, side: int) -> List[Span]:
    """Pieces of one axis, of ``side`` pixels; matrices of the type and device of ``like``."""
    # The extents are found with NumPy, so that nothing waits for a device
    weights = _bilinear(image, output) @ _bilinear(length, padded)[:image]
    given = torch.from_numpy(weights).to(like.dtype).to(like.device)
    spans = []
    for start in range(0, output, side):
        pixels = slice(start, start + side)
        source = _used(weights[pixels])
        spans.append(Span(pixels, source, given[pixels, source]))
    return spans


def _bilinear(source: int, target: int) -> np.ndarray:
    """What F.interpolate(mode="bilinear", align_corners=False) does on one axis, as a matrix [target, source]."""
    position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(min=0)
    low = position.astype(np.int64)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(target), (low + 1).clip(max=source - 1)), position - low)
    return matrix


def _used(weights: np.ndarray) -> slice:
    """The columns from the first to the last that has an entry."""
    columns = np.flatnonzero(weights.any(axis=0))
    return slice(int(columns[0]), int(columns[-1]) + 1)
