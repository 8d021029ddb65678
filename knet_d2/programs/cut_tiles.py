"""Cut large images and their annotations into overlapping tiles, once, for training.

    %(prog)s coco.json photos tiles --tile-size 1024 --overlap 256
    %(prog)s panoptic.json photos tiles --panoptic pngs --tile-size 1024
    %(prog)s label_maps photos tiles --tile-size 1024

It writes tiles/images, and tiles/instances.json, tiles/panoptic.json with tiles/panoptic, or tiles/labels. Annotations
of other label tools must be a COCO JSON first: see knet convert_dataset.
"""

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from ..data.coco_json import check_keys, read_coco_json
from ..data.coco_records import panoptic_records
from ..data.custom import load_label_folder
from ..data.files import ARRAY_TYPE, open_labels, read_stored, write_json
from ..data.mapper import read_panoptic_segments
from ..data.pixels import PixelFormat
from ..data.segmentation import SegmentationError, decode_counts, read_segmentation
from ..errors import ConfigError, DataError
from ..inference.tiles import Span, clip, tiles_of
from ..results.segment import Segment


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", help="COCO instances JSON, COCO panoptic JSON, or a folder of label maps")
    parser.add_argument("images", help="folder of the images")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--panoptic", metavar="FOLDER", help="PNGs of a panoptic JSON")
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


class Tile(NamedTuple):
    """A tile that is written.

    Attributes:
        name: of its files, without ending.
        y, x: its rows and columns in the image.
        entry: what a COCO JSON says of it, without id.
    """

    name: str
    y: Span
    x: Span
    entry: dict[str, Any]

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.y.start, self.y.stop), slice(self.x.start, self.x.stop)


def cut_image(file_name: str, number: int, args: argparse.Namespace) -> tuple[tuple[int, int], list[Tile]]:
    """Write the tiles of an image; returns its (height, width) and the tiles.

    Args:
        file_name: below the folder of the images.
        number: what tells it from images of the same name in other folders.

    Raises:
        DataError: it can't be read.
    """
    pixels = read_stored(os.path.join(args.images, file_name), PixelFormat(args.format))
    tiles = []
    for y, x in tiles_of(pixels.shape[:2], args.tile_size, args.overlap):
        name = f"{number}_{os.path.splitext(os.path.basename(file_name))[0]}_{y.start}_{x.start}"
        written = save_image(pixels[y.start : y.stop, x.start : x.stop], os.path.join(args.output, "images", name))
        place = {"file_name": written, "height": y.stop - y.start, "width": x.stop - x.start}
        tiles.append(Tile(name, y, x, {**place, "cut_from": file_name, "top": y.start, "left": x.start}))
    return (pixels.shape[0], pixels.shape[1]), tiles


