"""Data sets of videos: formats, moving shapes, evaluators, and a model that is trained and evaluated on them."""

import itertools
import json
import math
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg, edit_json
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from helpers import spread_scores, tiny_config, tiny_model

from checks.video import MOST_CLASSES, IouTracker, NextFrame, TrackingTruth, ids_kept, new_followers
from checks.video import evaluate as evaluate_trackers
from knet_d2.data import (
    build_mapper,
    build_test_loader,
    build_train_loader,
    load_dataset,
    register_custom_datasets,
    resolve_classes,
)
from knet_d2.data.mapper import read_panoptic_segments
from knet_d2.data.sampler import VideoSampler
from knet_d2.engine import Trainer
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import best_metric, build_evaluators
from knet_d2.video import evaluators as evaluators_module
from knet_d2.video.evaluators import VideoInstanceEvaluator, VideoPanopticEvaluator
from knet_d2.video.moving_shapes import draw_video, write_moving_shapes

NUM_VIDEOS, NUM_FRAMES, SIZE = 3, 6, 64
VIDEO_FORMATS = ("youtube_vis", "video_panoptic", "kitti_step")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("moving_shapes"))
    write_moving_shapes(folder, NUM_VIDEOS, seed=5, num_frames=NUM_FRAMES, size=SIZE)
    return folder


def register(kind, root, **changes):
    """Name of a data set for what write_moving_shapes wrote."""
    entry = custom_entry(kind, root, **changes)
    register_custom_datasets(data_cfg("panoptic", custom=(entry,), resolve=False))
    return entry["name"]


def masks_of(record):
    """{(class, track): mask} of the things and {class: mask} of the stuff of a record."""
    things, stuff = {}, {}
    if "annotations" in record:
        import pycocotools.mask as mask_util

        for x in record["annotations"]:
            mask = mask_util.decode(x["segmentation"]).astype(bool)
            assert x["bbox"] == mask_util.toBbox(x["segmentation"]).tolist() and x["iscrowd"] == 0
            things[x["category_id"], x["track_id"]] = mask
        return things, stuff
    _, index = read_panoptic_segments(record, (SIZE, SIZE))
    for i, x in enumerate(record["segments_info"]):
        if x["isthing"]:
            things[x["category_id"], x["id"]] = index == i
        else:
            stuff[x["category_id"]] = index == i
    return things, stuff


# ---- moving shapes ---------------------------------------------------------------------------------------------


def test_a_video_depends_on_its_seed_and_index_alone(root, tmp_path):
    """Fewer videos of the same seed are the same files; another seed gives others."""
    write_moving_shapes(str(tmp_path / "a"), 2, seed=5, num_frames=NUM_FRAMES, size=SIZE)
    files = sorted(x.relative_to(tmp_path / "a") for x in (tmp_path / "a").rglob("*.*") if x.suffix != ".json")
    assert len(files) == 2 * NUM_FRAMES * 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (Path(root) / file).read_bytes()
    write_moving_shapes(str(tmp_path / "b"), 1, seed=6, num_frames=NUM_FRAMES, size=SIZE)
    image = Path("images", "000", "000000.jpg")
    assert (tmp_path / "b" / image).read_bytes() != (Path(root) / image).read_bytes()


@pytest.fixture(scope="module")
def videos():
    return [draw_video(np.random.default_rng([9, i]), 20, 128) for i in range(6)]


def test_half_of_all_crossings_are_between_fast_look_alikes(videos):
    """Of one class and colour; they move more than half their size in a frame, the others less than a quarter."""
    crossings = [(video, x) for video in videos for x in video.crossings]
    assert sum(x.look_alike for _, x in crossings) == len(crossings) / 2 == 2 * len(videos)
    for video, crossing in crossings:
        a, b = (video.categories[track] for track in crossing.tracks)
        assert (a == b) is crossing.look_alike
    for look_alike, low, high in ((True, 0.5, 0.95), (False, 0.0, 0.3)):
        steps = []
        for video, crossing in crossings:
            for track in crossing.tracks if crossing.look_alike is look_alike else ():
                masks = [frame.things.get(track) for frame in video.frames]
                largest = max(mask.sum() for mask in masks if mask is not None)
                for a, b in zip(masks, masks[1:]):  # both whole
                    if a is not None and b is not None and min(a.sum(), b.sum()) > 0.95 * largest:
                        centers = [np.argwhere(x).mean(axis=0) for x in (a, b)]
                        extent = np.ptp(np.argwhere(a), axis=0).max() + 1
                        steps.append(np.linalg.norm(centers[1] - centers[0]) / extent)
        assert len(steps) > 30 and low < np.median(steps) < high, np.median(steps)
    colors = []
    for video, crossing in crossings:
        if crossing.look_alike:
            frames = [x for x in video.frames if all(track in x.things for track in crossing.tracks)]
            means = [[x.image[x.things[track]].mean(axis=0) for track in crossing.tracks] for x in frames]
            colors.append(np.abs(np.subtract(*np.array(means).mean(axis=0))).max())
    assert np.median(colors) < 20


