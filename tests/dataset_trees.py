"""Tiny data sets in the layout of every format: two images of 64 x 128 pixels with rectangles in front of two regions.

All formats show the same scene: two cars, a person, a group of cars (a crowd), sky, road, and a void column.
"""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import (
    register_all_cityscapes,
    register_all_cityscapes_panoptic,
    register_all_lvis,
)
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from panopticapi.utils import id2rgb
from PIL import Image

SIZE = (64, 128)
CLASSES = ("car", "person", "sky", "road")
NUM_THINGS = 2
NUM_IMAGES = 2
VOID = 255
# (class, x, y, width, height, iscrowd); each has the 100 pixels that Cityscapes asks for
RECTANGLES = ((0, 6, 20, 24, 20, 0), (0, 40, 24, 20, 22, 0), (1, 66, 10, 16, 40, 0), (0, 90, 30, 24, 12, 1))


def rectangles(image):
    """Rectangles of an image as (class, x, y, width, height, iscrowd); the second image is shifted."""
    return [(c, x + 3 * image, y, w, h, crowd) for c, x, y, w, h, crowd in RECTANGLES]


def class_map(image):
    """Index of the class of each pixel, VOID in the last columns: int64 [H, W]."""
    labels = np.full(SIZE, 3)
    labels[: SIZE[0] // 2] = 2
    labels[:, -6:] = VOID
    for c, x, y, w, h, _ in rectangles(image):
        labels[y : y + h, x : x + w] = c
    return labels


def write_images(folder, name="{:06d}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_IMAGES):
        pixels = np.array([[200, 30, 30], [30, 200, 30], [90, 90, 230], [110, 110, 110], [0, 0, 0]], np.uint8)
        Image.fromarray(pixels[class_map(i).clip(max=4)]).save(folder / name.format(i))


def polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def compressed(x, y, width, height):
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = mask_util.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(x, y, width, height):
    counts, column = [SIZE[0] * x + y], [height, SIZE[0] - height]
    for _ in range(width):
        counts += column
    counts[-1] = SIZE[0] * SIZE[1] - sum(counts[:-1])
    return {"size": list(SIZE), "counts": counts}


def instances_json(segmentation=polygon, ids=(1, 2), first_id=1, with_crowds=True):
    """COCO's instances: ids are the category ids of car and person, first_id is the first annotation's id."""
    annotations = []
    for i in range(NUM_IMAGES):
        for c, *box, crowd in rectangles(i):
            if with_crowds or not crowd:
                mask = (compressed if crowd else segmentation)(*box)
                annotation = {"image_id": i, "category_id": ids[c], "iscrowd": crowd, "area": box[2] * box[3]}
                annotations.append({**annotation, "id": first_id + len(annotations), "bbox": box, "segmentation": mask})
    categories = [{"id": i, "name": name} for i, name in zip(ids[:NUM_THINGS], CLASSES)]
    return {"images": _image_list(), "annotations": annotations, "categories": categories}


def _image_list(name="{:06d}.jpg"):
    return [{"id": i, "file_name": name.format(i), "height": SIZE[0], "width": SIZE[1]} for i in range(NUM_IMAGES)]


def segments(image, ids, segment_id):
    """Panoptic segment ids [H, W], and segments_info; segment_id(category id, number of the instance or None)."""
    labels, png, info = class_map(image), np.zeros(SIZE, np.int64), []
    regions = [(c, labels == c, None, 0) for c in range(NUM_THINGS, len(CLASSES))]
    for number, (c, x, y, w, h, crowd) in enumerate(rectangles(image)):
        mask = np.zeros(SIZE, bool)
        mask[y : y + h, x : x + w] = True
        regions.append((c, mask, None if crowd else number, crowd))
    for c, mask, number, crowd in regions:
        i = segment_id(ids[c], number)
        png[mask] = i
        info.append({"id": i, "category_id": ids[c], "iscrowd": crowd, "area": int(mask.sum())})
    return png, info


def write_panoptic(root, ids, leave_out=()):
    """panoptic.json and panoptic/ below root; ids: of the categories; leave_out: keys of the segments."""
    folder, annotations = root / "panoptic", []
    folder.mkdir()
    for i in range(NUM_IMAGES):
        png, info = segments(i, ids, lambda category, number: 1000 * category + (900 if number is None else number))
        Image.fromarray(id2rgb(png)).save(folder / f"{i:06d}.png")
        info = [{k: v for k, v in x.items() if k not in leave_out} for x in info]
        annotations.append({"image_id": i, "file_name": f"{i:06d}.png", "segments_info": info})
    categories = [{"id": i, "name": n, "isthing": int(c < NUM_THINGS)} for c, (i, n) in enumerate(zip(ids, CLASSES))]
    content = {"images": _image_list(), "annotations": annotations, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(content))


def write_labels(folder, values, void=VOID, dtype=np.uint8):
    """Label maps with a value per class."""
    folder.mkdir()
    lookup = np.full(256, void)
    lookup[: len(values)] = values
    for i in range(NUM_IMAGES):
        Image.fromarray(lookup[class_map(i)].astype(dtype)).save(folder / f"{i:06d}.png")


# ---- Cityscapes and LVIS, below DETECTRON2_DATASETS

_CITYSCAPES = {x["name"]: x for x in CITYSCAPES_CATEGORIES}


def write_cityscapes(root, split):
    """leftImg8bit/ and gtFine/ with polygons, instanceIds, labelIds, labelTrainIds and the panoptic PNGs and JSON."""
    city, truth = root / "cityscapes" / "leftImg8bit" / split / "ulm", root / "cityscapes" / "gtFine"
    ids, train_ids = ([_CITYSCAPES[name][key] for name in CLASSES] for key in ("id", "trainId"))
    write_images(city, "ulm_{:06d}_000019_leftImg8bit.png")
    folder, panoptic = truth / split / "ulm", truth / f"cityscapes_panoptic_{split}"
    for path in (folder, panoptic):
        path.mkdir(parents=True)
    annotations = []
    for i in range(NUM_IMAGES):
        name, labels = f"ulm_{i:06d}_000019", class_map(i)
        for kind, values, void in (("labelIds", ids, 0), ("labelTrainIds", train_ids, VOID)):
            lookup = np.full(256, void, np.uint8)
            lookup[: len(values)] = values
            Image.fromarray(lookup[labels]).save(folder / f"{name}_gtFine_{kind}.png")
        png, info = segments(i, ids, lambda category, number: category if number is None else 1000 * category + number)
        Image.fromarray(png.astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
        Image.fromarray(id2rgb(png)).save(panoptic / f"{name}_gtFine_panoptic.png")
        annotations.append({"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": info})
        # The vertices are pixels, which belong to the polygon.
        objects = [
            {"label": CLASSES[c] + "group" * crowd, "polygon": np.reshape(polygon(x, y, w - 1, h - 1), (4, 2)).tolist()}
            for c, x, y, w, h, crowd in rectangles(i)
        ]
        content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": objects}
        (folder / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))
    images = [{**x, "id": y["image_id"]} for x, y in zip(_image_list(), annotations)]
    categories = [{key: x[key] for key in ("id", "name", "color", "isthing")} for x in CITYSCAPES_CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (truth / f"cityscapes_panoptic_{split}.json").write_text(json.dumps(content))


def write_lvis(root, split):
    """lvis/lvis_v1_SPLIT.json with its 1203 categories, and COCO's images."""
    write_images(root / "coco" / f"{split}2017")
    names = get_lvis_instances_meta("lvis_v1")["thing_classes"]
    content = instances_json(ids=[7, 1203], with_crowds=False)
    content["categories"] = [{"id": i, "name": name, "frequency": "rcf"[i % 3]} for i, name in enumerate(names, 1)]
    for image in content["images"]:
        image.update(
            coco_url=f"http://images.cocodataset.org/{split}2017/{image['file_name']}",
            neg_category_ids=[300],
            not_exhaustive_category_ids=[],
        )
    (root / "lvis").mkdir(exist_ok=True)
    (root / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(content))


@contextlib.contextmanager
def registered_below(root: Path):
    """Register Cityscapes and LVIS below another folder than DETECTRON2_DATASETS."""

    def register(folder):
        for name in [x for x in DatasetCatalog if x.startswith(("cityscapes_", "lvis_"))]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        for function in (register_all_cityscapes, register_all_cityscapes_panoptic, register_all_lvis):
            function(folder)

    register(str(root))
    try:
        yield
    finally:
        register(os.getenv("DETECTRON2_DATASETS", "datasets"))
