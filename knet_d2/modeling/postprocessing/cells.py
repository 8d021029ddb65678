"""The functions of pixels on a CPU, for one image: masks are computed only where they matter.

After the sigmoid, resizing is linear and separable: one matrix per axis. So a cell of the result, a few pixels high and
wide, depends on a small window of probabilities. If the lowest and the highest probability of the window show that a
kernel's mask is full or empty there, or that the kernel can't win, none of the cell's pixels is computed. For example,
masks of 200 x 272 probabilities and a result of 480 x 640 give 48 x 64 cells of 10 x 10 pixels, whose windows have
6 x 6 probabilities. See :class:`.rules.PixelFunctions`.

Shapes: N kernels, h x w up-sampled probabilities, H x W the result, in J x K cells; a cell has p x q pixels, and its
window a x b probabilities. The last cells may extend past the result; probabilities are 0 there.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ..resize import ImageGeometry, upsampled_probabilities
from .rules import MASK_THRESHOLD

# Cells are as large as CELL_STEP probabilities, but not larger than CELL_PIXELS a side. Smaller cells skip more pixels
# but need more comparisons of bounds
CELL_STEP = 4
CELL_PIXELS = 24
# Bounds the float maps of the cells that are computed at once, so that they stay in the cache (1 MB in float32)
CHUNK_ELEMENTS = 1 << 18


@torch.no_grad()
def binary_masks(mask_logits: torch.Tensor, kernels: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """See :meth:`.rules.PixelFunctions.binary_masks`; the result is a view of slightly larger masks."""
    distinct, copies = kernels.unique(return_inverse=True)  # a kernel is computed once, however often it is shown
    cells = Cells(mask_logits[distinct], geometry)
    masks = cells.zeros(len(copies), np.dtype(bool))
    full = cells.low > MASK_THRESHOLD
    shown, rows, columns = full[copies].nonzero(as_tuple=True)
    masks[shown, rows, :, columns] = True
    mixed = ((cells.high > MASK_THRESHOLD) & ~full).nonzero(as_tuple=True)
    for some, rows, columns in cells.chunks(1, *mixed):
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
    owners = cells.zeros(1, np.dtype("int32"))
    best, worst = (scores[:, None, None] * bound for bound in (cells.high, cells.low))
    # A kernel wins nothing in a cell if another kernel's lowest claim there exceeds its highest one. Negated, so that a
    # kernel with NaN still competes
    competes = (~(best < worst.amax(dim=0))).permute(1, 2, 0)
    counts = competes.sum(dim=2)
    for count in counts.unique().tolist():
        places = (counts == count).nonzero(as_tuple=True)
        kernels = competes[places].nonzero()[:, 1].view(-1, count)
        for some, rows, columns in cells.chunks(count, kernels, *places):
            owners[0, rows, :, columns] = _winners(cells, scores, some, rows, columns)
    pixels = cells.crop(owners)[0].long()
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
        int32 [m, p, q], kernels; [m, 1, 1] if only one competes.
    """
    count = kernels.shape[1]
    if count == 1:
        return kernels[:, :, None].int()
    claims = cells.resize(kernels, rows, columns, scores[kernels])
    # Descending codes make amax() pick the first kernel on ties; amax() is ten times as fast as max() with indices
    codes = torch.arange(count, 0, -1, dtype=torch.float)[:, None, None]
    winning = claims.ge_(claims.amax(dim=1, keepdim=True)).float()
    winners = count - winning.mul_(codes).amax(dim=1).clamp_(min=1)  # where something is NaN nobody wins
    return kernels.gather(1, winners.long().flatten(1)).int().view(winners.shape)


def _mask_areas(cells: "Cells", wanted: torch.Tensor) -> torch.Tensor:
    """Pixels where a kernel's own probability is at least MASK_THRESHOLD: bool [N] -> int64 [N], 0 for the others."""
    full = (cells.low >= MASK_THRESHOLD) & wanted[:, None, None]
    areas = (full * cells.areas).sum(dim=(1, 2))
    mixed = (cells.high >= MASK_THRESHOLD) & ~full & wanted[:, None, None]
    for kernels, rows, columns in cells.chunks(1, *mixed.nonzero(as_tuple=True)):
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
        self._rows, self._columns = (_Axis(self._probs, *sizes) for sizes in zip(self._probs.shape[1:], *geometry))
        self.low, self.high = (
            self._columns.pool(self._rows.pool(self._probs, reduce), reduce) for reduce in (torch.amin, torch.amax)
        )
        self.areas = torch.outer(self._rows.sizes, self._columns.sizes)

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
        (m, n), (_, p, a), (_, q, b) = kernels.shape, down.shape, across.shape
        corners = self._rows.starts[rows] * width + self._columns.starts[columns]
        corners = corners[:, None] + kernels * (height * width)
        index = corners[:, None, :, None] + torch.arange(a)[:, None, None] * width + torch.arange(b)  # [m, a, n, b]
        windows = self._probs.view(-1).index_select(0, index.view(-1)).view(index.shape)
        if factors is not None:
            windows *= factors[:, None, :, None]
        tall = (down @ windows.flatten(2)).view(m, p * n, b)
        return (tall @ across.transpose(1, 2)).view(m, p, n, q).transpose(1, 2).contiguous()

    def chunks(self, count: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Parts of tensors [m, ...] of cells that are computed together; ``count`` kernels are in each cell."""
        (_, p, a), (_, q, b) = self._rows.weights.shape, self._columns.weights.shape
        length = max(1, CHUNK_ELEMENTS // (count * max(p * q, a * b)))
        return zip(*(x.split(length) for x in tensors))

    def zeros(self, count: int, dtype: np.dtype) -> torch.Tensor:
        """Empty maps by cells: [count, J, p, K, q]. NumPy asks for huge pages, up to 4 times as fast as torch.zeros."""
        sizes = (*self._rows.weights.shape[:2], *self._columns.weights.shape[:2])
        return torch.from_numpy(np.zeros((count, *sizes), dtype))

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

    def __init__(self, probs: torch.Tensor, length: int, padded: int, image: int, output: int):
        matrix = F.interpolate(torch.eye(length, dtype=torch.float64)[None], padded, mode="linear")
        matrix = F.interpolate(matrix[..., :image], output, mode="linear")[0].T  # [output, length]
        pixels = round(CELL_STEP * (output * padded) / (image * length))
        pixels = max(1, min(pixels, CELL_PIXELS))
        count = -(-output // pixels)
        matrix = F.pad(matrix, (0, 0, 0, count * pixels - output)).view(count, pixels, length)
        used = (matrix != 0).any(dim=1).byte()
        first, last = used.argmax(dim=1), length - 1 - used.flip(1).argmax(dim=1)
        self._window = int((last - first).max()) + 1
        self.starts = first.clamp(max=length - self._window)
        index = self.starts[:, None, None] + torch.arange(self._window)
        self.weights = matrix.gather(2, index.expand(-1, pixels, -1)).to(probs.dtype)
        self.sizes = (output - pixels * torch.arange(count)).clamp(max=pixels)

    def pool(self, maps: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Reduce (torch.amin or amax) the windows along dimension 1, which moves to the end: [N, L, M] -> [N, M, J].

        One call for each axis gives [N, J, K].
        """
        pooled = [reduce(maps.narrow(1, start, self._window), 1) for start in self.starts.tolist()]
        return torch.stack(pooled, dim=1).transpose(1, 2).contiguous()
