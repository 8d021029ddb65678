"""Make videos from photos with masks by pan and zoom, and follow their objects with a model.

    python -m checks.photo_videos photos.json photos/ videos/ --weights model_final.pth

Each photo of a COCO instances JSON becomes a video in which a window moves and zooms over it, so that the masks of all
frames are known. The folder gets images, YouTube-VIS JSON (instances.json) and panoptic PNGs with their JSON, in the
formats of docs/DATASETS.md. With --weights, an instance or panoptic model whose classes have the same names follows the
things, and STQ and the AP of tracks are printed. Pixels without a thing are void: they do not count in SQ, but in the
size of predicted tracks. As in deeplab2's program, pixels of things that are missed add a class with the IoU 0 to SQ.

All objects of a photo move together, so this measures ids under a moving camera, not where objects cross.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from panopticapi.utils import id2rgb
from pycocotools.coco import COCO
from tabulate import tabulate

import knet_d2
from knet_d2.data.custom import register_custom_datasets
from knet_d2.data.files import write_json
from knet_d2.data.records import load_dataset
from knet_d2.data.segmentation import encode_mask
from knet_d2.programs.arguments import add_opts
from knet_d2.video.evaluators import VideoInstanceEvaluator, VideoPanopticEvaluator

# The window's longer side as a share of the photo's, at both ends of a video
SHARES = (0.55, 0.95)
METRICS = {"video_panoptic": ("STQ", "AQ", "SQ"), "video_instance": ("AP", "AP50", "AR100")}


def windows(size: tuple[int, int], count: int, rng: np.random.Generator) -> Iterator[tuple[float, float, float]]:
    """Windows (x, y, share of the photo's sides) that move evenly between two random ones; all are in the photo.

    Args:
        size: (height, width) of the photo.
    """
    height, width = size
    shares = rng.permutation(SHARES) if rng.random() < 0.5 else rng.uniform(*SHARES, 2)
    corners = [((1 - share) * width * rng.random(), (1 - share) * height * rng.random()) for share in shares]
    for t in np.linspace(0, 1, count):
        x, y, share = ((1 - t) * a + t * b for a, b in zip((*corners[0], shares[0]), (*corners[1], shares[1])))
        yield x, y, share


def cut(picture: np.ndarray, window: tuple[float, float, float], size: tuple[int, int], how: int) -> np.ndarray:
    """The part of a picture in a window, resized to (height, width)."""
    x, y, share = window
    scale = size[1] / (share * picture.shape[1])
    matrix = np.array([[scale, 0, -x * scale], [0, scale, -y * scale]])
    return cv2.warpAffine(picture, matrix, size[::-1], flags=how, borderMode=cv2.BORDER_REPLICATE)


def write_videos(
    json_file: str, image_root: str, folder: str, num_frames: int, longest: int, seed: int, limit: int | None = None
) -> None:
    """Write the data set.

    Args:
        longest: longer side of a frame in pixels.
        limit: largest number of photos; None: all.
    """
    coco = COCO(json_file)
    categories = [{**x, "isthing": 1} for x in coco.loadCats(sorted(coco.getCatIds()))]
    videos: list[dict[str, Any]] = []
    tracks: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for image in coco.loadImgs(sorted(coco.getImgIds())[:limit]):
        photo = cv2.imread(os.path.join(image_root, image["file_name"]))
        name, rng = f"{len(videos):04d}", np.random.default_rng([seed, image["id"]])
        objects = [x for x in coco.loadAnns(coco.getAnnIds(image["id"])) if not x.get("iscrowd", 0)]
        # 0: no thing; smaller things are painted over larger ones, as in a panoptic map
        ids = np.zeros(photo.shape[:2], np.uint16)
        for number in sorted(range(len(objects)), key=lambda i: -objects[i]["area"]):
            ids[coco.annToMask(objects[number]).astype(bool)] = number + 1
        scale = longest / max(photo.shape[:2])
        size = tuple(round(side * scale) for side in photo.shape[:2])
        for kind in ("images", "panoptic"):
            os.makedirs(os.path.join(folder, kind, name), exist_ok=True)
        maps, frames = [], []
        for t, window in enumerate(windows(photo.shape[:2], num_frames, rng)):
            frame, found = cut(photo, window, size, cv2.INTER_AREA), cut(ids, window, size, cv2.INTER_NEAREST)
            cv2.imwrite(os.path.join(folder, "images", name, f"{t:06d}.jpg"), frame)
            cv2.imwrite(os.path.join(folder, "panoptic", name, f"{t:06d}.png"), id2rgb(found)[:, :, ::-1])
            segments = [
                {
                    "id": int(i),
                    "category_id": objects[i - 1]["category_id"],
                    "iscrowd": 0,
                    "area": int((found == i).sum()),
                }
                for i in np.unique(found[found > 0])
            ]
            frames.append({"image_id": f"{t:06d}", "file_name": f"{t:06d}.png", "segments_info": segments})
            maps.append(found)
        panoptic.append({"video_id": name, "annotations": frames})
        names = [f"{name}/{t:06d}.jpg" for t in range(num_frames)]
        videos.append({"id": len(videos) + 1, "file_names": names, "height": size[0], "width": size[1]})
        for i, x in enumerate(objects, 1):
            masks = [found == i for found in maps]
            if any(mask.any() for mask in masks):
                base = {"id": len(tracks) + 1, "video_id": len(videos), "category_id": x["category_id"], "iscrowd": 0}
                tracks.append({**base, "segmentations": [encode_mask(mask) if mask.any() else None for mask in masks]})
    instances = {"videos": videos, "categories": categories, "annotations": tracks}
    write_json(os.path.join(folder, "instances.json"), instances)
    images = [{"id": f"{t:06d}", "file_name": f"{t:06d}.jpg"} for t in range(num_frames)]
    listed = [{"video_id": x["video_id"], "images": images} for x in panoptic]
    content = {"videos": listed, "categories": categories, "annotations": panoptic}
    write_json(os.path.join(folder, "panoptic.json"), content)


def evaluate(folder: str, weights: str, opts: list[str]) -> dict[str, dict[str, float]]:
    """Follow the things of all videos in a folder of :func:`write_videos`; metrics by evaluator and name."""
    predictor = knet_d2.load(weights, opts=opts)
    paths = {key: os.path.join(folder, key) for key in ("images", "panoptic", "panoptic.json", "instances.json")}
    panoptic = {"panoptic_json": paths["panoptic.json"], "panoptic_root": paths["panoptic"]}
    entries = {
        "photo_videos_panoptic": {"type": "video_panoptic", "images": paths["images"], **panoptic},
        "photo_videos_instance": {"type": "youtube_vis", "images": paths["images"], "json": paths["instances.json"]},
    }
    cfg = predictor.cfg.clone()
    cfg.DATASETS.CUSTOM = [{"name": name, **entry} for name, entry in entries.items()]
    register_custom_datasets(cfg)
    records = [load_dataset(name) for name in entries]
    of_maps = VideoPanopticEvaluator("photo_videos_panoptic")
    of_tracks = VideoInstanceEvaluator("photo_videos_instance", "instances")
    thing_names = list(MetadataCatalog.get("photo_videos_instance").thing_classes)
    of_maps.reset()
    of_tracks.reset()
    before = None
    for panoptic_record, record in zip(*records, strict=True):
        if record["video_id"] != before:
            follow, before = predictor.follower(), record["video_id"]
        prediction = next(iter(follow(cv2.imread(record["file_name"])[:, :, ::-1]).values()))
        things = [x for x in prediction.segments if predictor.classes.names[x.label] in thing_names]
        labels = [thing_names.index(predictor.classes.names[x.label]) for x in things]
        masks = np.array([x.mask for x in things], bool).reshape(-1, *prediction.size)
        segment_map, segments = torch.zeros(prediction.size, dtype=torch.int32), []
        for i, (segment, label, mask) in enumerate(zip(things, labels, masks), 1):
            segment_map[torch.from_numpy(mask)] = i
            segments.append({"id": i, "category_id": label, "isthing": True, "track_id": segment.track_id})
        fields = {"pred_masks": torch.from_numpy(masks), "pred_classes": torch.tensor(labels, dtype=torch.int64)}
        fields["scores"] = torch.tensor([x.score for x in things])
        fields["track_ids"] = torch.tensor([x.track_id for x in things], dtype=torch.int64)
        of_maps.process([panoptic_record], [{"panoptic_seg": (segment_map, segments)}])
        of_tracks.process([record], [{"instances": Instances(prediction.size, **fields)}])
    return {**of_maps.evaluate(), **of_tracks.evaluate()}  # type: ignore[dict-item]  # there is one process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", help="COCO instances JSON")
    parser.add_argument("images", help="folder of its photos")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--num-frames", type=int, default=20, help="of each video")
    parser.add_argument("--longest", type=int, default=480, help="longer side of a frame in pixels")
    parser.add_argument("--limit", type=int, help="largest number of photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="a model that follows the things")
    add_opts(parser)
    args = parser.parse_args()
    write_videos(args.json, args.images, args.output, args.num_frames, args.longest, args.seed, args.limit)
    if args.weights:
        results = evaluate(args.output, args.weights, args.opts)
        columns = {key: results[part][key] for part, keys in METRICS.items() for key in keys}
        print(tabulate([columns.values()], columns, tablefmt="pipe", floatfmt=".1f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