def test_things_leave_return_and_are_hidden(videos):
    seen = ["".join(str(int(t in x.things)) for x in video.frames) for video in videos for t in video.categories]
    assert sum("01" in x.lstrip("0") for x in seen) >= len(videos)
    assert {c for video in videos for c in video.categories.values()} == {0, 1, 2, 3}
    assert {c for video in videos for c in np.unique(video.frames[0].stuff)} >= {0, 1, 2}
    for video in videos:
        masks = list(video.frames[7].things.values())
        assert np.sum(masks, axis=0).max() == 1 and min(mask.sum() for mask in masks) >= 12


def test_an_iou_tracker_loses_ids_where_look_alikes_cross(videos):
    """With the true masks, at least 20 % of the ids; none is lost by a tracker that knows them."""
    for min_iou in (0.1, 0.3, 0.5):
        ids, crossings = {}, []
        for number, video in enumerate(videos):
            tracker = IouTracker(min_iou, memory=4, new_track_score=0.35)
            crossings += [{"video_id": number, **x._asdict()} for x in video.crossings]
            for t, frame in enumerate(video.frames):
                labels = [video.categories[track] for track in frame.things]
                found = tracker(labels, list(frame.things.values()), [1.0] * len(labels))
                ids |= {(number, t, track): i for track, i in zip(frame.things, found)}
        assert ids_kept(crossings, lambda *key, ids=ids: ids.get(key), 20) < 0.8
        assert ids_kept(crossings, lambda *key, ids=ids: key[2] if key in ids else None, 20) == 1.0


def test_ids_kept_of_crossings():
    crossing = {"video_id": 0, "time": 3.4, "tracks": [1, 2], "look_alike": True}
    ids = {(0, t, track): track for t in range(9) for track in (1, 2)}
    other = {**crossing, "look_alike": False}

    def kept(**changes):
        return ids_kept([crossing, other], lambda *key: {**ids, **changes.get("ids", {})}.get(key), 9)

    assert kept() == 1.0
    assert kept(ids={(0, 5, 1): 7}) == 0.5  # the first frame behind, more than one frame after the crossing
    assert kept(ids={(0, 4, 1): 7, (0, 6, 1): 7}) == 1.0
    assert kept(ids={(0, 5, 1): None, (0, 6, 1): 7}) == 0.5
    assert math.isnan(ids_kept([other], ids.get, 9))
    assert ids_kept([crossing, other], lambda *key: {**ids, (0, 5, 1): 7}.get(key), 9, look_alike=False) == 0.5


def test_nearest_things_of_the_next_frame():
    """Of things that exchange their vectors at a crossing, beside a lone one, one of two classes and another video."""
    next_frame = NextFrame([{"video_id": 0, "time": 2.0, "tracks": [1, 2], "look_alike": True}])
    unit = torch.eye(3)
    things = [{"track_id": MOST_CLASSES + i, "category_id": c} for i, c in ((1, 0), (2, 0), (3, 1))]
    for t, order in enumerate([(0, 1, 2), (0, 1, 2), (1, 0, 2), (1, 0, 2), (1, 0, 2)]):
        next_frame.add({"video_id": 0, "image_id": f"0/{t}"}, things, 5 * unit[list(order)])
    next_frame.add({"video_id": 1, "image_id": "1/0"}, things, unit[[1, 2, 0]])
    next_frame.add({"video_id": 1, "image_id": "1/1"}, things[:1], unit[[1]])
    # 4 steps of two things: wrong between frames 1 and 2, near the crossing like the step after it
    assert next_frame.shares() == {"nearest, all": 75.0, "nearest, look-alikes": 50.0}
    assert all(math.isnan(x) for x in NextFrame([]).shares().values())
    elsewhere = NextFrame([])
    for name in ("first", "second"):  # frames of other videos have any names, and nobody says where things cross
        elsewhere.add({"video_id": 0, "image_id": f"0/{name}"}, things, unit)
    assert elsewhere.shares()["nearest, all"] == 100 and math.isnan(elsewhere.shares()["nearest, look-alikes"])


