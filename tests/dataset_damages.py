"""Ways in which data sets are damaged in practice, written down from the formats: COCO instances JSON, COCO panoptic
JSON + PNG, and folders of label maps.

Each makes one damage in a copy of what write_shapes wrote, and says what a check has to call it and where.
"""

import json
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

ERROR, WARNING = "error", "warning"
IMAGE = "images/000000.jpg"
SIZE = 48


class Damage(NamedTuple):
    """What is done to which file, and what is to be found.

    Attributes:
        data: type of the data set, as in DATASETS.CUSTOM.
        file: the file that is damaged, and that the fault names unless ``named`` is given.
        make: takes the content of a JSON, the array of a PNG, or the path of another file; returns the new array, or
            for a JSON the place in it that the fault has to name.
        level: "error" where training or evaluation would fail or be wrong.
        also: what follows from the damage and may be told, too.
    """

    data: str
    file: str
    make: Callable
    level: str
    named: str = ""
    also: tuple[str, ...] = ()


def make_damage(root: str, damage: Damage) -> str:
    """Damage the copy in root; returns the place in the file that the fault has to name, "" where it is all of it."""
    path = os.path.join(root, damage.file)
    if damage.make in _ON_PATHS:
        return damage.make(path) or ""
    if damage.file.endswith(".json"):
        with open(path) as f:
            content = json.load(f)
        place = damage.make(content) or ""
        with open(path, "w") as f:
            json.dump(content, f)
        return place
    array = damage.make(np.array(Image.open(path)))
    Image.fromarray(array).save(path)
    return ""


# ---- files ----


def cut_off(path: str) -> None:
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)


def write_a_web_page(path: str) -> None:
    with open(path, "w") as f:
        f.write("<html>404 Not Found</html>")


def turn_by_exif(path: str) -> None:
    """Set the EXIF tag of an image that a camera has taken upside down; the pixels do not change."""
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(path, exif=exif)


def store_12_bits(path: str) -> None:
    """12 bits in a file of 16, as microscopes and depth cameras store them."""
    gray = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
    Image.fromarray(gray * 16 + 7).save(path, format="PNG")


def copy_image(path: str) -> None:
    """Copy the picture to a file with another name."""
    folder = os.path.dirname(path)
    shutil.copyfile(path, os.path.join(folder, "000001.jpg"))


def rename_in_capitals(path: str) -> None:
    os.rename(path, path.replace(".jpg", ".JPG"))


