"""Mask probabilities at the pixels of the result, computed tile by tile.

A mask goes from the head's resolution to the result's in the order that the official numbers need: up-sample the
logits x2, sigmoid, bilinear to the padded input size, crop to the image, bilinear to the original size. Behind the
sigmoid this is linear and separable: a small matrix per axis. So a tile of the result depends on a small block of
probabilities, and where the block shows that the tile is of no interest, nothing of it has to be computed.

Shapes: N masks, h x w up-sampled, H x W the result; a tile has p x q pixels, which depend on a x b probabilities.
"""

import itertools
import math
from typing import Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch

from .modeling.resize import upsample_masks

# Bounds the memory of each of a tile's float maps: about 64 MB in float32
MAX_TILE_ELEMENTS = 1 << 24
# Small tiles skip more and stay in the caches, but every one costs some calls, which are dear on accelerators
CPU_TILE_SIDE = 80
# Bounds are looked for in so many parts of a tile's side
CELLS = 2


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: Tuple[int, int]  # of the batch, the network's input
    image: Tuple[int, int]  # of the image in it, at the top left
    output: Tuple[int, int]  # of the result


def upsampled_probabilities(mask_logits: torch.Tensor) -> torch.Tensor:
    """What tiles are computed from: [N, h / 2, w / 2] logits of the head -> [N, h, w]."""
    return upsample_masks(mask_logits[:, None])[:, 0].sigmoid_()  # so that there may be none


class Workspace:
    """Memory for one tile after the other: on a CPU, new memory costs more than what is computed in it."""

    def __init__(self, like: torch.Tensor):
        self._like = like
        self._buffers: Dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor whose content is valid until the next one of this name is taken."""
        count = math.prod(shape)
        if name not in self._buffers or len(self._buffers[name]) < count:
            self._buffers[name] = self._like.new_empty(count)
        return self._buffers[name][:count].view(shape)


class Span(NamedTuple):
    """A tile's extent on one axis.

    Attributes:
        pixels: of the result.
        source: the up-sampled probabilities that they depend on.
        cells: the same for each of CELLS parts of the pixels.
        weights: from the up-sampled probabilities to the pixels, [p, a]; every row adds to one.
    """

    pixels: slice
    source: slice
    cells: List[slice]
    weights: torch.Tensor


class Tile(NamedTuple):
    """A rectangle of the result."""

    rows: Span
    columns: Span

    def resize(self, probs: torch.Tensor, kernels: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Probabilities of some kernels in the tile: [N, h, w], int64 [n] -> [n, p, q], taken as "tile"."""
        source = probs[:, self.rows.source, self.columns.source]
        (n,), (_, a, b) = kernels.shape, source.shape
        rows, columns = self.rows.weights, self.columns.weights
        source = torch.index_select(source, 0, kernels, out=workspace.take("source", n, a, b))
        wide = torch.mm(source.view(n * a, b), columns.T, out=workspace.take("wide", n * a, len(columns)))
        tile = workspace.take("tile", n, len(rows), len(columns))
        return torch.bmm(rows.expand(n, -1, -1), wide.view(n, a, len(columns)), out=tile)

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
        """The lowest and highest probability that any pixel of a cell depends on: [N, tiles, cells of a tile] each."""
        results = []
        rows, columns = ([cell for span in spans for cell in span.cells] for spans in (self._rows, self._columns))
        for reduce in (torch.amin, torch.amax):
            bands = torch.stack([reduce(self._probs[:, cell], dim=1) for cell in rows], dim=1)
            blocks = torch.stack([reduce(bands[..., cell], dim=2) for cell in columns], dim=2)
            blocks = blocks.unflatten(2, (-1, CELLS)).unflatten(1, (-1, CELLS))
            results.append(blocks.transpose(2, 3).flatten(3).flatten(1, 2))
        return results[0], results[1]


def _tile_side(probs: torch.Tensor) -> int:
    largest = max(1, int((MAX_TILE_ELEMENTS / max(1, len(probs))) ** 0.5))
    return min(largest, CPU_TILE_SIDE) if probs.device.type == "cpu" else largest


def _spans(like: torch.Tensor, length: int, padded: int, image: int, output: int, *, side: int) -> List[Span]:
    """Pieces of one axis, of ``side`` pixels; matrices of the type and device of ``like``."""
    # The extents are found with NumPy, so that nothing waits for a device
    index, weight = _taps(length, padded, image, output)
    spans, matrices = [], []
    for start in range(0, output, side):
        pixels = slice(start, min(start + side, output))
        source = _used(index[pixels])
        matrices.append(_matrix(index[pixels] - source.start, weight[pixels], source.stop - source.start))
        spans.append((pixels, source, [_used(index[cell]) for cell in _parts(pixels)]))
    values = torch.from_numpy(np.concatenate([matrix.ravel() for matrix in matrices])).to(like.dtype).to(like.device)
    weights = values.split([matrix.size for matrix in matrices])
    return [Span(*span, flat.view(matrix.shape)) for span, flat, matrix in zip(spans, weights, matrices)]


def _parts(pixels: slice) -> List[slice]:
    """CELLS pieces, of one pixel at least."""
    borders = [pixels.start + (pixels.stop - pixels.start) * i // CELLS for i in range(CELLS + 1)]
    return [slice(start, max(stop, start + 1)) for start, stop in zip(borders, borders[1:])]


def _taps(length: int, padded: int, image: int, output: int) -> Tuple[np.ndarray, np.ndarray]:
    """Which of ``length`` probabilities a pixel of the result is a mean of: indices and weights, [output, 4] each."""
    outer, outer_weight = _neighbours(image, output)
    inner, inner_weight = _neighbours(length, padded)
    index = inner[outer].reshape(output, 4)
    weight = (outer_weight[..., None] * inner_weight[outer]).reshape(output, 4)
    return np.where(weight > 0, index, index[:, :1]), weight


def _neighbours(source: int, target: int) -> Tuple[np.ndarray, np.ndarray]:
    """What F.interpolate(mode="bilinear", align_corners=False) reads: indices and weights, [target, 2] each."""
    position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(min=0)
    low = position.astype(np.int64)
    high = (low + 1).clip(max=source - 1)
    return np.stack([low, high], axis=1), np.stack([1 - (position - low), position - low], axis=1)


def _used(index: np.ndarray) -> slice:
    """From the first to the last."""
    return slice(int(index.min()), int(index.max()) + 1)


def _matrix(index: np.ndarray, weight: np.ndarray, columns: int) -> np.ndarray:
    """Rows with the given weights at the given columns, [p, 4] each -> [p, columns]."""
    matrix = np.zeros((len(index), columns))
    np.add.at(matrix, (np.arange(len(index))[:, None], index), weight)
    return matrix
