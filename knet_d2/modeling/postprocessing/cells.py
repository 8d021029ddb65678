"""The functions of pixels on a CPU, for one image: masks are computed only where they matter.

After the sigmoid, resizing is linear and separable: one matrix per axis. So a cell of the result, a few pixels high and
wide, depends on a small window of probabilities. If the lowest and the highest probability of the window show that a
kernel's mask is full or empty there, or that the kernel can't win, none of the cell's pixels is computed. For example,
masks of 200 x 272 probabilities and a result of 480 x 640 give 48 x 64 cells of 10 x 10 pixels, whose windows have
6 x 6 probabilities. See :class:`.rules.PixelFunctions`.

Shapes: N kernels, h x w up-sampled probabilities, H x W the result, in J x K cells; a cell has p x q pixels, and its
window a x b probabilities. The last cells may extend past the result; probabilities are 0 there.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .resize import ImageGeometry, upsampled_probabilities
from .rules import MASK_THRESHOLD

# Cells are as large as CELL_STEP probabilities, but not larger than CELL_PIXELS a side. Smaller cells skip more pixels
# but need more comparisons of bounds
CELL_STEP = 4
CELL_PIXELS = 24
# Numbers in the maps of the cells that are computed at once, and in the up-sampled maps whose lowest and highest
# values are searched at once: they stay in the cache (1 and 2 MB in float32)
CHUNK_ELEMENTS = 1 << 18
BOUNDS_ELEMENTS = 1 << 19


@torch.no_grad()
def binary_masks(mask_logits: torch.Tensor, kernels: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """See :meth:`.rules.PixelFunctions.binary_masks`; the result is a view of slightly larger masks."""
    distinct, copies = kernels.unique(return_inverse=True)  # a kernel is computed once, however often it is shown
    cells = Cells(mask_logits[distinct], geometry)
    masks = cells.zeros(len(copies), np.dtype(bool))
    full = cells.low > MASK_THRESHOLD
    shown, rows = full[copies].any(dim=2).nonzero(as_tuple=True)
    masks.flatten(3)[shown, rows] = cells.widen(full[copies[shown], rows])[:, None]
    mixed = ((cells.high > MASK_THRESHOLD) & ~full).nonzero()
    for part in mixed.split(cells.chunk_length(1)):
        some, rows, columns = part.unbind(1)
        computed = cells.resize(some[:, None], rows, columns)[:, 0] > MASK_THRESHOLD
        shown, chosen = (copies[:, None] == some).nonzero(as_tuple=True)
        masks[shown, rows[chosen], :, columns[chosen]] = computed[chosen]
    return cells.crop(masks)


@torch.no_grad()
def assign_pixels(
    scores: torch.Tensor, mask_logits: torch.Tensor, candidates: torch.Tensor, geometry: ImageGeometry
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :meth:`.rules.PixelFunctions.assign_pixels`."""
    cells = Cells(mask_logits, geometry)
    best, worst = (scores[:, None, None] * bound for bound in (cells.high, cells.low))
    # A kernel wins nothing in a cell if another kernel's lowest claim there exceeds its highest one. Negated, so that a
    # kernel with NaN still competes
    competes = ~(best < worst.amax(dim=0)).flatten(1)
    counts = competes.sum(dim=0)
    kernels = competes.T.nonzero()[:, 1]  # of all cells, one cell after the other
    last = counts.cumsum(0) - 1
    first = last - counts + 1
    owners = cells.zeros(1, np.dtype("int64"))
    # Right where one kernel competes; the pixels of the other cells are computed below
    owners.flatten(3)[0] = cells.widen(kernels[last].view(owners.shape[1], -1))[:, None]
    for count, chosen in cells.chunks(counts):
        # A cell with fewer kernels repeats its last one, which changes no maximum
        places = (first[chosen, None] + torch.arange(count)).minimum(last[chosen, None])
        rows, columns = chosen // owners.shape[3], chosen % owners.shape[3]
        owners[0, rows, :, columns] = _winners(cells, scores, kernels[places], rows, columns)
    pixels = cells.crop(owners)[0]
    areas = pixels.flatten().bincount(minlength=len(scores))
    return pixels, areas, _mask_areas(cells, candidates & (areas > 0))