def test_true_ids_of_segments(root):
    """Segments get the true id, whatever their class, and those that overlap no true thing enough get new ones."""
    name = register("video_panoptic", root)
    record = load_dataset(name)[NUM_FRAMES + 1]
    _, index = read_panoptic_segments(record, (SIZE, SIZE))
    true = record["segments_info"]
    segments = [{"id": i + 1, "isthing": x["isthing"], "category_id": 0, "score": 1.0} for i, x in enumerate(true)]
    things = [i for i, x in enumerate(true) if x["isthing"]]
    segment_map, lost = index + 1, np.argwhere(index == things[0])
    segment_map[tuple(lost[: math.ceil(0.75 * len(lost))].T)] = 0
    output = {"panoptic_seg": (torch.from_numpy(segment_map.astype(np.int32)), segments)}
    follower = TrackingTruth(lambda prediction: output, name)
    _, followed = follower.follow(record, None)["panoptic_seg"]
    assert len(things) > 2
    assert [followed[i]["track_id"] - MOST_CLASSES for i in things[1:]] == [true[i]["id"] for i in things[1:]]
    assert followed[things[0]]["track_id"] == 2 * MOST_CLASSES


def test_trackers_on_videos_without_a_list_of_crossings(root, tmp_path):
    """Frames with other names in another folder: the metrics stay, and only what is said of crossings is missing."""
    with open(os.path.join(root, "panoptic.json")) as f:
        content = json.load(f)
    for image in itertools.chain(*(x["images"] for x in content["videos"])):
        image["id"] = f"frame {image['id']}"
    for annotation in itertools.chain(*(x["annotations"] for x in content["annotations"])):
        annotation["image_id"] = f"frame {annotation['image_id']}"
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(os.path.join(root, "images"))
    moved = {"images": str(tmp_path / "images"), "panoptic_json": str(tmp_path / "panoptic.json")}
    options = {"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": SIZE, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0}
    options |= {"MODEL.KNET.NUM_THING_CLASSES": 4, "MODEL.KNET.NUM_STUFF_CLASSES": 3}
    cfg, model = tiny_config("panoptic", options), spread_scores(tiny_model("panoptic", options)).eval()
    cfg.DATALOADER.NUM_WORKERS = 0
    found = []
    for changes in ({}, moved):
        name = register("video_panoptic", root, **changes)
        found.append(evaluate_trackers(cfg, model, new_followers(cfg, model, ["iou"], [0.1], name), name))
    crossings, nothing = found[0]["IoU above 0.1"], found[1]["IoU above 0.1"]
    assert crossings.keys() - nothing.keys() == {"ids kept, look-alikes", "ids kept, two classes"}
    assert all(nothing[key] == crossings[key] for key in nothing) and nothing["STQ"] > 0


# ---- formats ---------------------------------------------------------------------------------------------------


def test_formats_agree(root):
    """The same images and masks in all three formats; a thing has one id in all frames of its video."""
    records = {kind: load_dataset(register(kind, root)) for kind in VIDEO_FORMATS}
    assert {len(x) for x in records.values()} == {NUM_VIDEOS * NUM_FRAMES}
    tracks = {kind: {} for kind in VIDEO_FORMATS}
    for youtube, panoptic, kitti in zip(*records.values()):
        assert youtube["file_name"] == panoptic["file_name"] == kitti["file_name"]
        (things, _), (panoptic_things, stuff), (kitti_things, kitti_stuff) = map(masks_of, (youtube, panoptic, kitti))
        assert {k: v.tolist() for k, v in stuff.items()} == {k: v.tolist() for k, v in kitti_stuff.items()}
        for kind, found in zip(VIDEO_FORMATS, (things, panoptic_things, kitti_things)):
            assert len(found) == len(things) > 0
            for (category, track), mask in found.items():
                tracks[kind].setdefault((youtube["video_id"], category, track), []).append(mask)
    lists = [sorted(np.concatenate(x).tobytes() for x in of_kind.values()) for of_kind in tracks.values()]
    assert lists[0] == lists[1] == lists[2] and 5 * NUM_VIDEOS < len(lists[0]) <= 7 * NUM_VIDEOS
    for of_kind in records.values():
        ids = [x["image_id"] for x in of_kind]
        assert len(set(ids)) == len(ids) and len([0 for _ in groupby(x["video_id"] for x in of_kind)]) == NUM_VIDEOS


