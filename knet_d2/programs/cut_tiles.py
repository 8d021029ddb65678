"""Cut large images and their objects into overlapping tiles, once, for training.

    python tools/cut_tiles.py coco.json photos tiles --tile-size 1024 --overlap 256

It writes tiles/images and tiles/instances.json, a COCO JSON of the tiles. Annotations of other label tools must be a
COCO JSON first: see tools/convert_dataset.py.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from ..data.coco_json import read_coco_json
from ..data.files import ARRAY_TYPE, read_stored
from ..data.pixels import PixelFormat
from ..data.segmentation import SegmentationError, decode_counts, read_segmentation
from ..errors import ConfigError, DataError
from ..inference.tiles import Span, clip, tiles_of
from ..results.segment import Segment


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", help="COCO instances JSON")
    parser.add_argument("images", help="folder of its images")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--tile-size", type=int, required=True, metavar="PIXELS", help="side of a tile")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of neighbours; default: a quarter of a tile")
    parser.add_argument(
        "--min-part",
        type=float,
        default=0.5,
        metavar="X",
        help="what a tile holds of an object counts as an object from this part of its area on (default 0.5); the rest "
        "becomes a crowd, which training leaves out",
    )
    parser.add_argument("--format", default="RGB", help="INPUT.FORMAT of the images (default RGB)")
    return parser


class Object:
    """An annotation whose mask is cut.

    Attributes:
        segment: its mask in the image.
        category_id, iscrowd: as in the JSON.
    """

    def __init__(self, annotation: dict[str, Any], size: tuple[int, int]):
        self.segment = segment_of(annotation["segmentation"], size)
        self.category_id, self.iscrowd = annotation["category_id"], annotation.get("iscrowd", 0)

    def in_tile(self, y: Span, x: Span, min_part: float) -> dict[str, Any] | None:
        """The annotation of the part in a tile; None if there is none."""
        part = self.segment and clip(self.segment, (y.start, y.stop), (x.start, x.stop))
        if part is None:
            return None
        corner = part.corner[0] - y.start, part.corner[1] - x.start
        part = part._replace(corner=corner, size=(y.stop - y.start, x.stop - x.start))
        is_small = part.area < min_part * self.segment.area
        mask = {"bbox": list(part.box), "area": part.area, "segmentation": part.rle()}
        return {"category_id": self.category_id, "iscrowd": int(self.iscrowd or is_small), **mask}


def segment_of(segmentation: Any, size: tuple[int, int]) -> Segment | None:
    """The mask of an annotation in an image of a size (height, width); None if it is empty.

    Only the columns of its box are unpacked, since the image may be large.

    Raises:
        SegmentationError: it is wrong.
    """
    height, rle = size[0], read_segmentation(segmentation, *size)
    left, _, columns, _ = (int(x) for x in mask_util.toBbox(rle))
    start, stop = left * height, (left + columns) * height
    borders = np.clip(np.cumsum(decode_counts(rle["counts"])), start, stop) - start
    runs = np.diff(borders, prepend=0)
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(columns, height).T
    return Segment.from_mask(mask, 0, corner=(0, left), size=size)


def save_image(pixels: np.ndarray, path: str) -> str:
    """Write a tile without loss, with an ending that fits its values; returns the file's name."""
    path += ".png" if pixels.dtype == np.uint8 and pixels.shape[2:] in ((), (3,)) else ARRAY_TYPE
    if path.endswith(ARRAY_TYPE):
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return os.path.basename(path)


def cut_image(
    number: int, image: dict[str, Any], annotations: list[dict[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Write the tiles of an image; yields the entry of each, and its annotations, without ids.

    Their names begin with the image's number, as several images may have one name in different folders.

    Raises:
        DataError: the image or an annotation can't be read.
    """
    path = os.path.join(args.images, image["file_name"])
    pixels = read_stored(path, PixelFormat(args.format))
    size = pixels.shape[:2]
    try:
        objects = [Object(x, size) for x in annotations]
    except SegmentationError as error:
        raise DataError(f"{args.json}: an annotation of {image['file_name']}: {error}. Correct it.") from error
    stem = f"{number}_{os.path.splitext(os.path.basename(image['file_name']))[0]}"
    for y, x in tiles_of(size, args.tile_size, args.overlap):
        name = f"{stem}_{y.start}_{x.start}"
        file_name = save_image(pixels[y.start : y.stop, x.start : x.stop], os.path.join(args.output, "images", name))
        place = {"file_name": file_name, "height": y.stop - y.start, "width": x.stop - x.start}
        parts = (one.in_tile(y, x, args.min_part) for one in objects)
        yield {**place, "cut_from": image["file_name"], "top": y.start, "left": x.start}, [p for p in parts if p]


def main(args: argparse.Namespace) -> None:
    args.overlap = args.tile_size // 4 if args.overlap is None else args.overlap
    if not 0 <= args.overlap < args.tile_size:
        raise ConfigError(f"--overlap {args.overlap}: use 0 to {args.tile_size - 1} pixels (--tile-size).")
    if os.path.exists(os.path.join(args.output, "instances.json")):
        raise ConfigError(f"{args.output}: there are tiles in it. Name another folder, or delete it.")
    if os.path.realpath(os.path.join(args.output, "images")) == os.path.realpath(args.images):
        raise ConfigError(f"{args.output}: its images are those to cut. Name another folder.")
    content = read_coco_json(args.json, args.images)
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    os.makedirs(os.path.join(args.output, "images"), exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(tqdm(content["images"], unit="image"), 1):
        for tile, parts in cut_image(number, image, of_image[image["id"]], args):
            images.append({"id": len(images) + 1, **tile})
            annotations += [{"id": i, "image_id": len(images), **x} for i, x in enumerate(parts, len(annotations) + 1)]
    with open(os.path.join(args.output, "instances.json"), "w", encoding="utf-8") as f:
        json.dump({"images": images, "annotations": annotations, "categories": content["categories"]}, f)
    most = max(Counter(x["image_id"] for x in annotations if not x["iscrowd"]).values(), default=0)
    crowds = sum(x["iscrowd"] for x in annotations)
    print(f"Wrote {len(images)} tiles with {len(annotations) - crowds} objects and {crowds} small parts at borders.")
    print(f"A tile has up to {most} objects: MODEL.KNET.NUM_KERNELS must be larger.")
