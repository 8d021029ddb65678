"""Makes inputs for all models: generated scenes of any size, with ground truth in the format of each model."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances

from ...data.shapes.drawing import draw_scene

# Scenes are drawn at this size and resized, because drawing at the size of photos takes seconds.
_DRAWN_SIZE = 256
_MIN_THINGS = 5
# Larger batches repeat these scenes.
_NUM_SCENES = 8
IGNORE = 255


class LabelledImage(NamedTuple):
    """An image with G things.

    Attributes:
        image: uint8 [3, H, W].
        masks: masks of the things, bool [G, H, W].
        classes: classes of the things, int64 [G].
        stuff: stuff class of each pixel, int64 [H, W]; -1 for pixels without stuff.
    """

    image: torch.Tensor
    masks: torch.Tensor
    classes: torch.Tensor
    stuff: torch.Tensor


@functools.lru_cache(maxsize=_NUM_SCENES)
def draw_image(size: tuple[int, int], seed: int) -> LabelledImage:
    """Draw a scene with at least five things, and resize it to (height, width)."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, _DRAWN_SIZE)
    while len(scene.things) < _MIN_THINGS:
        scene = draw_scene(rng, _DRAWN_SIZE)
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size, mode="bilinear", align_corners=False)[0].round().to(torch.uint8)
    masks = torch.from_numpy(np.stack([thing.mask for thing in scene.things]))
    labels = torch.cat([masks, torch.from_numpy(scene.stuff)[None]]).float()
    labels = F.interpolate(labels[None], size, mode="nearest")[0].long()
    classes = torch.tensor([thing.category for thing in scene.things])
    return LabelledImage(image, labels[:-1].bool(), classes, labels[-1])


def make_batch(
    size: tuple[int, int], batch: int, output_size: tuple[int, int], *, first_stuff_label: int, merge_things: bool
) -> list[dict[str, Any]]:
    """Make a batch of inputs of a Detectron2 model, with ground truth.

    Args:
        size: (height, width) of the network's input.
        batch: number of images.
        output_size: (height, width) of the results.
        first_stuff_label: label of the first stuff class in "sem_seg"; the other stuff classes follow.
        merge_things: in "sem_seg", give all things the label 0, as for Panoptic FPN, instead of their class.
    """
    inputs = []
    for i in range(batch):
        x = draw_image(size, i % _NUM_SCENES)
        labels = torch.where(x.stuff < 0, IGNORE, x.stuff + first_stuff_label)
        for mask, label in zip(x.masks, x.classes.tolist()):
            labels[mask] = 0 if merge_things else label
        masks = BitMasks(x.masks)
        instances = Instances(size, gt_classes=x.classes, gt_masks=masks, gt_boxes=masks.get_bounding_boxes())
        example = {"image": x.image, "instances": instances, "sem_seg": labels, "file_name": f"scene {i}"}
        inputs.append({**example, "height": output_size[0], "width": output_size[1]})
    return inputs