def save_as_jpeg(path: str) -> None:
    image = Image.open(path).resize((SIZE // 2, SIZE // 2)).resize((SIZE, SIZE))
    image.save(path, format="JPEG", quality=60)


def rename_to_jpeg(path: str) -> None:
    os.rename(path, path.replace(".png", ".jpg"))


_ON_PATHS = (
    os.remove, shutil.rmtree, cut_off, write_a_web_page, turn_by_exif, store_12_bits, copy_image, rename_in_capitals,
    save_as_jpeg, rename_to_jpeg,
)  # fmt: skip


# ---- COCO instances JSON ----


def _instance(content: dict, form: str) -> dict:
    """The first annotation with a "polygon", a compressed "rle" or an uncompressed one ("counts")."""
    forms = {
        "polygon": lambda s: isinstance(s, list),
        "rle": lambda s: isinstance(s, dict) and isinstance(s["counts"], str),
        "counts": lambda s: isinstance(s, dict) and isinstance(s["counts"], list),
    }
    return next(x for x in content["annotations"] if forms[form](x["segmentation"]))


def _change(form: str, change: Callable[[dict], None]) -> Callable[[dict], str]:
    def make(content: dict) -> str:
        annotation = _instance(content, form)
        change(annotation)
        return f"annotation {annotation['id']}"

    return make


def _set(form: str, **values) -> Callable[[dict], str]:
    return _change(form, lambda annotation: annotation.update(values))


def _polygon(change: Callable[[list], list]) -> Callable[[dict], str]:
    """change: the list of numbers of one polygon -> "segmentation"."""
    return _change("polygon", lambda x: x.update(segmentation=change(x["segmentation"][0])))


def _rle(**values) -> Callable[[dict], str]:
    return _change("rle", lambda x: x["segmentation"].update(values))


def _empty_mask(annotation: dict) -> None:
    counts = mask_util.encode(np.zeros((SIZE, SIZE), np.uint8, order="F"))["counts"]
    annotation["segmentation"]["counts"] = counts.decode()


def _cut_string(annotation: dict) -> None:
    counts = annotation["segmentation"]["counts"]
    annotation["segmentation"]["counts"] = counts[: len(counts) // 2]


def _moved_box(annotation: dict) -> None:
    x, y, width, height = annotation["bbox"]
    annotation["bbox"] = [x + width, y + height, width, height]


def _polygon_over_the_edge(content: dict) -> str:
    """A tenth of the object's width and at least 10 pixels are outside."""
    annotation = _instance(content, "polygon")
    x, y, width, height = annotation["bbox"]
    right = SIZE + 10
    annotation["segmentation"] = [[0, y, right, y, right, y + height, 0, y + height]]
    annotation.update(bbox=[0, y, SIZE, height], area=SIZE * height)
    return f"annotation {annotation['id']}"


def _same_annotation_id(content: dict) -> str:
    content["annotations"][1]["id"] = content["annotations"][0]["id"]
    return f"annotation {content['annotations'][0]['id']}"


def _same_image_id(content: dict) -> str:
    content["images"][1]["id"] = content["images"][0]["id"]
    return f"image {content['images'][0]['id']}"


def _same_category_id(content: dict) -> str:
    content["categories"][1]["id"] = content["categories"][0]["id"]
    return f"category {content['categories'][0]['id']}"


def _same_name(content: dict) -> str:
    content["categories"][1]["name"] = content["categories"][0]["name"]
    return f"category {content['categories'][1]['id']}"


def _unused_category(content: dict) -> str:
    content["categories"].append({"id": 500, "name": "unicorn", "isthing": 1})
    return "category 500"


def _instance_twice(content: dict) -> str:
    again = {**_instance(content, "polygon"), "id": 5000}
    content["annotations"].append(again)
    return "annotation 5000"


def _image_twice(content: dict) -> str:
    content["images"].append({**content["images"][0], "id": 5000, "width": 50})
    return "image 5000"


def _drop_annotations(content: dict) -> str:
    content["annotations"] = []
    return ""


def _all_crowds(content: dict) -> str:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    return ""


def _set_image(**values) -> Callable[[dict], str]:
    def make(content: dict) -> str:
        image = content["images"][0]
        image.update(values)
        return f"image {image['id']}"

    return make


# ---- COCO panoptic JSON ----


def _segments(content: dict) -> list[dict]:
    return content["annotations"][0]["segments_info"]


def _change_segment(**values) -> Callable[[dict], str]:
    def make(content: dict) -> str:
        segment = _segments(content)[0]
        segment.update(values)
        return f"segment {segment['id']}"

    return make


def _drop_segment(content: dict) -> str:
    return f"segment {_segments(content).pop()['id']}"


def _new_segment(content: dict) -> str:
    _segments(content).append({"id": 77, "category_id": 11, "iscrowd": 0, "area": 9, "bbox": [0, 0, 3, 3]})
    return "segment 77"


def _segment_twice(content: dict) -> str:
    segment = _segments(content)[0]
    _segments(content).append(dict(segment))
    return f"segment {segment['id']}"


def _void_segment(content: dict) -> str:
    _segments(content).append({"id": 0, "category_id": 11, "iscrowd": 0, "area": 9, "bbox": [0, 0, 3, 3]})
    return "segment 0"


def _stuff_in_two_pieces(content: dict) -> str:
    """Things painted with the id of a stuff class; COCO has one segment of a stuff class in an image."""
    stuff = next(x for x in _segments(content) if x["category_id"] >= 11)
    thing = next(x for x in _segments(content) if x["category_id"] < 11)
    thing.update(category_id=stuff["category_id"], iscrowd=0)
    return f"image {content['annotations'][0]['image_id']}"


def _no_isthing(content: dict) -> str:
    content["categories"][0].pop("isthing")
    return f"category {content['categories'][0]['id']}"


def _all_things(content: dict) -> str:
    for category in content["categories"]:
        category["isthing"] = 1
    return ""


def _annotation_of_another_image(content: dict) -> str:
    content["annotations"][0]["image_id"] = 999
    return "image 999"


def _image_without_annotation(content: dict) -> str:
    return f"image {content['annotations'].pop(0)['image_id']}"


# ---- label maps ----


def _value_of_no_class(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == labels[0, 0], 9, labels).astype(np.uint8)


def _nothing_labelled(labels: np.ndarray) -> np.ndarray:
    return np.full_like(labels, 255)


_INSTANCES, _PANOPTIC, _LABELS = "coco_instance", "coco_panoptic", "sem_seg"
_JSON, _PAN_JSON = "instances.json", "panoptic.json"
_PNG, _LABEL = "panoptic/000000.png", "semantic/000000.png"

# What a check calls the damage, and after a colon how it came about -> the damage.
DAMAGES = {
    # the images of any data set
    "missing image": Damage(_INSTANCES, IMAGE, os.remove, ERROR),
    "missing image: name in capitals": Damage(_INSTANCES, IMAGE, rename_in_capitals, ERROR),
    "unreadable image: cut off": Damage(_LABELS, IMAGE, cut_off, ERROR),
    "unreadable image: a web page": Damage(_PANOPTIC, IMAGE, write_a_web_page, ERROR),
    "image size": Damage(_INSTANCES, _JSON, _set_image(width=50), ERROR, IMAGE, also=("bad RLE",)),
    "image rotated by EXIF": Damage(_INSTANCES, IMAGE, turn_by_exif, WARNING),
    "dark image": Damage(_LABELS, IMAGE, store_12_bits, WARNING),
    "same picture": Damage(_PANOPTIC, IMAGE, copy_image, WARNING, "images/000001.jpg"),
    # COCO instances
    "missing file": Damage(_INSTANCES, _JSON, os.remove, ERROR),
    "broken JSON": Damage(_INSTANCES, _JSON, cut_off, ERROR),
    "missing key: categories": Damage(_INSTANCES, _JSON, lambda c: c.pop("categories") and "", ERROR),
    "no annotations": Damage(_INSTANCES, _JSON, _drop_annotations, ERROR),
    "image id twice": Damage(_INSTANCES, _JSON, _same_image_id, ERROR, also=("unknown image",)),
    "image file twice": Damage(_INSTANCES, _JSON, _image_twice, ERROR, also=("image size",)),
    "annotation id twice": Damage(_INSTANCES, _JSON, _same_annotation_id, ERROR),
    "annotation id 0": Damage(_INSTANCES, _JSON, lambda c: c["annotations"][0].update(id=0) or "annotation 0", WARNING),
    "category id twice": Damage(_INSTANCES, _JSON, _same_category_id, ERROR, also=("unknown category",)),
    "category name twice": Damage(_INSTANCES, _JSON, _same_name, WARNING),
    "unused class": Damage(_INSTANCES, _JSON, _unused_category, WARNING),
    "unknown image": Damage(_INSTANCES, _JSON, _set("polygon", image_id=999), ERROR),
    "unknown category": Damage(_INSTANCES, _JSON, _set("rle", category_id=999), ERROR),
    "ignored annotation": Damage(_INSTANCES, _JSON, _set("polygon", ignore=1), ERROR),
    "missing segmentation": Damage(_INSTANCES, _JSON, _set("polygon", segmentation=[]), ERROR),
    "bad polygon: odd": Damage(_INSTANCES, _JSON, _polygon(lambda p: [p[:-1]]), ERROR),
    "bad polygon: two points": Damage(_INSTANCES, _JSON, _polygon(lambda p: [p[:4]]), ERROR),
    "bad polygon: not nested": Damage(_INSTANCES, _JSON, _polygon(lambda p: p), ERROR),
    "bad polygon: not a number": Damage(_INSTANCES, _JSON, _polygon(lambda p: [[float("nan"), *p[1:]]]), ERROR),
    "polygon outside": Damage(_INSTANCES, _JSON, _polygon(lambda p: [[x + 100 for x in p]]), ERROR),
    "polygon over the edge": Damage(_INSTANCES, _JSON, _polygon_over_the_edge, WARNING),
    "relative coordinates": Damage(_INSTANCES, _JSON, _polygon(lambda p: [[x / SIZE for x in p]]), ERROR),
    "bad RLE: size": Damage(_INSTANCES, _JSON, _rle(size=[SIZE, SIZE // 2]), ERROR),
    "bad RLE: counts": Damage(
        _INSTANCES, _JSON, _change("counts", lambda x: x["segmentation"]["counts"].append(40)), ERROR
    ),
    "bad RLE: more pixels than any image": Damage(_INSTANCES, _JSON, _rle(size=[2**16, 2**16], counts=[2**32]), ERROR),
    "bad RLE: a number of a million digits": Damage(_INSTANCES, _JSON, _rle(counts="o" * 10**6 + "0"), ERROR),
    "bad RLE: string cut off": Damage(_INSTANCES, _JSON, _change("rle", _cut_string), ERROR),
    "empty mask": Damage(_INSTANCES, _JSON, _change("rle", _empty_mask), WARNING),
    "wrong bbox": Damage(_INSTANCES, _JSON, _change("polygon", _moved_box), ERROR),
    "wrong area": Damage(_INSTANCES, _JSON, _set("polygon", area=0), ERROR),
    "mostly crowds": Damage(_INSTANCES, _JSON, _all_crowds, ERROR, also=("unused class",)),
    "annotation twice": Damage(_INSTANCES, _JSON, _instance_twice, WARNING),
    # COCO panoptic
    "missing file: panoptic PNG": Damage(_PANOPTIC, _PNG, os.remove, ERROR),
    "unreadable PNG": Damage(_PANOPTIC, _PNG, cut_off, ERROR),
    "PNG size": Damage(_PANOPTIC, _PNG, lambda a: a[:40], ERROR, also=("wrong area",)),
    "PNG without colours": Damage(_PANOPTIC, _PNG, lambda a: a[..., 0], ERROR),
    "PNG with red and blue swapped": Damage(_PANOPTIC, _PNG, lambda a: a[..., ::-1].copy(), ERROR),
    "unknown segment": Damage(_PANOPTIC, _PAN_JSON, _drop_segment, ERROR, _PNG),
    "unreadable PNG: lossy file": Damage(_PANOPTIC, _PNG, save_as_jpeg, ERROR),
    "unpainted segment": Damage(_PANOPTIC, _PAN_JSON, _new_segment, ERROR, _PNG),
    "segment id twice": Damage(_PANOPTIC, _PAN_JSON, _segment_twice, ERROR),
    "segment id 0": Damage(_PANOPTIC, _PAN_JSON, _void_segment, ERROR),
    "unknown category: of a segment": Damage(_PANOPTIC, _PAN_JSON, _change_segment(category_id=999), ERROR),
    "wrong area: of a segment": Damage(_PANOPTIC, _PAN_JSON, _change_segment(area=1), ERROR),
    "stuff in pieces": Damage(_PANOPTIC, _PAN_JSON, _stuff_in_two_pieces, WARNING),
    "missing key: isthing": Damage(_PANOPTIC, _PAN_JSON, _no_isthing, ERROR),
    "no stuff": Damage(_PANOPTIC, _PAN_JSON, _all_things, ERROR),
    "unknown image: of a PNG": Damage(
        _PANOPTIC, _PAN_JSON, _annotation_of_another_image, ERROR, also=("image without annotation",)
    ),
    "image without annotation": Damage(_PANOPTIC, _PAN_JSON, _image_without_annotation, WARNING),
    # label maps
    "missing label map": Damage(_LABELS, _LABEL, os.remove, ERROR, IMAGE),
    "missing label map: as JPEG": Damage(_LABELS, _LABEL, rename_to_jpeg, ERROR, IMAGE),
    "missing folder": Damage(_LABELS, "semantic", shutil.rmtree, ERROR),
    "label map without image": Damage(_LABELS, IMAGE, os.remove, WARNING, _LABEL),
    "unreadable label map": Damage(_LABELS, _LABEL, cut_off, ERROR),
    "label map size": Damage(_LABELS, _LABEL, lambda a: a[:, :40], ERROR),
    "label map in colour": Damage(_LABELS, _LABEL, lambda a: np.stack([a] * 3, -1), ERROR),
    "value of no class": Damage(_LABELS, _LABEL, _value_of_no_class, ERROR),
    "nothing labelled": Damage(_LABELS, _LABEL, _nothing_labelled, WARNING),
}
