"""Ground truth as the losses need it: padded like the batch, resized to the masks' resolution, and as label maps."""

import torch
import torch.nn.functional as F

from ..data.ground_truth import GroundTruth
from .structures import Match, Positives, Targets

# Ground truth masks of full resolution that are in memory together as numbers
MASKS_AT_ONCE = 16
# Pixels of the rank loss's targets that no kernel owns
UNOWNED = -1
# The Gaussian of an instance in the map of centres: sigma in cells per square root of the area in cells, and the least
CENTER_SPREAD = 0.12
CENTER_LEAST_SIGMA = 0.8
# Keeps the centroid of an instance without a pixel finite
CENTER_EPS = 1e-6


def build_targets(
    truth: GroundTruth,
    images: torch.Tensor,
    mask_size: tuple[int, int] | None,
    ignore_value: int,
    cell_size: tuple[int, int] | None = None,
) -> Targets:
    """Targets of one image.

    Args:
        truth: on the device of the images.
        images: the padded batch, [B, C, Hp, Wp], whose type the masks get.
        mask_size: height and width of the masks in the losses; None: they stay uint8 masks of full resolution.
        ignore_value: label of the pixels of the padding.
        cell_size: height and width of a map whose cells the instances cover; None: nobody asks for them.
    """
    height, width = images.shape[-2:]
    padding = (0, width - truth.size[1], 0, height - truth.size[0])

    def resized(masks: torch.Tensor) -> torch.Tensor:
        """Pad with 0 to the batch's size, then bilinear to the masks' size: [G, h, w], soft at the borders."""
        if mask_size is None:
            return F.pad(masks.byte(), padding)
        if len(masks) == 0:
            return images.new_zeros(0, *mask_size)
        masks = F.pad(masks, padding).to(images.dtype)
        return F.interpolate(masks[None], mask_size, mode="bilinear", align_corners=False)[0]

    sem_seg, stuff_masks = None, resized(truth.masks()[:0])
    if truth.labels is not None:
        labels = truth.labels.long()
        stuff_masks = resized(labels == truth.stuff_classes[:, None, None])
        sem_seg = F.pad(labels, padding, value=ignore_value)
    masks = resized(truth.masks())
    covered = None if cell_size is None else covered_cells(F.pad(truth.masks(), padding), cell_size, images.dtype)
    found = truth.classes, masks, truth.stuff_classes, stuff_masks, sem_seg
    return Targets(*found, image_size=truth.size, seed=truth.seed, track_ids=truth.track_ids, covered=covered)


def last_nonzero(masks: torch.Tensor, values: torch.Tensor, background: int) -> torch.Tensor:
    """Value of the last mask that is above 0 at each pixel.

    Args:
        masks: [P, h, w], painted in this order, each over the ones before.
        values: int64 [P].
        background: value where no mask is.

    Returns:
        int64 [h, w].
    """
    order = torch.arange(1, len(masks) + 1, dtype=torch.int32, device=masks.device)
    last = torch.where(masks > 0, order[:, None, None], 0)
    last = torch.cat([last.new_zeros(1, *masks.shape[1:]), last]).amax(dim=0)
    return torch.cat([values.new_full((1,), background), values])[last]


def rank_targets(positives: Positives) -> torch.Tensor:
    """The kernel that owns each pixel: int64 [B, h, w]; where several are positive the last one wins."""
    masks, kernels = positives.target_masks.split(positives.counts), positives.kernel_index.split(positives.counts)
    return torch.stack([last_nonzero(*item, background=UNOWNED) for item in zip(masks, kernels)])


def dense_labels(targets: Targets, match: Match, background: int) -> torch.Tensor:
    """Class of every pixel for the static semantic logits: int64 [h, w].

    Stuff is painted first, the matched things over it in the order of their kernels; the rest is background.
    """
    _, instances = match
    masks = torch.cat([targets.stuff_masks, targets.masks[instances]])
    classes = torch.cat([targets.stuff_classes, targets.classes[instances]])
    return last_nonzero(masks, classes, background)


def covered_cells(masks: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Which share of each cell of a map of H x W a mask covers: [G, h, w] -> [G, H, W]."""
    # Whole masks as numbers, a few at a time
    parts = [F.adaptive_avg_pool2d(x.to(dtype), size) for x in masks.split(MASKS_AT_ONCE)]
    return torch.cat(parts) if parts else masks.new_zeros(0, *size, dtype=dtype)


def own_cells(covered: torch.Tensor) -> torch.Tensor:
    """The cells that may be an instance's centre: [G, H, W] -> bool. Cells at its border are not, if it has others."""
    return (covered > 0) & (covered >= 0.5 * covered.amax(dim=(1, 2), keepdim=True))


def center_map(covered: torch.Tensor) -> torch.Tensor:
    """What a map of centres has to show for the instances of an image.

    Each instance gives a Gaussian, 1 at that of its cells which is closest to its centroid; the map is their maximum.

    Args:
        covered: [G, H, W], share of each cell that an instance covers; an instance without a pixel gives nothing.

    Returns:
        [H, W].
    """
    height, width = covered.shape[-2:]
    if len(covered) == 0:
        return covered.new_zeros(height, width)
    areas = covered.sum(dim=(1, 2))
    rows, columns = (torch.arange(length, dtype=covered.dtype, device=covered.device) for length in (height, width))
    weights = covered / areas.clamp(min=CENTER_EPS)[:, None, None]
    centroids = (weights.sum(2) @ rows)[:, None], (weights.sum(1) @ columns)[:, None]
    squares = _squared_distances(rows, columns, *centroids)
    own = own_cells(covered)
    places = torch.where(own, squares, torch.inf).flatten(1).argmin(dim=1)[:, None]
    squares = _squared_distances(rows, columns, places // width, places % width)
    sigmas = (CENTER_SPREAD * areas.sqrt()).clamp(min=CENTER_LEAST_SIGMA)
    gaussians = torch.exp(-squares / (2 * sigmas.square())[:, None, None])
    return (gaussians * own.any(dim=(1, 2), keepdim=True)).amax(dim=0)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared distances of all cells to the points (y, x), [G, 1] each: [G, H, W]."""
    return (rows - y).square()[:, :, None] + (columns - x).square()[:, None, :]
