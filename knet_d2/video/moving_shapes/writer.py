"""Writes moving shapes in three formats: YouTube-VIS JSON, panoptic JSON and PNGs of videos, KITTI-STEP PNGs.

The files are, with one folder per video in each folder::

    images/000/000000.jpg ...    panoptic/000/000000.png ...    kitti_step/000/000000.png ...
    instances.json               panoptic.json                  crossings.json
"""

import os
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from panopticapi.utils import id2rgb
from PIL import Image
from tqdm import tqdm

from ...data.files import IGNORE_LABEL, write_json
from ...data.segmentation import encode_mask
from ...data.shapes.writer import shapes_categories
from .scenes import STUFF_CLASSES, THING_CLASSES, Frame, Video, draw_video

_FIRST_STUFF_ID = 101  # of segments; those of things are their tracks


def write_moving_shapes(root: str, num_videos: int, seed: int, num_frames: int = 20, size: int = 128) -> None:
    """Write a data set into the folder root, which is created if it is missing.

    Args:
        num_videos: number of videos; video i depends only on (seed, i, num_frames, size).
        num_frames: frames of each video.
        size: height and width in pixels.
    """
    categories = shapes_categories()
    tracks: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    crossings: list[dict[str, Any]] = []
    for index in tqdm(
        range(num_videos), desc=f"Generating moving shapes in {root}", unit="video", mininterval=1, disable=None
    ):
        video, video_id = draw_video(np.random.default_rng([seed, index]), num_frames, size), f"{index:03d}"
        for folder in ("images", "panoptic", "kitti_step"):
            os.makedirs(os.path.join(root, folder, video_id), exist_ok=True)
        frames = []
        for t, frame in enumerate(video.frames):
            name = f"{t:06d}"
            Image.fromarray(frame.image).save(os.path.join(root, "images", video_id, name + ".jpg"), quality=95)
            ids, segments = _segments(video, frame, categories)
            Image.fromarray(id2rgb(ids)).save(os.path.join(root, "panoptic", video_id, name + ".png"))
            _kitti_step(video, frame).save(os.path.join(root, "kitti_step", video_id, name + ".png"))
            frames.append({"image_id": name, "file_name": name + ".png", "segments_info": segments})
        panoptic.append({"video_id": video_id, "annotations": frames})
        tracks += [
            {"id": len(tracks) + i, "video_id": index + 1, **x} for i, x in enumerate(_tracks(video, categories), 1)
        ]
        crossings += [{"video_id": video_id, **crossing._asdict()} for crossing in video.crossings]
    names = [f"{t:06d}" for t in range(num_frames)]
    sizes = {"height": size, "width": size}
    videos = [
        {"id": i + 1, "file_names": [f"{i:03d}/{x}.jpg" for x in names], "length": num_frames, **sizes}
        for i in range(num_videos)
    ]
    images = [{"id": x, "file_name": x + ".jpg", **sizes} for x in names]
    things = [x for x in categories if x["isthing"]]
    info = {"description": "K-Net moving shapes", "seed": seed, "size": size}
    panoptic_videos = [{"video_id": x["video_id"], "images": images} for x in panoptic]
    files = {
        "instances": {"info": info, "videos": videos, "annotations": tracks, "categories": things},
        "panoptic": {"info": info, "videos": panoptic_videos, "annotations": panoptic, "categories": categories},
        "crossings": crossings,
    }
    for name, content in files.items():
        write_json(os.path.join(root, f"{name}.json"), content)


def _tracks(video: Video, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """YouTube-VIS annotations of the things that are seen."""
    found = []
    for track, category in video.categories.items():
        masks = [frame.things.get(track) for frame in video.frames]
        if all(mask is None for mask in masks):
            continue
        rles = [None if mask is None else encode_mask(mask) for mask in masks]
        found.append(
            {
                "category_id": categories[category]["id"],
                "iscrowd": 0,
                "segmentations": rles,
                "bboxes": [None if x is None else mask_util.toBbox(x).tolist() for x in rles],
                "areas": [None if mask is None else int(mask.sum()) for mask in masks],
            }
        )
    return found


def _segments(video: Video, frame: Frame, categories: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The map of segment ids [H, W] (0: void) and the segments of a frame; ids are those of the whole video."""
    found = [(track, categories[video.categories[track]], mask) for track, mask in frame.things.items()]
    for i in range(len(STUFF_CLASSES)):
        found.append((_FIRST_STUFF_ID + i, categories[len(THING_CLASSES) + i], frame.stuff == i))
    ids, segments = np.zeros(frame.stuff.shape, np.int64), []
    for segment_id, category, mask in found:
        if mask.any():
            ids[mask] = segment_id
            area, box = int(mask.sum()), mask_util.toBbox(encode_mask(mask)).tolist()
            columns = {"id": segment_id, "category_id": category["id"], "iscrowd": 0, "area": area, "bbox": box}
            segments.append(columns)
    return ids, segments


def _kitti_step(video: Video, frame: Frame) -> Image.Image:
    """R: class, things first (255: void); 256 G + B: track, 0 for stuff."""
    pixels = np.zeros((*frame.stuff.shape, 3), np.uint8)
    pixels[..., 0] = np.where(frame.stuff < 0, IGNORE_LABEL, frame.stuff + len(THING_CLASSES))
    for track, mask in frame.things.items():
        pixels[mask] = video.categories[track], track >> 8, track & 255
    return Image.fromarray(pixels)