def test_other_layouts_of_panoptic_videos(root, tmp_path):
    """COCO's layout with video ids, of which some frames have no annotation (Cityscapes-VPS); PNG names (VIPSeg)."""
    with open(os.path.join(root, "panoptic.json")) as f:
        content = json.load(f)
    nested = load_dataset(register("video_panoptic", root))
    images, annotations = [], []
    for video, found in zip(content["videos"], content["annotations"]):
        for image, annotation in zip(video["images"], found["annotations"]):
            names = [f"{video['video_id']}/{x['file_name']}" for x in (image, annotation)]
            key = f"{video['video_id']}_{image['id']}"
            images.append({**image, "id": key, "file_name": names[0], "video_id": video["video_id"]})
            annotations.append({**annotation, "image_id": key, "file_name": names[1]})
    flat = {"images": images, "annotations": annotations[::2], "categories": content["categories"]}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    records = load_dataset(register("video_panoptic", root, panoptic_json=str(tmp_path / "flat.json"), windows=[1, 2]))
    keys = ("file_name", "pan_seg_file_name", "segments_info", "video_id")
    assert [[x[k] for k in keys] for x in records] == [[x[k] for k in keys] for x in nested[::2]]
    for video in content["videos"]:
        video["images"] = [{**x, "file_name": x["id"] + ".png"} for x in video["images"]]
    (tmp_path / "png.json").write_text(json.dumps(content))
    records = load_dataset(register("video_panoptic", root, panoptic_json=str(tmp_path / "png.json")))
    assert [x["file_name"] for x in records] == [x["file_name"] for x in nested]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("youtube_vis", {"validation": 0.5}, "validation = 0.5: frames of one video"),
        ("video_panoptic", {"windows": [0, 1]}, r"windows = \[0, 1\]: use whole numbers above 0"),
        ("kitti_step", {"things": ["boat"]}, r"things = \['boat'\]: use one or more of classes"),
        ("kitti_step", {"classes": ["a", "a"], "things": ["a"]}, "classes = .*: use up to 255 different names"),
        ("kitti_step", {"things": "boat"}, "things = 'boat': use a value of type list or tuple"),
    ],
)
def test_wrong_entries(root, kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        register(kind, root, **changes)


def _negative_height(content):
    content["videos"][0]["height"] = -4
    for annotation in content["annotations"]:
        annotation["segmentations"] = [x and [[1, 1, 9, 1, 9, 9]] for x in annotation["segmentations"]]


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("youtube_vis", lambda x: x["annotations"][3].pop("segmentations"), "lacks 'segmentations'"),
        ("youtube_vis", lambda x: x["annotations"][3]["segmentations"].pop(), "has 5 segmentations, but its video 6"),
        ("youtube_vis", lambda x: x["annotations"][0].update(category_id=99), "lacks 99"),
        ("youtube_vis", lambda x: x["videos"][0].update(height=9), "its size is .*, but the image has"),
        ("youtube_vis", lambda x: x.update(videos=3), "not iterable"),
        ("youtube_vis", lambda x: x["annotations"][0].update(video_id=77), "video_id 77, which no video has"),
        ("youtube_vis", lambda x: x["categories"].append(x["categories"][0]), "the category id .* occurs twice"),
        ("youtube_vis", lambda x: x["annotations"].append(x["annotations"][0]), "annotation id .* occurs twice"),
        ("youtube_vis", _negative_height, "can't convert negative"),
        (
            "youtube_vis",
            lambda x: x["videos"][1].update(id=x["videos"][0]["id"]),
            "the video id .* occurs twice",
        ),
        ("video_panoptic", lambda x: x["annotations"].pop(), "lacks '002'"),
        ("video_panoptic", lambda x: x["categories"][0].pop("isthing"), "lacks 'isthing'"),
    ],
)
def test_wrong_files(root, tmp_path, kind, edit, message):
    key, name = {"youtube_vis": ("json", "instances.json"), "video_panoptic": ("panoptic_json", "panoptic.json")}[kind]
    path = tmp_path / "wrong.json"
    path.write_text(Path(root, name).read_text())
    edit_json(str(path), edit)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(register(kind, root, **{key: str(path)}))
    assert str(path) in str(error.value)


