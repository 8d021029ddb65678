"""Kernels from the image: instance kernels that are read at the places where a map of centres has its maxima.

A learned kernel must first find out which part of an image is its own. Here the place is given: a map of centres, as in
CenterNet (arXiv:1904.07850), with a loss of its own, has a maximum at each object, and the feature at that place gives
the object's first kernel. Relatives are FastInst's activation-guided queries (arXiv:2303.08594, Sec. 3.2) and the query
selection of Mask DINO (arXiv:2206.02777, Sec. 3.3).
"""

import functools
import math

import torch
import torch.nn.functional as F
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...tasks import KernelBank
from ..layers import conv_norm_relu, full_precision, no_autocast, send
from ..mask_network import MaskNetwork, limited
from ..structures import MaskInputs, Places
from .semantic_fpn import FirstMasks, SemanticFPNKernelHead, coordinate_channels

# Probability of a centre in every cell at initialisation, as in CenterNet
CENTER_PRIOR = 0.1
CENTER_BIAS = -math.log((1 - CENTER_PRIOR) / CENTER_PRIOR)
# A maximum is the highest cell within this many pixels along each axis (but at least within the neighbouring cells)
PEAK_DISTANCE = 8
# Fall of a first mask's logits per squared distance in cells, before it is learned, and its largest learned exponent
DISTANCE_SCALE = 0.02
MOST_STEEPNESS = 6.0
# Standard deviations of the initial weights of the convolution of the coordinates, and of that before the kernels' own
# networks; those of the other convolutions are 0.01
COORDINATE_STD = 0.3
LOCAL_STD = 0.1


def quadratic_coordinates(x: torch.Tensor) -> torch.Tensor:
    """The channels 2x, 2y, (2x)^2, (2y)^2 and 4xy of positions from -1 to 1: [B, C, H, W] -> [B, 5, H, W].

    A linear function of them can be a paraboloid around any place.
    """
    xs, ys = (2 * coordinate_channels(x)).unbind(dim=1)
    return torch.stack([xs, ys, xs.square(), ys.square(), xs * ys], dim=1)


def inside_images(x: torch.Tensor, image_sizes: torch.Tensor, stride: int) -> torch.Tensor:
    """Cells of a map that show part of an image instead of padding.

    Args:
        x: [..., H, W], the map at this stride.
        image_sizes: int64 [B, 2], height and width in pixels; one of them may stand for all.

    Returns:
        bool [B or 1, H, W].
    """
    rows, columns = (stride * torch.arange(length, device=x.device) for length in x.shape[-2:])
    heights, widths = send(image_sizes, x.device)[:, :, None].unbind(dim=1)
    return (rows < heights)[:, :, None] & (columns < widths)[:, None, :]


