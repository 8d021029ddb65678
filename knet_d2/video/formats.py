"""Types of DATASETS.CUSTOM whose images are the frames of videos (see docs/DATASETS.md).

A record is that of an image, with "video_id"; records of one video follow each other in the order of time. An
annotation has "track_id". The "id" of a segment is the same in all frames of a video.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..data.coco_json import decode_json
from ..data.coco_records import set_panoptic_classes
from ..data.custom import FORMATS, Format, Loader, load_label_folder
from ..data.files import IGNORE_LABEL, read_panoptic
from ..data.segmentation import SegmentationError, from_kitti_step, read_segmentation
from ..errors import ConfigError, DataError

# Numbers of successive frames in which VPQ compares tubes, where an entry has no "windows"; those of VIPSeg
WINDOWS = (1, 2, 4, 6)
_PATH = (True, (str,))


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what a wrong JSON causes into a DataError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, SegmentationError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: is not of the expected format ({what}). See knet docs DATASETS, and export it again."
        ) from error


def _checked_windows(entry: dict[str, Any]) -> tuple[int, ...]:
    windows = tuple(entry.get("windows", WINDOWS))
    if not windows or not all(isinstance(k, int) and k > 0 for k in windows):
        raise ConfigError(f"DATASETS.CUSTOM, {entry['name']}: windows = {list(windows)}: use whole numbers above 0.")
    return windows


def _check_split(entry: dict[str, Any]) -> None:
    for key in ("validation", "test"):
        if key in entry and "group_by" not in entry:
            raise ConfigError(
                f"DATASETS.CUSTOM, {entry['name']}: {key} = {entry[key]}: frames of one video would be in both parts. "
                "Add group_by, such as 'folder' where each video is a folder."
            )


def _read_json(path: str) -> Any:
    with PathManager.open(path, "rb") as f:
        return decode_json(f.read(), path)


# ---- YouTube-VIS -----------------------------------------------------------------------------------------------


def _register_youtube_vis(name: str, entry: dict[str, Any]) -> Loader:
    _check_split(entry)
    MetadataCatalog.get(name).set(json_file=entry["json"], image_root=entry["images"], evaluator_type="video_instance")
    return lambda: youtube_vis_records(entry["json"], entry["images"], name)


def youtube_vis_records(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """Read a YouTube-VIS JSON into records of frames; the classes are written into the metadata of ``name``.

    Raises:
        DataError: the JSON is wrong; names the file.
    """
    content = _read_json(json_file)
    with _explained(json_file):
        _refuse_twice("category id", (x["id"] for x in content["categories"]))
        _refuse_twice("video id", (x["id"] for x in content["videos"]))
        _refuse_twice("video and annotation id", ((x["video_id"], x["id"]) for x in content.get("annotations") or ()))
        categories = sorted(content["categories"], key=lambda x: x["id"])
        contiguous = {x["id"]: i for i, x in enumerate(categories)}
        metadata = MetadataCatalog.get(name)
        metadata.thing_classes = [x["name"] for x in categories]
        metadata.thing_dataset_id_to_contiguous_id = contiguous
        of_video: dict[Any, list[dict[str, Any]]] = {}
        for annotation in content.get("annotations") or ():
            of_video.setdefault(annotation["video_id"], []).append(annotation)
        unknown = next(iter(of_video.keys() - {video["id"] for video in content["videos"]}), None)
        if unknown is not None:
            raise ValueError(f"an annotation has the video_id {unknown}, which no video has")
        return [
            record
            for video in content["videos"]
            for record in _frames(video, of_video.get(video["id"], []), contiguous, image_root)
        ]


def _refuse_twice(what: str, ids: Iterable[Any]) -> None:
    """Raise a ValueError where one of two things of the same id would take the place of the other."""
    twice = next((x for x, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"the {what} {twice} occurs twice")


def _frames(
    video: dict[str, Any], annotations: list[dict[str, Any]], contiguous: dict[Any, int], image_root: str
) -> Iterator[dict[str, Any]]:
    size = {"height": video["height"], "width": video["width"]}
    for annotation in annotations:
        if len(annotation["segmentations"]) != len(video["file_names"]):
            raise TypeError(
                f"annotation {annotation['id']} has {len(annotation['segmentations'])} segmentations, but its video "
                f"{len(video['file_names'])} frames"
            )
    for i, file_name in enumerate(video["file_names"]):
        yield {
            "file_name": os.path.join(image_root, file_name),
            "image_id": f"{video['id']}/{i}",
            "video_id": video["id"],
            **size,
            "annotations": [
                {
                    "category_id": contiguous[x["category_id"]],
                    "track_id": x["id"],
                    "iscrowd": x.get("iscrowd", 0),
                    "segmentation": read_segmentation(x["segmentations"][i], **size),
                    "bbox": (x.get("bboxes") or {i: None})[i] or [0, 0, 0, 0],
                    "bbox_mode": BoxMode.XYWH_ABS,
                }
                for x in annotations
                if x["segmentations"][i]
            ],
        }


# ---- panoptic videos -------------------------------------------------------------------------------------------


def _register_video_panoptic(name: str, entry: dict[str, Any]) -> Loader:
    _check_split(entry)
    MetadataCatalog.get(name).set(
        panoptic_json=entry["panoptic_json"],
        panoptic_root=entry["panoptic_root"],
        image_root=entry["images"],
        evaluator_type="video_panoptic",
        ignore_label=IGNORE_LABEL,
        windows=_checked_windows(entry),
    )
    return lambda: video_panoptic_records(entry["panoptic_json"], entry["images"], entry["panoptic_root"], name)


def video_panoptic_records(json_file: str, image_root: str, panoptic_root: str, name: str) -> list[dict[str, Any]]:
    """Read a panoptic JSON of videos into records of frames; the classes are written into the metadata of ``name``.

    Two layouts occur: "videos" and "annotations" with the images and annotations of each video in them (VIPSeg; files
    are in a folder per video), and COCO's with a "video_id" in each image.

    Raises:
        DataError: the JSON is wrong; names the file.
    """
    content = _read_json(json_file)
    with _explained(json_file):
        contiguous, things = set_panoptic_classes(content["categories"], json_file, name)
        records: list[dict[str, Any]] = []
        for video_id, folder, image, annotation in _panoptic_frames(content):
            segments = [
                {**x, "category_id": contiguous[x["category_id"]], "isthing": x["category_id"] in things}
                for x in annotation["segments_info"]
            ]
            records.append(
                {
                    "file_name": _existing(os.path.join(image_root, folder, image["file_name"])),
                    "image_id": f"{video_id}/{image['id']}",
                    "video_id": video_id,
                    "pan_seg_file_name": os.path.join(panoptic_root, folder, annotation["file_name"]),
                    "segments_info": segments,
                }
            )
            records[-1] |= {key: image[key] for key in ("height", "width") if key in image}
        return records


def _panoptic_frames(content: dict[str, Any]) -> Iterator[tuple[Any, str, dict[str, Any], dict[str, Any]]]:
    """(video id, folder of its files, image, annotation) of each frame, video by video."""
    if "videos" in content and "images" not in content:
        annotations = {x["video_id"]: x["annotations"] for x in content["annotations"]}
        for video in content["videos"]:
            of_image = {x["image_id"]: x for x in annotations[video["video_id"]]}
            for image in video["images"]:
                yield video["video_id"], str(video["video_id"]), image, of_image[image["id"]]
        return
    of_image = {x["image_id"]: x for x in content["annotations"]}
    videos: dict[Any, list[dict[str, Any]]] = {}
    for image in content["images"]:
        videos.setdefault(image["video_id"], []).append(image)
    for video_id, images in videos.items():
        for image in images:
            if image["id"] in of_image:  # of Cityscapes-VPS, every fifth frame has annotations
                yield video_id, "", image, of_image[image["id"]]


def _existing(path: str) -> str:
    """The image's path; with the ending .jpg where only this file exists, since VIPSeg's JSON names PNGs."""
    jpg = os.path.splitext(path)[0] + ".jpg"
    return jpg if not os.path.isfile(path) and os.path.isfile(jpg) else path


# ---- KITTI-STEP ------------------------------------------------------------------------------------------------


def _register_kitti_step(name: str, entry: dict[str, Any]) -> Loader:
    _check_split(entry)
    classes, things = list(entry["classes"]), list(entry["things"])
    unknown = [x for x in things if x not in classes]
    if unknown or not things:
        raise ConfigError(f"DATASETS.CUSTOM, {name}: things = {things}: use one or more of classes.")
    if not all(isinstance(x, str) for x in classes) or len(set(classes)) < len(classes) or len(classes) > IGNORE_LABEL:
        raise ConfigError(f"DATASETS.CUSTOM, {name}: classes = {classes}: use up to {IGNORE_LABEL} different names.")
    thing_ids = {i for i, x in enumerate(classes) if x in things}
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        stuff_classes=classes,
        thing_dataset_id_to_contiguous_id={i: i for i in sorted(thing_ids)},
        stuff_dataset_id_to_contiguous_id={i: i for i in range(len(classes)) if i not in thing_ids},
        image_root=entry["images"],
        evaluator_type="video_panoptic",
        ignore_label=IGNORE_LABEL,
        windows=_checked_windows(entry),
    )
    return lambda: kitti_step_records(entry["images"], entry["labels"], thing_ids, len(classes))


def kitti_step_records(image_root: str, label_root: str, things: set[int], num_classes: int) -> list[dict[str, Any]]:
    """Make records from a folder of images and one of KITTI-STEP's PNGs, in both of which each video is a folder.

    In a PNG, R is the class (255: void) and 256 G + B the number of the thing, 0 for stuff and crowds. All PNGs are
    read once, because there is no list of their segments.

    Raises:
        DataError: an image has no PNG, or a PNG has another class.
    """

    def record(files: dict[str, Any]) -> dict[str, Any]:
        png = files["sem_seg_file_name"]
        ids = from_kitti_step(read_panoptic(png)).reshape(-1, 3).astype(np.int64) @ [1, 256, 65536]
        segments = []
        for i in np.unique(ids[ids > 0]).tolist():
            category, is_crowd = (i & 255) - 1, i < 256
            if category >= num_classes:
                raise DataError(
                    f"{png}: has the class {category}, but classes of its data set has {num_classes} names."
                )
            isthing = category in things
            segments.append(
                {"id": i, "category_id": category, "isthing": isthing, "iscrowd": int(isthing and is_crowd)}
            )
        place = os.path.relpath(files["file_name"], image_root)
        return {
            "file_name": files["file_name"],
            "image_id": os.path.splitext(place)[0].replace(os.sep, "/"),
            "video_id": os.path.dirname(place).replace(os.sep, "/"),
            "pan_seg_file_name": png,
            "pan_seg_encoding": "kitti_step",
            "segments_info": segments,
        }

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(record, load_label_folder(image_root, label_root, np.zeros(0, np.int16))))


FORMATS["youtube_vis"] = Format(_register_youtube_vis, {"json": _PATH, "images": _PATH})
FORMATS["video_panoptic"] = Format(
    _register_video_panoptic,
    {"images": _PATH, "panoptic_json": _PATH, "panoptic_root": _PATH, "windows": (False, (list, tuple))},
)
FORMATS["kitti_step"] = Format(
    _register_kitti_step,
    {
        "images": _PATH,
        "labels": _PATH,
        "classes": (True, (list, tuple)),
        "things": (True, (list, tuple)),
        "windows": (False, (list, tuple)),
    },
)
