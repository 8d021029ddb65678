"""Masks in every form that a COCO JSON may have, and images of every kind, as Detectron2 treats them."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data_helpers import data_cfg, unique_name
from PIL import Image

from knet_d2.data import build_mapper, load_dataset
from knet_d2.data.files import read_image

SIZE = (40, 60)
BOX = (slice(8, 24), slice(10, 30))
TURNED = 0x0112  # EXIF's tag of the orientation


def box_mask():
    mask = np.zeros(SIZE, np.uint8)
    mask[BOX] = 1
    return mask


def uncompressed(mask):
    """Run lengths down the columns, the first of zeros."""
    flat = mask.flatten(order="F").tolist()
    counts, last = [0], 0
    for value in flat:
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


SEGMENTATIONS = {
    "polygon": [[10, 8, 30, 8, 30, 24, 10, 24]],
    "two polygons": [[10, 8, 20, 8, 20, 24, 10, 24], [20, 8, 30, 8, 30, 24, 20, 24]],
    "compressed RLE": compressed(box_mask()),
    "uncompressed RLE": uncompressed(box_mask()),
}


def write_data(folder, image, segmentation, size=SIZE):
    """A data set of one image, already saved, with one instance; returns its mapped training example."""
    image = {"id": 7, "file_name": image, "height": size[0], "width": size[1]}
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "segmentation": segmentation, "iscrowd": 0}
    annotation.update(bbox=[10, 8, 20, 16], area=320)
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 3, "name": "box"}]}
    (folder / "data.json").write_text(json.dumps(content))
    entry = {"name": unique_name("formats"), "type": "coco_instance", "json": str(folder / "data.json")}
    cfg = data_cfg("instance", custom=({**entry, "images": str(folder)},))
    cfg.INPUT.MIN_SIZE_TRAIN = (min(size),)
    return build_mapper(cfg, is_train=True)(load_dataset(entry["name"])[0])


@pytest.mark.parametrize("form", SEGMENTATIONS)
def test_the_same_mask_in_every_form(tmp_path, form):
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "image.png")
    instances = write_data(tmp_path, "image.png", SEGMENTATIONS[form])["instances"]
    assert torch.equal(instances.gt_masks.tensor, torch.from_numpy(box_mask()[None]).bool())
    assert instances.gt_classes.tolist() == [0]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "I;16"])
def test_images_of_every_mode_have_three_channels(tmp_path, mode):
    """Grey is repeated, alpha dropped, a palette looked up."""
    gray = np.random.RandomState(0).randint(0, 256, SIZE).astype(np.uint8)
    image = Image.fromarray(gray)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(255 - gray))
    elif mode == "P":
        image.putpalette(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1).tobytes())
    elif mode == "1":
        gray = np.where(gray < 128, 0, 255).astype(np.uint8)
        image = Image.fromarray(gray).convert("1")
    elif mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").mode == mode
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    for image_format in ("RGB", "BGR"):
        pixels = read_image(str(tmp_path / "image.png"), image_format)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_turned_as_their_exif_tag_says(tmp_path, orientation):
    """The annotations refer to the rotated image; the EXIF tag of the stored image describes the rotation."""
    seen = np.zeros((*SIZE, 3), np.uint8)
    seen[BOX] = 200
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarter turns that bring what is seen to what is stored
    image = Image.fromarray(np.rot90(seen, turns).copy())
    exif = image.getexif()
    exif[TURNED] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    assert Image.open(tmp_path / "image.png").getexif()[TURNED] == orientation
    example = write_data(tmp_path, "image.png", SEGMENTATIONS["polygon"])
    mask = example["instances"].gt_masks.tensor[0]
    assert torch.equal(example["image"][0] == 200, mask) and mask.sum() == 16 * 20
