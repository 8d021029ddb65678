"""Mask probabilities at the pixels of the result, computed tile by tile.

A mask goes from the head's resolution to the result's in the order that the official numbers need: up-sample the
logits x2, sigmoid, bilinear to the padded input size, crop to the image, bilinear to the original size. Before and
behind the sigmoid this is linear and separable: small matrices per axis. So a tile of the result depends on a small
block of logits, and where the block shows that the tile is of no interest, nothing of it has to be computed.

Shapes: N masks of h x w logits, H x W the result; a tile has p x q pixels, which depend on a x b logits.
"""

import itertools
from typing import Iterator, List, NamedTuple, Tuple

import numpy as np
import torch

from .modeling.resize import SCALE

# Bounds the memory of a tile's float maps: about 64 MB in float32
MAX_TILE_ELEMENTS = 1 << 24
# Small tiles skip more, but every one costs some calls, which are dear on accelerators
CPU_TILES_PER_AXIS = 16
MIN_TILE_SIDE = 16


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: Tuple[int, int]  # of the batch, the network's input
    image: Tuple[int, int]  # of the image in it, at the top left
    output: Tuple[int, int]  # of the result


class Span(NamedTuple):
    """A tile's extent on one axis.

    Attributes:
        pixels: of the result.
        logits: those that they depend on.
        upsampling: from these logits to the up-sampled ones that count, [m, a].
        resizing: from the latter, behind the sigmoid, to the pixels, [p, m].
    """

    pixels: slice
    logits: slice
    upsampling: torch.Tensor
    resizing: torch.Tensor


class Tile(NamedTuple):
    """A rectangle of the result."""

    rows: Span
    columns: Span

    def logits(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """What the tile depends on: [N, h, w] -> [N, a, b] (a view)."""
        return mask_logits[:, self.rows.logits, self.columns.logits]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """From :meth:`logits`, or some of them: [n, a, b] -> [n, p, q]."""
        probs = (self.rows.upsampling @ (logits @ self.columns.upsampling.T)).sigmoid_()
        return self.rows.resizing @ (probs @ self.columns.resizing.T)

    def of(self, result: torch.Tensor) -> torch.Tensor:
        """The tile's part of a result: [..., H, W] -> [..., p, q] (a view)."""
        return result[..., self.rows.pixels, self.columns.pixels]


class Tiles:
    """The tiles of the masks of one image, in the order of rows, then of columns."""

    def __init__(self, mask_logits: torch.Tensor, geometry: ImageGeometry):
        """
        Args:
            mask_logits: [N, h, w].
        """
        self._mask_logits = mask_logits
        axes = zip(mask_logits.shape[1:], *geometry, _tile_size(mask_logits, geometry.output))
        # While a model is traced the sizes are tensors
        self._rows, self._columns = (_spans(mask_logits, *map(int, sizes)) for sizes in axes)

    def __iter__(self) -> Iterator[Tile]:
        return (Tile(rows, columns) for rows, columns in itertools.product(self._rows, self._columns))

    def bounds(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest logit that any pixel of a tile depends on: [N, number of tiles] each."""
        results = []
        for reduce in (torch.amin, torch.amax):
            bands = torch.stack([reduce(self._mask_logits[:, row.logits], dim=1) for row in self._rows], dim=1)
            blocks = torch.stack([reduce(bands[..., column.logits], dim=2) for column in self._columns], dim=2)
            results.append(blocks.flatten(1))
        return results[0], results[1]


def _tile_size(mask_logits: torch.Tensor, output_size: Tuple[int, int]) -> List[int]:
    largest = max(1, int((MAX_TILE_ELEMENTS / max(1, len(mask_logits))) ** 0.5))
    if mask_logits.device.type != "cpu":
        return [largest, largest]
    return [min(largest, max(MIN_TILE_SIDE, -(-length // CPU_TILES_PER_AXIS))) for length in output_size]


def _spans(like: torch.Tensor, length: int, padded: int, image: int, output: int, side: int) -> List[Span]:
    """Pieces of one axis, of ``side`` pixels; matrices of the type and device of ``like``."""
    # The extents are found with NumPy, so that nothing waits for a device
    upsampling = _bilinear(length, SCALE * length)
    resizing = _bilinear(image, output) @ _bilinear(SCALE * length, padded)[:image]
    given = [torch.from_numpy(matrix).to(like.dtype).to(like.device) for matrix in (upsampling, resizing)]
    spans = []
    for start in range(0, output, side):
        pixels = slice(start, start + side)
        upsampled = _used(resizing[pixels])
        logits = _used(upsampling[upsampled])
        spans.append(Span(pixels, logits, given[0][upsampled, logits], given[1][pixels, upsampled]))
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