def test_a_split_keeps_videos_whole(root):
    entry = custom_entry("kitti_step", root, validation=0.34, group_by="folder")
    register_custom_datasets(data_cfg("panoptic", custom=(entry,), resolve=False))
    parts = [{x["video_id"] for x in load_dataset(f"{entry['name']}_{part}")} for part in ("train", "val")]
    assert len(parts[0]) == NUM_VIDEOS - 1 and len(parts[1]) == 1 and not parts[0] & parts[1]


def test_a_file_that_is_no_json(root, tmp_path):
    text = Path(root, "instances.json").read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / f"{encoding}.json").write_text(text, encoding)
        same = load_dataset(register("youtube_vis", root, json=str(tmp_path / f"{encoding}.json")))
        assert same == load_dataset(register("youtube_vis", root))
    (tmp_path / "cut.json").write_text('{"videos": [')
    with pytest.raises(DataError, match="cut.json: is not valid JSON"):
        load_dataset(register("youtube_vis", root, json=str(tmp_path / "cut.json")))


def test_wrong_pngs_of_kitti_step(root, tmp_path):
    for folder, classes, message in (("kitti_step", ["a", "b"], "has the class"), ("gone", list("abcdefg"), "gone")):
        name = register("kitti_step", root, labels=os.path.join(root, folder), classes=classes, things=["a"])
        with pytest.raises(DataError, match=message):
            load_dataset(name)


# ---- evaluators ------------------------------------------------------------------------------------------------


def perfect(record, kind, metadata, change=lambda track: track):
    """What a model would give that is always right; ``change``: track -> the id that it gives."""
    things, stuff = masks_of(record)
    ids = sorted(metadata.thing_dataset_id_to_contiguous_id.values())
    if kind == "youtube_vis":
        instances = Instances((SIZE, SIZE), pred_classes=torch.tensor([ids.index(c) for c, _ in things]))
        instances.pred_masks = torch.from_numpy(np.array(list(things.values())).reshape(-1, SIZE, SIZE))
        instances.scores = torch.ones(len(things))
        instances.track_ids = torch.tensor([change(track) for _, track in things])
        return {"instances": instances}
    segment_map, segments = np.zeros((SIZE, SIZE), np.int32), []
    found = [(c, True, change(track), mask) for (c, track), mask in things.items()]
    found += [(c, False, 10**6 + c, mask) for c, mask in stuff.items()]
    for i, (category, isthing, track, mask) in enumerate(found, 1):
        segment_map[mask] = i
        segments.append({"id": i, "category_id": category, "isthing": isthing, "track_id": track, "score": 1.0})
    return {"panoptic_seg": (torch.from_numpy(segment_map), segments)}


def evaluate(name, kind, change=lambda track: track, records=None):
    cfg = tiny_config("instance" if kind == "youtube_vis" else "panoptic")
    (evaluator,) = build_evaluators(cfg, name)
    evaluator.reset()
    for record in records or load_dataset(name):
        evaluator.process([record], [perfect(record, kind, MetadataCatalog.get(name), change)])
    return evaluator.evaluate()


@pytest.mark.parametrize("kind", VIDEO_FORMATS)
def test_a_perfect_prediction_scores_100(root, kind):
    """With any ids; ids that change in the middle of a video lower what tracks are measured by, and nothing else."""
    name = register(kind, root, **({} if kind == "youtube_vis" else {"windows": (1, 2)}))
    results = evaluate(name, kind, lambda track: 3 * track + 7)
    assert results["video_instance"]["AP"] == pytest.approx(100) == results["video_instance"]["AR10"]
    count = iter(range(10**6))
    worse = evaluate(name, kind, lambda track: next(count))
    assert worse["video_instance"]["AP"] < 20
    if kind == "youtube_vis":
        assert "video_panoptic" not in results
        return
    assert set(results["video_panoptic"].values()) == {100.0}
    found = worse["video_panoptic"]
    assert found["SQ"] == found["VPQ@1"] == found["VPQ_st"] == 100 and found["AQ"] < 40 and found["VPQ@2_th"] < 40
    assert found["STQ"] == pytest.approx(math.sqrt(found["AQ"] * found["SQ"]))