def cut_instances(content: dict[str, Any], args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cut images and objects of a COCO instances JSON; returns the tiles' JSON, and its objects with "image_id".

    Raises:
        DataError: an image or an annotation can't be read.
    """
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(tqdm(content["images"], unit="image", disable=None), start=1):
        size, tiles = cut_image(image["file_name"], number, args)
        try:
            objects = [Object(x, size) for x in of_image[image["id"]]]
        except SegmentationError as error:
            raise DataError(
                f"{args.annotations}: an annotation of {image['file_name']}: {error}. Correct it."
            ) from error
        for tile in tiles:
            images.append({"id": len(images) + 1, **tile.entry})
            for part in filter(None, (one.in_tile(tile.y, tile.x, args.min_part) for one in objects)):
                annotations.append({"id": len(annotations) + 1, "image_id": len(images), **part})
    return {"images": images, "annotations": annotations, "categories": content["categories"]}, annotations


def cut_panoptic(content: dict[str, Any], args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cut images and PNGs of a COCO panoptic JSON; returns the tiles' JSON, and its things with "image_id".

    Segments keep their ids, so that a thing has the same one in all tiles.

    Raises:
        DataError: an image or a PNG can't be read, or PNG and JSON disagree.
    """
    name = f"cut_tiles {os.path.abspath(args.annotations)}"
    records = panoptic_records(args.annotations, args.images, args.panoptic, name)
    things = {x["id"] for x in content["categories"] if x["isthing"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, (annotation, record) in enumerate(
        zip(tqdm(content["annotations"], unit="image", disable=None), records), start=1
    ):
        segments = annotation["segments_info"]
        size, tiles = cut_image(os.path.relpath(record["file_name"], args.images), number, args)
        ids, positions = read_panoptic_segments(record, size)
        index = np.where(positions < len(segments), positions.astype(np.int32) + 1, 0)
        areas = np.bincount(index.reshape(-1), minlength=len(segments) + 1)
        for tile in tiles:
            images.append({"id": len(images) + 1, **tile.entry})
            Image.fromarray(ids[tile.window]).save(os.path.join(args.output, "panoptic", f"{tile.name}.png"))
            found = list(segments_in(index[tile.window], segments, args.min_part * areas, things))
            annotations.append({"image_id": len(images), "file_name": f"{tile.name}.png", "segments_info": found})
            parts += [{"image_id": len(images), **x} for x in found if x["category_id"] in things]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}, parts


def segments_in(
    index: np.ndarray, segments: list[dict[str, Any]], smallest: np.ndarray, things: set[int]
) -> Iterator[dict[str, Any]]:
    """The segments of a tile.

    Args:
        index: [h, w], 1 + the index of each pixel's segment, or 0.
        segments: those of the image.
        smallest: [1 + number of segments], the area from which on a part of a thing is no crowd.
        things: ids of categories.
    """
    areas = np.bincount(index.reshape(-1), minlength=len(segments) + 1)
    for i, (segment, box) in enumerate(zip(segments, ndimage.find_objects(index, len(segments))), start=1):
        if box is not None:
            (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
            is_small = segment["category_id"] in things and areas[i] < smallest[i]
            extent = {"area": int(areas[i]), "bbox": [left, top, right - left, bottom - top]}
            yield {**segment, "iscrowd": int(segment.get("iscrowd", 0) or is_small), **extent}


def cut_label_maps(args: argparse.Namespace) -> int:
    """Cut images and label maps, whose values, colours or palette stay; returns the number of tiles."""
    count = 0
    records = load_label_folder(args.images, args.annotations, np.zeros(0, np.int16))
    for number, record in enumerate(tqdm(records, unit="image", disable=None), start=1):
        image = record["file_name"]
        size, tiles = cut_image(os.path.relpath(image, args.images), number, args)
        labels = open_labels(record["sem_seg_file_name"], "Label map", image, size)
        for tile in tiles:
            part = labels.crop((tile.x.start, tile.y.start, tile.x.stop, tile.y.stop))
            part.save(os.path.join(args.output, "labels", f"{tile.name}.png"))
        count += len(tiles)
    return count


def read_content(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the JSON.

    Raises:
        ConfigError: it is panoptic, and --panoptic is not given.
        DataError: it is wrong.
    """
    content = read_coco_json(args.annotations, args.images)
    if any("segments_info" in x for x in content.get("annotations", ())) and not args.panoptic:
        raise ConfigError(
            f"{args.annotations}: its annotations are panoptic. Name the folder of their PNGs: --panoptic."
        )
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise DataError(f"{args.annotations}: it has no {missing[0]!r}. Name a COCO JSON with annotations.")
    if not args.panoptic:
        keys = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "segmentation")}
        check_keys(content, keys, args.annotations)
    return content


def main(args: argparse.Namespace) -> None:
    args.overlap = args.tile_size // 4 if args.overlap is None else args.overlap
    if not 0 <= args.overlap < args.tile_size:
        raise ConfigError(f"--overlap {args.overlap}: use 0 to {args.tile_size - 1} pixels (--tile-size).")
    of_labels = os.path.isdir(args.annotations)
    kind = "labels" if of_labels else "panoptic" if args.panoptic else "instances"
    if any(os.path.exists(os.path.join(args.output, name)) for name in (kind, f"{kind}.json")):
        raise ConfigError(f"{args.output}: there are tiles in it. Name another folder, or delete it.")
    if os.path.realpath(os.path.join(args.output, "images")) == os.path.realpath(args.images):
        raise ConfigError(f"{args.output}: its images are those to cut. Name another folder.")
    content = None if of_labels else read_content(args)
    for folder in ("images", *(() if kind == "instances" else (kind,))):
        os.makedirs(os.path.join(args.output, folder), exist_ok=True)
    if content is None:
        print(f"Wrote {cut_label_maps(args)} tiles with their label maps.")
        return
    cut, objects = (cut_panoptic if args.panoptic else cut_instances)(content, args)
    write_json(os.path.join(args.output, f"{kind}.json"), cut)
    most = max(Counter(x["image_id"] for x in objects if not x["iscrowd"]).values(), default=0)
    crowds = sum(x["iscrowd"] for x in objects)
    print(f"Wrote {len(cut['images'])} tiles with {len(objects) - crowds} objects and {crowds} small parts at borders.")
    print(f"A tile has up to {most} objects: MODEL.KNET.NUM_KERNELS must be larger.")
