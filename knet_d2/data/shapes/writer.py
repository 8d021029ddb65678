"""Writes the data set shapes: COCO instances JSON, COCO panoptic JSON and PNGs, semantic PNGs.

The files are::

    images/000000.jpg ...    panoptic/000000.png ...    semantic/000000.png ...
    instances.json           panoptic.json
"""

import os

import numpy as np
import pycocotools.mask as mask_util
from panopticapi.utils import id2rgb
from PIL import Image
from tqdm import tqdm

from ..files import IGNORE_LABEL, write_json
from ..segmentation import encode_mask, row_runs
from .drawing import STUFF_CLASSES, THING_CLASSES, Scene, Thing, draw_scene

_COLORS = (
    (214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 187, 20),
    (140, 109, 90), (170, 170, 190), (110, 140, 130),
)  # fmt: skip
_FIRST_STUFF_ID = 11


def shapes_categories() -> list[dict]:
    """Return the categories of the panoptic JSON, things first. Their ids have a gap, like the ids of COCO."""
    things = [{"id": i + 1, "name": name, "isthing": 1} for i, name in enumerate(THING_CLASSES)]
    stuff = [{"id": i + _FIRST_STUFF_ID, "name": name, "isthing": 0} for i, name in enumerate(STUFF_CLASSES)]
    return [
        {**category, "supercategory": "thing" if category["isthing"] else "stuff", "color": list(color)}
        for category, color in zip(things + stuff, _COLORS, strict=True)
    ]


def write_shapes(root: str, num_images: int, seed: int, size: int = 128) -> None:
    """Write a shapes data set into the folder root, which is created if it is missing.

    Args:
        root: folder for images and annotations.
        num_images: number of images; image i depends only on (seed, i, size).
        seed: a number >= 0.
        size: height and width of the images in pixels.
    """
    for folder in ("images", "panoptic", "semantic"):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    images, instances, panoptic = [], [], []
    for index in tqdm(
        range(num_images), desc=f"Generating shapes in {root}", unit="image", mininterval=1, disable=None
    ):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, size)
        image_id, stem = index + 1, f"{index:06d}"
        Image.fromarray(scene.image).save(os.path.join(root, "images", stem + ".jpg"), quality=95)
        images.append({"id": image_id, "file_name": stem + ".jpg", "height": size, "width": size})
        instances += [
            {"id": len(instances) + i + 1, "image_id": image_id, **_annotation(thing)}
            for i, thing in enumerate(scene.things)
        ]
        ids, segments_info = _panoptic_map(rng, scene)
        Image.fromarray(id2rgb(ids)).save(os.path.join(root, "panoptic", stem + ".png"))
        panoptic.append({"image_id": image_id, "file_name": stem + ".png", "segments_info": segments_info})
        Image.fromarray(_semantic_map(scene)).save(os.path.join(root, "semantic", stem + ".png"))
    categories = shapes_categories()
    thing_categories = [category for category in categories if category["isthing"]]
    common = {"info": {"description": "K-Net shapes", "seed": seed, "size": size}, "images": images}
    files = {"instances": (instances, thing_categories), "panoptic": (panoptic, categories)}
    for name, (annotations, of_file) in files.items():
        content = {**common, "annotations": annotations, "categories": of_file}
        write_json(os.path.join(root, f"{name}.json"), content)


def _annotation(thing: Thing) -> dict:
    """Make a COCO annotation: a polygon if it is exact, uncompressed RLE for crowds, else compressed RLE."""
    rle = encode_mask(thing.mask)
    box, area = mask_util.toBbox(rle).tolist(), int(mask_util.area(rle))
    segmentation: dict | list
    if thing.iscrowd:
        segmentation = {"size": list(thing.mask.shape), "counts": row_runs(thing.mask.T)}
    elif thing.polygon is not None:
        segmentation = [thing.polygon]
    else:
        segmentation = rle
    return {
        "category_id": thing.category + 1,
        "segmentation": segmentation,
        "bbox": box,
        "area": area,
        "iscrowd": int(thing.iscrowd),
        "occlusion": round(thing.occlusion, 4),
    }


def _panoptic_map(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, list[dict]]:
    """Return the map of segment ids [H, W] (0 = void) and its segments; each stuff class is one segment, as in COCO."""
    segments = [(thing.category + 1, thing.mask, thing.iscrowd) for thing in scene.things]
    for category in np.unique(scene.stuff[scene.stuff >= 0]):
        segments.append((int(category) + _FIRST_STUFF_ID, scene.stuff == category, False))
    # COCO stores segment ids as RGB colours, so the ids use all 24 bits.
    segment_ids = 1 + rng.choice(256**3 - 1, len(segments), replace=False)
    ids = np.zeros(scene.stuff.shape, np.int64)
    segments_info = []
    for segment_id, (category_id, mask, iscrowd) in zip(segment_ids.tolist(), segments, strict=True):
        ids[mask] = segment_id
        rle = encode_mask(mask)
        segments_info.append(
            {
                "id": segment_id,
                "category_id": category_id,
                "area": int(mask_util.area(rle)),
                "bbox": mask_util.toBbox(rle).tolist(),
                "iscrowd": int(iscrowd),
            }
        )
    return ids, segments_info


def _semantic_map(scene: Scene) -> np.ndarray:
    """Return a label map [H, W]: thing classes come first, then stuff classes; 255 for unlabelled pixels."""
    labels = np.where(scene.stuff >= 0, scene.stuff + len(THING_CLASSES), IGNORE_LABEL).astype(np.uint8)
    for thing in scene.things:
        labels[thing.mask] = thing.category
    return labels
