"""Shows single kernels, as in the paper's Figure 4: their average masks, and their masks at every stage.

Shapes: N kernels, of which the first M are matched to instances; K classes; pictures are uint8 RGB [H, W, 3].
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from ..data.classes import ClassTable
from ..errors import ConfigError, DataError
from ..modeling.layers import no_autocast
from ..modeling.meta_arch import KNet
from ..modeling.postprocessing import mask_probabilities
from ..results.pictures import picture_sheet

# Side of the square to which the paper resizes all masks, and of the pictures' cells
SIDE = 200
_CAPTION_HEIGHT = 14


class KernelMasks(NamedTuple):
    """Predictions of all kernels for one image.

    Attributes:
        masks: probabilities [N, H, W].
        scores: [N], of each kernel's best class.
        labels: int64 [N], that class.
    """

    masks: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class AverageMasks(NamedTuple):
    """Average masks of the instance kernels over many images.

    Attributes:
        masks: mean probabilities, float64 [M, SIDE, SIDE].
        num_objects: int64 [M], images in which the kernel's score reached the threshold.
        num_images: number of images.
    """

    masks: np.ndarray
    num_objects: np.ndarray
    num_images: int


@torch.no_grad()
def stage_masks(model: KNet, sample: dict[str, Any], output_size: tuple[int, int]) -> list[KernelMasks]:
    """Masks of one image before the first update, then after each stage.

    Args:
        model: in evaluation mode.
        sample: one input of the model.
        output_size: height and width of the masks.

    Raises:
        ConfigError: the model is a semantic one.
    """
    if not model.bank.num_matched:
        raise ConfigError(
            "MODEL.KNET.TASK = 'semantic': each kernel is a class, so its results show its mask; MODEL.KNET.TEST.STAGE "
            "selects the stage. Use a model for instance or panoptic segmentation."
        )
    images = model.preprocess_image([sample])
    output = model.network(images.tensor, torch.tensor(images.image_sizes))
    sized = {**sample, "height": output_size[0], "width": output_size[1]}
    found = []
    with no_autocast(images.tensor):
        for stage in range(len(output.stages) + 1):
            class_logits, mask_logits, geometry = model.image_logits(output, [sized], images, stage)[0][:3]
            scores, labels = class_logits.sigmoid().masked_fill(~model.postprocessor.class_mask, -1).max(dim=1)
            masks = mask_probabilities(mask_logits, geometry)
            found.append(KernelMasks(*(x.cpu().numpy() for x in (masks, scores, labels))))
    return found


def average_masks(model: KNet, samples: Iterable[dict[str, Any]], score_threshold: float) -> AverageMasks:
    """Average masks of the instance kernels after the last stage.

    Args:
        model, samples: see :func:`stage_masks`.
        score_threshold: lowest score of a kernel that has found an object.

    Raises:
        DataError: there are no samples.
    """
    num_kernels, count = model.bank.num_matched, 0
    total, num_objects = np.zeros((num_kernels, SIDE, SIDE)), np.zeros(num_kernels, np.int64)
    for sample in samples:
        last = stage_masks(model, sample, (SIDE, SIDE))[-1]
        total += last.masks[:num_kernels]
        num_objects += last.scores[:num_kernels] >= score_threshold
        count += 1
    if not count:
        raise DataError("There is no image to average over.")
    return AverageMasks(total / count, num_objects, count)


def draw_average_masks(average: AverageMasks) -> np.ndarray:
    """Draw all kernels on one sheet, the largest masks first; the colours of a mask are scaled to its own maximum."""
    sizes = average.masks.mean(axis=(1, 2))
    colors = matplotlib.colormaps["viridis"]
    cells = []
    for kernel in np.argsort(-sizes, kind="stable"):
        mask = average.masks[kernel]
        picture = (colors(mask / max(mask.max(), 1e-12))[..., :3] * 255).astype(np.uint8)
        text = f"kernel {kernel}: {sizes[kernel]:.1%}, {average.num_objects[kernel]} objects"
        cells.append(_with_caption(picture, text))
    title = f"Average mask of each instance kernel in {average.num_images} images, by size (% of the image)"
    return picture_sheet(cells, math.ceil(math.sqrt(len(cells))), title)


def draw_stages(image: np.ndarray, stages: list[KernelMasks], classes: ClassTable, number: int) -> np.ndarray:
    """Draw the kernels with the best final scores: one row per kernel, one column per stage.

    Args:
        image: of the size of the masks.
        number: largest number of kernels.
    """
    best = np.argsort(-stages[-1].scores, kind="stable")[:number]
    cells = []
    for kernel in best:
        for number_of_updates, stage in enumerate(stages):
            name, score = classes.names[stage.labels[kernel]], stage.scores[kernel]
            text = f"kernel {kernel}, {number_of_updates or 'no'} updates: {name} {score:.2f}"
            cells.append(_with_caption(_lit(image, stage.masks[kernel]), text))
    return picture_sheet(cells, len(stages), "Masks and scores before the update and after each stage")


def _lit(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darken the image where the mask's probability is low; the result is SIDE pixels wide."""
    lit = (image * (0.2 + 0.8 * mask[..., None])).astype(np.uint8)
    height = round(SIDE * image.shape[0] / image.shape[1])
    return np.asarray(Image.fromarray(lit).resize((SIDE, height), Image.Resampling.BILINEAR))


def _with_caption(picture: np.ndarray, text: str) -> np.ndarray:
    strip = Image.new("RGB", (picture.shape[1], _CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill="black")
    return np.concatenate([np.asarray(strip), picture])