def test_crowds_and_void_of_panoptic_videos(root, tmp_path):
    """Without the first thing's label, or with a crowd in its place, nothing is wrong with a model that sees it."""
    with open(os.path.join(root, "panoptic.json")) as f:
        content = json.load(f)
    for edit in ("crowd", "void"):
        for video in content["annotations"]:
            for frame in video["annotations"]:
                for x in frame["segments_info"]:
                    x["iscrowd"] = int(x["id"] == 1 and edit == "crowd")
        path = tmp_path / f"{edit}.json"
        path.write_text(json.dumps(content))
        name = register("video_panoptic", root, panoptic_json=str(path), windows=(1, 2))
        if edit == "crowd":
            results = evaluate(name, "video_panoptic")
            assert results["video_panoptic"]["VPQ"] == results["video_panoptic"]["AQ"] == 100
            assert results["video_instance"]["AP"] == pytest.approx(100)


def test_every_frame_must_be_evaluated(root):
    name = register("youtube_vis", root)
    with pytest.raises(DataError, match=f"{NUM_FRAMES} of {NUM_VIDEOS * NUM_FRAMES} frames were evaluated"):
        evaluate(name, "youtube_vis", records=load_dataset(name)[:NUM_FRAMES])


@pytest.mark.parametrize("make", [VideoPanopticEvaluator, lambda name: VideoInstanceEvaluator(name, "panoptic_seg")])
def test_processes_gather_whole_videos(root, make, monkeypatch):
    """Two processes with the frames of their samplers give the results of one, to the last bit."""
    name = register("video_panoptic", root, windows=(1, 2))
    records, metadata = load_dataset(name), MetadataCatalog.get(name)
    count = iter(range(10**6))
    changed = {
        x["image_id"]: perfect(x, "video_panoptic", metadata, lambda track: track if next(count) % 3 else 50)
        for x in records
    }

    def run(indices):
        evaluator = make(name)
        evaluator.reset()
        for i in indices:
            evaluator.process([records[i]], [changed[records[i]["image_id"]]])
        return evaluator

    expected = run(range(len(records))).evaluate()
    samplers = [list(VideoSampler(records, rank, 2)) for rank in range(2)]
    assert sorted(samplers[0] + samplers[1]) == list(range(len(records))) and min(map(len, samplers)) == NUM_FRAMES
    parts = [run(indices) for indices in samplers]
    gathered = [(part._videos, part._num_frames) for part in parts]
    monkeypatch.setattr(evaluators_module.comm, "gather", lambda x: gathered)
    found = parts[0].evaluate()
    np.testing.assert_equal(found, expected)
    assert 5 < next(iter(found[parts[0].name].values())) < 95


def test_samplers_divide_videos_evenly():
    lengths = [5, 1, 9, 3, 3]
    records = [{"video_id": i} for i, length in enumerate(lengths) for _ in range(length)]
    shares = [list(VideoSampler(records, rank, 2)) for rank in range(2)]
    assert sorted(map(len, shares)) == [10, 11]
    for share in shares:
        of_video = [records[i]["video_id"] for i in share]
        assert share == sorted(share) and all(of_video.count(v) == lengths[v] for v in of_video)
    assert list(VideoSampler(records[:5], 1, 2)) == []


# ---- a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "kind"), [("instance", "youtube_vis"), ("panoptic", "kitti_step")])
def test_training_and_evaluation(root, task, kind):
    """Frames are training images; the evaluation follows objects, and its metric decides on the best checkpoint."""
    name = register(kind, root)
    options = {"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": SIZE, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0}
    options |= {"MODEL.KNET.NUM_THING_CLASSES": 4, "MODEL.KNET.NUM_STUFF_CLASSES": 3 if task == "panoptic" else 0}
    cfg = tiny_config(task, options)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    resolve_classes(cfg)
    example = build_mapper(cfg, True)(load_dataset(name)[0])
    assert len(example["instances"]) and ("sem_seg" in example) is (task == "panoptic")
    frames = [x[0]["file_name"] for x in build_test_loader(cfg, name)]
    assert frames == sorted(frames) and len(frames) == NUM_VIDEOS * NUM_FRAMES
    model = spread_scores(tiny_model(task, options))
    assert all(loss.isfinite() for loss in model(next(iter(build_train_loader(cfg)))).values())
    results = Trainer.test(cfg, model)
    part, _, key = best_metric(cfg).partition("/")
    assert (part, key) == (("video_instance", "AP") if task == "instance" else ("video_panoptic", "STQ"))
    assert 0 <= results[part][key] < 60 and model.training