def highest_peaks(scores: torch.Tensor, inside: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """The cells with the highest local maxima. Where there are fewer, the lowest other cells follow, then padding.

    A kernel at another high cell, beside a peak, would segment the same object as that of the peak.

    Args:
        scores: [B, H, W], in (0, 1).
        inside: bool [B or 1, H, W], cells that belong to an image.
        count: N; where it exceeds the number of cells, the first cell is given again.
        window: odd; a maximum is the highest cell in a square of this side.

    Returns:
        int64 [B, N], index y W + x of the cells, by falling rank.
    """
    scores = torch.where(inside, scores, -2)
    highest = F.max_pool2d(scores[:, None], window, stride=1, padding=window // 2)[:, 0]
    ranks = torch.where(scores == highest, scores, -scores.abs()).flatten(1)
    cells = torch.arange(ranks.shape[1], device=ranks.device)
    # A fixed number of candidates behind all cells, since a graph's top-k can't depend on the size of the map
    best = F.pad(ranks, (0, count), value=-4).topk(count).indices
    return F.pad(cells, (0, count))[best]


class ImageKernels(nn.Module):
    """The InstanceKernels of .semantic_fpn that are read at the N highest maxima of a map of centres.

    The first masks fall with the distance to a kernel's place, and F_loc is given channels that tell the place. Without
    these two, kernels of alike objects have alike masks. The logit of the centre is added to those of the classes, so
    that a kernel beside a peak is less sure than that of the peak.
    """

    def __init__(self, dim: int, num_kernels: int, norm: str, stride: int, network_width: int = 0):
        """
        Args:
            dim, num_kernels, norm, stride: see :class:`.semantic_fpn.InstanceKernels`.
            network_width: see :class:`..mask_network.MaskNetwork`; 0: masks are those of the 1x1 convolution alone.
        """
        super().__init__()
        self.num_kernels = num_kernels
        self.stride = stride
        self.window = 2 * max(1, PEAK_DISTANCE // stride) + 1
        self.coordinates = nn.Conv2d(5, dim, 1)
        self.center_conv = conv_norm_relu(dim, dim, 3, norm)
        self.center_predictor = nn.Conv2d(dim, 1, 1)
        self.kernel_branch = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        # Per kernel: how steeply its first mask falls with the distance to its place, and an offset
        self.extent = nn.Linear(dim, 2)
        self.mask_network = self.local = None
        if network_width:
            self.local = nn.Conv2d(dim, network_width, 1)
            self.mask_network = MaskNetwork(dim, network_width)

    def init_weights(self) -> None:
        """See :class:`.semantic_fpn.InstanceKernels`."""
        nn.init.normal_(self.coordinates.weight, std=COORDINATE_STD)
        nn.init.constant_(self.center_predictor.bias, CENTER_BIAS)
        nn.init.zeros_(self.extent.weight)
        nn.init.zeros_(self.extent.bias)
        if self.mask_network is not None:
            nn.init.normal_(self.local.weight, std=LOCAL_STD)
            self.mask_network.init_weights()

    def localize(self, localization_feature: torch.Tensor) -> torch.Tensor:
        """See :class:`.semantic_fpn.InstanceKernels`."""
        return localization_feature + self.coordinates(quadratic_coordinates(localization_feature))

    def first_masks(
        self, fused: torch.Tensor, localization_feature: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> FirstMasks:
        """See :class:`.semantic_fpn.InstanceKernels`."""
        centers = self.center_conv(fused)
        with no_autocast(fused):
            # Rounded to a half type, neighbouring cells would tie
            predictor = self.center_predictor
            center_logits = F.conv2d(full_precision(centers), predictor.weight, predictor.bias)[:, 0]
            feature = full_precision(localization_feature)
            height, width = feature.shape[-2:]
            cells = self._places(center_logits.detach(), image_sizes)
            at_cells = feature.flatten(2).gather(2, cells[:, None].expand(-1, feature.shape[1], -1)).transpose(1, 2)
            kernels = self.kernel_branch(at_cells)
            steepness, offset = self.extent(at_cells).unbind(dim=2)
            # Exponential: the steepness that an object needs falls with its area
            scales = DISTANCE_SCALE * steepness.clamp(max=MOST_STEEPNESS).exp()
            falls = scales[..., None, None] * squared_distances(cells, height, width)
            masks = (kernels @ feature.flatten(2)).unflatten(2, (height, width)) + offset[..., None, None]
            logits = center_logits.detach().flatten(1).gather(1, cells)
            places = Places(cells, logits.sigmoid(), class_offsets=logits - CENTER_BIAS)
            masks, inputs = masks - falls, None
            if self.mask_network is not None:
                local = F.conv2d(feature, self.local.weight, self.local.bias)
                units = scales.sqrt()[..., None]
                positions = (limited(units * x) for x in distances(cells, height, width))
                inputs = MaskInputs(local, *positions)
                masks = masks + self.mask_network(kernels, inputs)
            return FirstMasks(kernels, masks, center_logits, places, inputs)

    def _places(self, logits: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        """[B, H, W] -> int64 [B, N]."""
        inside = logits.new_ones((), dtype=torch.bool)
        if image_sizes is not None:
            inside = inside_images(logits, image_sizes, self.stride)
        return highest_peaks(logits.sigmoid(), inside, self.num_kernels, self.window)


def distances(places: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far columns are right of some cells, and rows below, in cells: [B, N], y W + x -> [B, N, W], [B, N, H]."""
    rows = torch.arange(height, device=places.device)[:, None]
    columns = torch.arange(width, device=places.device)
    # Looked up instead of divided: ONNX has no division by a length that the graph computes
    y, x = (axis.expand(height, width).flatten()[places] for axis in (rows, columns))
    return columns - x[..., None], rows[:, 0] - y[..., None]


def squared_distances(places: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Of all cells to some of them, in cells: int64 [..., N], y W + x -> float [..., N, H, W]."""
    across, down = distances(places, height, width)
    return (down.square()[..., None] + across.square()[..., None, :]).float()


@SEM_SEG_HEADS_REGISTRY.register()
class ImageKernelHead(SemanticFPNKernelHead):
    """The semantic FPN head with instance kernels from the image; stuff kernels are the semantic classifier's."""

    @classmethod
    def from_config(cls, cfg, input_shape, bank: KernelBank):
        kernels = functools.partial(ImageKernels, network_width=cfg.MODEL.KNET.MASK_NETWORK_WIDTH)
        return {**super().from_config(cfg, input_shape, bank), "instance_kernels": kernels}