def _winners(
    cells: "Cells", scores: torch.Tensor, kernels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Which of its competing kernels wins each pixel of a cell.

    Args:
        kernels: int64 [m, n], the competing kernels of m cells.
        rows, columns: int64 [m], the cells.

    Returns:
        int64 [m, p, q], kernels.
    """
    count = kernels.shape[1]
    claims = cells.resize(kernels, rows, columns, scores[kernels])
    # Descending codes make amax() pick the first kernel on ties; amax() is ten times as fast as max() with indices
    codes = torch.arange(count, 0, -1, dtype=torch.float)[:, None, None]
    winning = claims.ge_(claims.amax(dim=1, keepdim=True)).float()
    winners = count - winning.mul_(codes).amax(dim=1).clamp_(min=1)  # where something is NaN nobody wins
    return kernels.gather(1, winners.long().flatten(1)).view(winners.shape)


def _mask_areas(cells: "Cells", wanted: torch.Tensor) -> torch.Tensor:
    """Pixels where a kernel's own probability is at least MASK_THRESHOLD: bool [N] -> int64 [N], 0 for the others."""
    full = (cells.low >= MASK_THRESHOLD) & wanted[:, None, None]
    areas = (full * cells.areas).sum(dim=(1, 2))
    mixed = ((cells.high >= MASK_THRESHOLD) & ~full & wanted[:, None, None]).nonzero()
    for part in mixed.split(cells.chunk_length(1)):
        kernels, rows, columns = part.unbind(1)
        covered = cells.resize(kernels[:, None], rows, columns) >= MASK_THRESHOLD
        # Counting in floats, which are exact here, is five times as fast as in integers
        areas.index_add_(0, kernels, covered.flatten(1).sum(dim=1, dtype=torch.float).long())
    return areas


class Cells:
    """The masks of one image, cell by cell.

    Attributes:
        low, high: [N, J, K], the lowest and the highest probability that any pixel of a cell depends on.
        areas: int64 [J, K], pixels of a cell that are in the result.
    """

    def __init__(self, mask_logits: torch.Tensor, geometry: ImageGeometry):
        """
        Args:
            mask_logits: [N, h / 2, w / 2], of the head.
        """
        self._output = geometry.output
        self._probs = upsampled_probabilities(mask_logits)
        self._rows, self._columns = (
            _Axis(mask_logits.dtype, *sizes) for sizes in zip(self._probs.shape[1:], *geometry)
        )
        self.areas = torch.outer(self._rows.sizes, self._columns.sizes)
        _, height, width = self._probs.shape
        low, high = [], []
        for probs in self._probs.split(max(1, BOUNDS_ELEMENTS // (height * width))):
            bands = self._rows.windows(probs)
            low.append(self._columns.windows(bands.amin(2).mT).amin(2).mT)
            high.append(self._columns.windows(bands.amax(2).mT).amax(2).mT)
        self.low, self.high = torch.cat(low), torch.cat(high)
        # Where in a flat map a window begins, and from there its probabilities: [J, K] and [a, 1, b]
        self._corners = self._rows.starts[:, None] * width + self._columns.starts
        a, b = self._rows.weights.shape[2], self._columns.weights.shape[2]
        self._window = (torch.arange(a)[:, None] * width + torch.arange(b))[:, None]

    def resize(
        self, kernels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, factors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Probabilities of some kernels in some cells.

        Args:
            kernels: int64 [m, n], for each cell.
            rows, columns: int64 [m], of the cells.
            factors: [m, n], to multiply with.

        Returns:
            [m, n, p, q].
        """
        _, height, width = self._probs.shape
        down, across = self._rows.weights[rows], self._columns.weights[columns]
        (m, n), (_, p, _), (_, q, b) = kernels.shape, down.shape, across.shape
        corners = self._corners[rows, columns, None] + kernels * (height * width)
        index = corners[:, None, :, None] + self._window  # [m, a, n, b]
        windows = self._probs.view(-1).index_select(0, index.view(-1)).view(index.shape)
        if factors is not None:
            windows *= factors[:, None, :, None]
        tall = torch.bmm(down, windows.flatten(2)).view(m, p * n, b)
        return torch.bmm(tall, across.mT).view(m, p, n, q).transpose(1, 2).contiguous()

    def chunk_length(self, count: int) -> int:
        """Number of cells that are computed at once for ``count`` kernels each."""
        (_, p, a), (_, q, b) = self._rows.weights.shape, self._columns.weights.shape
        return max(1, CHUNK_ELEMENTS // (count * max(p * q, a * b)))

    def chunks(self, counts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Divide the cells with more than one kernel into those that are computed at once.

        Args:
            counts: int64 [J K], number of kernels in each cell.

        Yields:
            the largest number of kernels of some cells, and the cells, int64 [m].
        """
        falling, cells = counts[counts > 1].sort(descending=True)[0].tolist(), counts.argsort(descending=True)
        start = 0
        while start < len(falling):
            stop = start + self.chunk_length(falling[start])
            yield falling[start], cells[start : min(stop, len(falling))]
            start = stop

    def zeros(self, count: int, dtype: np.dtype) -> torch.Tensor:
        """Empty maps by cells: [count, J, p, K, q]. NumPy asks for huge pages, up to 4 times as fast as torch.zeros."""
        sizes = (*self._rows.weights.shape[:2], *self._columns.weights.shape[:2])
        return torch.from_numpy(np.zeros((count, *sizes), dtype))

    def widen(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat the value of a cell for each of its columns of pixels: [..., K] -> [..., K q]."""
        return values.repeat_interleave(self._columns.weights.shape[1], dim=-1)

    def crop(self, maps: torch.Tensor) -> torch.Tensor:
        """[M, J, p, K, q] -> [M, H, W], a view."""
        height, width = self._output
        return maps.flatten(3).flatten(1, 2)[:, :height, :width]


class _Axis:
    """The cells along one axis.

    Attributes:
        starts: int64 [J], the first probability of each window.
        weights: [J, p, a], from the window to the pixels.
        sizes: int64 [J], pixels that are in the result.
    """

    def __init__(self, dtype: torch.dtype, length: int, padded: int, image: int, output: int):
        pixels = round(CELL_STEP * (output * padded) / (image * length))
        pixels = max(1, min(pixels, CELL_PIXELS))
        cell, place = np.divmod(np.arange(output), pixels)
        index, weight = _taps(length, padded, image, output)
        starts = index[::pixels, 0]
        window = int((index - starts[cell, None]).max()) + 1
        starts = starts.clip(max=length - window)
        weights = np.zeros((len(starts), pixels, window))
        np.add.at(weights, (cell[:, None], place[:, None], index - starts[cell, None]), weight)
        self.starts, self.weights = torch.from_numpy(starts), torch.from_numpy(weights).to(dtype)
        self.sizes = torch.from_numpy(np.bincount(cell))
        self._index = (self.starts[:, None] + torch.arange(window)).flatten()

    def windows(self, maps: torch.Tensor) -> torch.Tensor:
        """The windows along dimension 1: [n, L, M] -> [n, J, a, M]."""
        return maps.index_select(1, self._index).unflatten(1, (len(self.starts), -1))


def _taps(length: int, padded: int, image: int, output: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, [output, 4] each, of the probabilities whose weighted mean a pixel of the result is."""
    inner, inner_weight = _neighbours(length, padded)
    outer, outer_weight = _neighbours(image, output)
    index, weight = inner[outer].reshape(output, 4), outer_weight[..., None] * inner_weight[outer]
    weight = weight.reshape(output, 4)
    return np.where(weight > 0, index, index[:, :1]), weight


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, [target, 2] each, that F.interpolate(mode="bilinear", align_corners=False) reads."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).clip(min=0)
    low = position.astype(np.int64)
    high = (low + 1).clip(max=source - 1)
    return np.stack([low, high], axis=1), np.stack([1 - (position - low), position - low], axis=1)
