"""Mask probabilities at the pixels of the result, computed only where they matter.

A mask goes from the head's resolution to the result's in the order that the official numbers need: up-sample the
logits x2, sigmoid, bilinear to the padded input size, crop to the image, bilinear to the original size. Behind the
sigmoid this is linear and separable: a small matrix per axis. So a cell of the result, some pixels high and wide,
depends on a small window of probabilities, and where the window shows that a kernel is of no interest in the cell,
nothing of it has to be computed.

Shapes: N masks, h x w up-sampled, H x W the result, in J x K = C cells; a cell has p x q pixels, and its window a x b
probabilities.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .resize import SCALE, upsample_masks, upsampled_size

# Windows are CELL_STEP probabilities apart, or fewer where cells would get more than about CELL_PIXELS a side. Of small
# cells fewer pixels are computed, but more bounds compared.
CELL_STEP = 4
CELL_PIXELS = 24
# Bounds the float maps of the cells that are computed at once. On a CPU they stay in the cache (1 MB in float32); on
# accelerators, where every call costs more, they take 16 MB.
CPU_CHUNK_ELEMENTS = 1 << 18
CHUNK_ELEMENTS = 1 << 22


class ImageGeometry(NamedTuple):
    """Sizes (height, width) that one image goes through."""

    padded: tuple[int, int]  # of the batch, the network's input
    image: tuple[int, int]  # of the image in it, at the top left
    output: tuple[int, int]  # of the result


def upsampled_probabilities(mask_logits: torch.Tensor) -> torch.Tensor:
    """What results are resized from: [N, h / 2, w / 2] logits of the head -> [N, h, w]."""
    return upsample_masks(mask_logits[:, None])[:, 0].sigmoid_()  # so that there may be none


class Axis(NamedTuple):
    """The cells along one axis. Windows are equally far apart, so that cells may differ by some pixels.

    Attributes:
        start: of the first window.
        step: from one window to the next.
        borders: the first pixel of each cell, and the end of the last.
        cells: int64 [H], of each pixel.
        pixels: int64 [J, p], of each cell; one with fewer pixels repeats its last.
        inside: bool [J, p], False where a pixel is repeated.
        weights: [J, p, a], from the window to the pixels; every row adds to one.
    """

    start: int
    step: int
    borders: Sequence[int]
    cells: torch.Tensor
    pixels: torch.Tensor
    inside: torch.Tensor
    weights: torch.Tensor

    @property
    def stop(self) -> int:
        """Behind the last window."""
        count, _, size = self.weights.shape
        return self.start + self.step * (count - 1) + size

    def windows(self, probs: torch.Tensor, dim: int) -> torch.Tensor:
        """Dimension ``dim`` becomes that of the cells, and the window an additional last one (a view)."""
        size = self.weights.shape[2]
        return probs.narrow(dim, self.start, self.stop - self.start).unfold(dim, size, self.step)


class Cells:
    """The masks of one image, cell by cell; cells are numbered row by row.

    Attributes:
        low, high: [N, C], the lowest and the highest probability that any pixel of a cell depends on.
        areas: int64 [C], pixels of a cell.
    """

    def __init__(self, mask_logits: torch.Tensor, geometry: ImageGeometry):
        """
        Args:
            mask_logits: [N, h / 2, w / 2], of the head.
        """
        self.output = geometry.output
        # While a model is traced the sizes are tensors
        axes = zip(upsampled_size(mask_logits), *geometry)
        self.rows, self.columns = (_axis(mask_logits, *map(int, sizes)) for sizes in axes)
        self._probs = upsampled_probabilities(_pad(mask_logits, self.rows.stop, self.columns.stop))
        bands = self.rows.windows(self._probs, 1)
        self.low, self.high = (
            reduce(self.columns.windows(reduce(bands, dim=3), 2), dim=3).flatten(1)
            for reduce in (torch.amin, torch.amax)
        )
        self.areas = torch.outer(*(axis.inside.sum(dim=1) for axis in (self.rows, self.columns))).flatten()
        # Where in a flat map a window begins, and from there its probabilities: [C] and [a, 1, b]
        rows, columns = (torch.arange(axis.stop, device=mask_logits.device) for axis in (self.rows, self.columns))
        rows, columns = self.rows.windows(rows * self._probs.shape[2], 0), self.columns.windows(columns, 0)
        self._corners = (rows[:, :1] + columns[:, 0]).flatten()
        self._window = (rows[0] - rows[0, 0])[:, None, None] + columns[0] - columns[0, 0]

    def resize(self, kernels: torch.Tensor, cells: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Probabilities of some kernels in some cells.

        Args:
            kernels: int64 [m, n], for each cell.
            cells: int64 [m].
            factors: [m, n], to multiply with.

        Returns:
            [m, n, p * q].
        """
        rows, columns = self._split(cells)
        _, height, width = self._probs.shape
        corners = kernels * (height * width) + self._corners[cells, None]
        index = corners[:, None, :, None] + self._window  # [m, a, n, b]
        windows = self._probs.view(-1).index_select(0, index.view(-1)).view(index.shape)
        if factors is not None:
            windows *= factors[:, None, :, None]
        wide = self.rows.weights[rows] @ windows.flatten(2)
        (m, n), (_, p, _), (_, q, b) = kernels.shape, self.rows.weights.shape, self.columns.weights.shape
        tall = wide.view(m, p * n, b) @ self.columns.weights[columns].transpose(1, 2)
        return tall.view(m, p, n, q).transpose(1, 2).reshape(m, n, p * q)

    def pixels(self, cells: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Where the pixels of cells lie in flattened maps [M, H, W]: cells and maps int64 [m] -> int64 [m, p * q]."""
        height, width = self.output
        rows, columns = self._split(cells)
        lines = (maps * (height * width))[:, None] + self.rows.pixels[rows] * width
        return (lines[:, :, None] + self.columns.pixels[columns, None]).flatten(1)

    def inside(self, cells: torch.Tensor) -> torch.Tensor:
        """Which of them are not repeated: int64 [m] -> bool [m, p * q]."""
        rows, columns = self._split(cells)
        return (self.rows.inside[rows, :, None] & self.columns.inside[columns, None]).flatten(1)

    def fill(self, masks: torch.Tensor, chosen: torch.Tensor) -> None:
        """Set the pixels of some cells: bool [M, H, W], so far False, and bool [M, C]."""
        grids = chosen.unflatten(1, (len(self.rows.pixels), len(self.columns.pixels)))
        used = grids.any(dim=2).cpu().numpy()  # on the CPU, so that a device is waited for once
        for i in np.flatnonzero(used.any(axis=1)):
            cells = np.flatnonzero(used[i])
            bands = slice(cells[0], cells[-1] + 1)
            lines = slice(self.rows.borders[bands.start], self.rows.borders[bands.stop])
            # Transposed, as a CPU copies rows at once and columns one by one
            wide = grids[i, bands].T.contiguous().index_select(0, self.columns.cells).T.contiguous()
            torch.index_select(wide, 0, self.rows.cells[lines] - bands.start, out=masks[i, lines])

    def chunks(self, counts: Sequence[int]) -> Iterator[slice]:
        """Shares out cells that are computed together.

        Args:
            counts: of kernels in each cell, rising; those of a chunk all take as much memory as its last one.
        """
        limit = CPU_CHUNK_ELEMENTS if self._probs.device.type == "cpu" else CHUNK_ELEMENTS
        (_, p, a), (_, q, b) = self.rows.weights.shape, self.columns.weights.shape
        sizes = np.asarray(counts) * max(p * q, a * b)
        start = 0
        while start < len(sizes):
            candidates = sizes[start : start + max(1, limit // int(sizes[start]))]
            taken = np.searchsorted(candidates * np.arange(1, len(candidates) + 1), limit, side="right")
            stop = start + max(1, int(taken))
            yield slice(start, stop)
            start = stop

    def _split(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of cells to those of their rows and columns."""
        count = len(self.columns.pixels)
        return cells.div(count, rounding_mode="floor"), cells.remainder(count)


def _pad(mask_logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Repeat the last row and column until the up-sampled map has at least this size, for windows that exceed it."""
    bottom, right = (
        max(0, math.ceil(size / SCALE) - length) for size, length in zip((height, width), mask_logits.shape[1:])
    )
    if right == bottom == 0:
        return mask_logits
    return F.pad(mask_logits[:, None], (0, right, 0, bottom), mode="replicate")[:, 0]


def _axis(like: torch.Tensor, length: int, padded: int, image: int, output: int) -> Axis:
    """The cells of one axis; tensors on the device of ``like``, matrices of its type."""
    # All is found with NumPy, so that nothing waits for a device
    index, weight = _taps(length, padded, image, output)
    first = index[:, 0]
    pixels_per_probability = len(first) / (first[-1] - first[0] + 1)
    step = min(CELL_STEP, math.ceil(CELL_PIXELS / pixels_per_probability))
    step = max(step, int(np.diff(first).max(initial=0)))  # no cell stays without a pixel
    cell = (first - first[0]) // step
    borders = np.searchsorted(cell, np.arange(cell[-1] + 2))
    sizes = np.diff(borders)
    place = np.arange(sizes.max())
    pixels = borders[:-1, None] + np.minimum(place, sizes[:, None] - 1)
    starts = first[0] + step * np.arange(len(sizes))
    taps = index[pixels] - starts[:, None, None]
    weights = np.zeros((*pixels.shape, int(taps.max()) + 1))
    np.add.at(weights, (*np.indices(pixels.shape)[..., None], taps), weight[pixels])
    inside = place < sizes[:, None]
    tensors = *map(torch.from_numpy, (cell, pixels, inside)), torch.from_numpy(weights).to(like.dtype)
    return Axis(int(first[0]), step, borders.tolist(), *(tensor.to(like.device) for tensor in tensors))


def _taps(length: int, padded: int, image: int, output: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``length`` probabilities a pixel of the result is a mean of: indices and weights, [output, 4] each."""
    outer, outer_weight = _neighbours(image, output)
    inner, inner_weight = _neighbours(length, padded)
    index = inner[outer].reshape(output, 4)
    weight = (outer_weight[..., None] * inner_weight[outer]).reshape(output, 4)
    return np.where(weight > 0, index, index[:, :1]), weight


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """What F.interpolate(mode="bilinear", align_corners=False) reads: indices and weights, [target, 2] each."""
    position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(min=0)
    low = position.astype(np.int64)
    high = (low + 1).clip(max=source - 1)
    return np.stack([low, high], axis=1), np.stack([1 - (position - low), position - low], axis=1)
