"""Videos from photos by pan and zoom: the masks are those of the photo, in both formats."""

import itertools
import json

import cv2
import numpy as np
import pytest
from data_helpers import data_cfg
from PIL import Image

import knet_d2
from checks.long_video import same_ids, write_video
from checks.photo_videos import cut, evaluate, windows, write_videos
from knet_d2.data import load_dataset, register_custom_datasets
from knet_d2.data.classes import ClassTable
from knet_d2.data.mapper import read_panoptic_segments
from knet_d2.results.prediction import Prediction
from knet_d2.results.segment import Segment

SIZE, FRAMES = (60, 80), 4
SIZE_OF_FRAMES = (120, 160)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with two photos, a red cup on a blue plate, and a crowd, which is left out."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[10:50, 15:65] = (0, 0, 255)
    pixels[20:40, 30:50] = (255, 0, 0)
    box = {1: [15, 10, 50, 40], 2: [30, 20, 20, 20]}
    polygons = {c: [[x, y, x + w, y, x + w, y + h, x, y + h]] for c, (x, y, w, h) in box.items()}
    annotations = [
        {"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": box[c], "segmentation": polygons[c], "iscrowd": 0}
        | {"area": box[c][2] * box[c][3]}
        for i in (1, 2)
        for c in (1, 2)
    ]
    annotations.append({**annotations[0], "id": 99, "iscrowd": 1})
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)]
    for image in images:
        Image.fromarray(pixels).save(folder / image["file_name"])
    categories = [{"id": 1, "name": "plate"}, {"id": 2, "name": "cup"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "photos.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def videos(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(str(photos / "photos.json"), str(photos), str(folder), FRAMES, longest=160, seed=1)
    return folder


def test_windows_stay_in_the_photo_and_move_evenly():
    for seed in range(50):
        found = np.array(list(windows(SIZE, 7, np.random.default_rng(seed))))
        assert (
            (found[:, :2] >= -1e-9).all() and (found[:, 2] >= 0.55 - 1e-9).all() and (found[:, 2] <= 0.95 + 1e-9).all()
        )
        assert (found[:, 0] + found[:, 2] * SIZE[1] <= SIZE[1] + 1e-9).all()
        assert (found[:, 1] + found[:, 2] * SIZE[0] <= SIZE[0] + 1e-9).all()
        assert np.diff(found, axis=0) == pytest.approx(np.diff(found, axis=0)[:1].repeat(6, axis=0))


def test_a_window_is_cut_and_resized():
    """Half of the photo, twice as large: each pixel becomes 2 x 2."""
    picture = np.arange(48, dtype=np.uint8).reshape(6, 8)
    found = cut(picture, (2, 1, 0.5), (6, 8), cv2.INTER_NEAREST)
    assert found[::2, ::2].tolist() == picture[1:4, 2:6].tolist()


def test_masks_follow_the_pixels(videos):
    """Red pixels are those of the cup, blue ones those of the plate, but for the borders; both formats agree."""
    paths = {key: str(videos / key) for key in ("images", "panoptic", "panoptic.json", "instances.json")}
    panoptic = {"panoptic_json": paths["panoptic.json"], "panoptic_root": paths["panoptic"]}
    entries = [
        {"name": "photos_panoptic", "type": "video_panoptic", "images": paths["images"], **panoptic},
        {"name": "photos_instance", "type": "youtube_vis", "images": paths["images"], "json": paths["instances.json"]},
    ]
    register_custom_datasets(data_cfg("panoptic", custom=entries, resolve=False))
    maps, tracks = load_dataset("photos_panoptic"), load_dataset("photos_instance")
    assert len(maps) == len(tracks) == 2 * FRAMES and maps[0]["file_name"] == tracks[0]["file_name"]
    areas = []
    for record, other in zip(maps, tracks):
        image = cv2.imread(record["file_name"]).astype(int)
        _, index = read_panoptic_segments(record, (120, 160))
        names = {x["category_id"]: index == i for i, x in enumerate(record["segments_info"])}
        for label, channel in ((0, 0), (1, 2)):
            assert (names[label] == (image[:, :, channel] > 128)).mean() > 0.97
        assert sorted(x["category_id"] for x in other["annotations"]) == [0, 1]
        areas.append(names[1].sum())
    assert len(set(areas)) > 4  # the window zooms
    ids = [{x["category_id"]: x["id"] for x in record["segments_info"]} for record in maps]
    assert ids == [ids[0]] * len(ids)


class ByColor:
    """A predictor that finds the things by their colours; ``flips`` exchanges the ids in every other frame."""

    cfg = data_cfg("instance", resolve=False)
    classes = ClassTable(["cup", "other", "plate"], [0, 1, 2], [(9, 9, 9)] * 3, 3)

    def __init__(self, flips):
        self.flips = flips

    def follower(self):
        count = itertools.count()

        def follow(image):
            ids = (1, 2) if not self.flips or next(count) % 2 else (2, 1)
            masks = [(0, image[:, :, 0] > 128), (2, image[:, :, 2] > 128)]
            segments = [Segment(label, 0.9, mask, (0, 0), SIZE_OF_FRAMES, i) for (label, mask), i in zip(masks, ids)]
            return {"instances": Prediction(SIZE_OF_FRAMES, segments, self.classes)}

        return follow


@pytest.mark.parametrize("flips", [False, True])
def test_metrics_of_one_who_sees_the_colors(videos, monkeypatch, flips):
    """Masks are right but for the borders, so AQ is all about the ids; classes are matched by name."""
    monkeypatch.setattr(knet_d2, "load", lambda path, opts: ByColor(flips))
    found = evaluate(str(videos), "model.pth", [])
    assert 65 < found["video_panoptic"]["SQ"] < 200 / 3  # of three classes: pixels of borders that are missed are one
    if flips:
        assert found["video_panoptic"]["AQ"] < 60 and found["video_instance"]["AP50"] < 90
    else:
        assert found["video_panoptic"]["AQ"] > 90 and found["video_instance"]["AP50"] == pytest.approx(100)


def test_a_long_video_returns_to_where_it_was(tmp_path):
    """Forwards in 3 frames and backwards in 2 more: frames that are 4 apart are equal but for the compression."""
    photo = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (160, 120))
    write_video(str(tmp_path / "in.mp4"), photo, count=9, turn=3, longest=160, seed=0)
    source = cv2.VideoCapture(str(tmp_path / "in.mp4"))
    frames = [source.read()[1].astype(int) for _ in range(9)]
    assert not source.read()[0] and frames[0].shape == (120, 160, 3)
    for i in range(5):
        apart = [np.abs(frames[i] - frames[i + d]).mean() for d in (1, 2, 4)]
        assert apart[2] < 4 < apart[0] and (apart[1] < 4) == (i % 2 == 1)


def test_same_ids():
    """Pairs at one place and of one class count: one with its id, one with another; the others have no pair."""

    def prediction(*segments):
        masks = [(label, np.eye(4, dtype=bool)[[row]], track_id) for label, row, track_id in segments]
        found = [Segment(label, 0.9, mask.T, (0, 0), (4, 1), track_id) for label, mask, track_id in masks]
        return Prediction((4, 1), found, ByColor.classes)

    before, now = prediction((0, 0, 5), (1, 1, 6), (0, 2, 7)), prediction((0, 0, 5), (1, 1, 9), (2, 2, 7), (0, 3, 8))
    assert list(same_ids(before, now)) == [True, False]
