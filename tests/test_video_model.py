"""Models with a memory: whose kernel a segment has, ids in every output, and the video of a predictor."""

import json

import numpy as np
import pytest
import torch
from helpers import make_example, spread_scores, tiny_config, tiny_model

from knet_d2.data.classes import ClassTable
from knet_d2.errors import ConfigError, DataError
from knet_d2.inference.batches import read_ahead
from knet_d2.inference.sinks import TrackFile
from knet_d2.inference.sources import Frame
from knet_d2.modeling.association import group_embeddings
from knet_d2.results.outputs import main_prediction, predictions_of
from knet_d2.results.prediction import Prediction
from knet_d2.results.segment import Segment
from knet_d2.results.video import VideoDrawer, track_color
from knet_d2.video.model import TrackingKNet, tracker_options

SHARP = {  # kernels of an untrained model are alike, but equal in equal frames
    "MODEL.KNET.VIDEO.TEMPERATURE": 1e-5,
    "MODEL.KNET.TEST.THING_SCORE_THRESHOLD": 0.0,
    "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0,
}
OUTPUTS = {"instance": "instances", "panoptic": "panoptic_seg"}
CORRECTING = {"MODEL.KNET.UPDATE_HEAD.RESIDUAL_MASKS": True}


def build(task, options=None, seed=1):
    options = {**SHARP, **(options or {})}
    model = spread_scores(tiny_model(task, options, seed=seed), seed=seed).eval()
    return model, TrackingKNet(tiny_config(task, options), model)


def frame(seed=0, video_id=0):
    return {"image": make_example((64, 64), 3, seed=seed)["image"], "video_id": video_id}


@torch.no_grad()
def ids_of(tracking, *frames):
    """Per frame {(class, track id)} of its segments."""
    found = []
    for result in tracking(list(frames)):
        if "instances" in result:
            instances = result["instances"]
            found.append(set(zip(instances.pred_classes.tolist(), instances.track_ids.tolist())))
        else:
            found.append({(x["category_id"], x["track_id"]) for x in result["panoptic_seg"][1]})
    return found


@torch.no_grad()
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_segments_come_with_their_kernels(task):
    """The kernel of a segment is the one whose class score and mask the segment has."""
    model, _ = build(task)
    example = make_example((64, 64), 3)
    prediction = model([example], do_postprocess=False)[0]
    result, kernels = model.postprocessor.with_embeddings(OUTPUTS[task], prediction)
    network = model.network(model.preprocess_image([example]).tensor).stages[-1]
    torch.testing.assert_close(prediction.embeddings, network.kernels[0], rtol=0, atol=0)
    if task == "instance":
        found = list(zip(result.pred_classes.tolist(), result.scores.tolist()))
    else:
        ids = model.postprocessor.category_ids
        found = [(ids.index(x["category_id"]), x["score"]) for x in result[1]]
    assert len(found) == len(kernels) > 1
    for (label, score), kernel in zip(found, kernels):
        row = (network.kernels[0] == kernel).all(dim=1).nonzero().item()
        assert network.class_logits[0, row, label].sigmoid().item() == pytest.approx(score, abs=1e-6)
    # The rest is the model's own result
    plain = model([example])[0][OUTPUTS[task]]
    if task == "instance":
        assert torch.equal(plain.pred_masks, result.pred_masks) and torch.equal(plain.scores, result.scores)
    else:
        assert torch.equal(plain[0], result[0]) and plain[1] == result[1]


def test_group_embeddings():
    """Two objects with the features (100, 1) and (100, -1): opposite without what they share, not alike (cosine 1)."""
    feature = torch.tensor([[[[100.0, 100.0, 100.0]], [[1.0, -1.0, -1.0]]]])
    masks = torch.tensor([[[[1.0, -1.0, -1.0]], [[-1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]]]])
    expected = torch.tensor([[[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]]])  # the third kernel is a fixed one
    assert torch.equal(group_embeddings(feature, masks, 2), expected)


@torch.no_grad()
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_objects_are_followed_by_their_pixels_if_kernels_correct_masks(task):
    model, _ = build(task, CORRECTING)
    images = model.preprocess_image([make_example((64, 64), 3)]).tensor
    output = model.network(images)
    expected = group_embeddings(output.state.feature, output.stages[-1].mask_logits, model.bank.num_matched)
    found = model([make_example((64, 64), 3)], do_postprocess=False)[0]
    assert torch.equal(found.embeddings, expected[0]) and torch.equal(found.kernels, output.stages[-1].kernels[0])
    assert model.train().network(images).embeddings is None


@pytest.mark.parametrize("options", [{}, CORRECTING])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_equal_frames_have_equal_ids(task, options):
    _, tracking = build(task, options)
    first, second, third = ids_of(tracking, frame(), frame(), frame())
    assert first == second == third and len(first) > 1
    assert len({track_id for _, track_id in first}) == len(first)


def test_ids_of_stuff_are_those_of_classes():
    """2 stuff classes have the ids 1 and 2, things begin with 3; another video has a new memory."""
    model, tracking = build("panoptic", {"MODEL.KNET.VIDEO.MIN_COSINE": 1.0})  # nothing is found again
    frames = ids_of(tracking, frame(), frame(), frame(video_id=1))
    stuff = [{x for x in found if x[0] >= model.bank.num_things} for found in frames]
    things = [found - of_stuff for found, of_stuff in zip(frames, stuff)]
    assert stuff[0] == stuff[1] == stuff[2] and stuff[0] <= {(3, 1), (4, 2)} and stuff[0]
    assert min(i for _, i in things[0]) == 3 and things[0] == things[2]
    assert not {i for _, i in things[0]} & {i for _, i in things[1]}


@torch.no_grad()
def test_instances_own_their_pixels():
    model, tracking = build("instance", {"MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.5})
    plain, found = model([frame()])[0]["instances"], tracking([frame()])[0]["instances"]
    assert plain.pred_masks.sum(dim=0).max() > 1 and found.pred_masks.sum(dim=0).max() == 1
    assert len(found) < len(plain) and found.scores.min() > 0.35
    boxes = found.pred_boxes.tensor
    for box, mask in zip(boxes.tolist(), found.pred_masks):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@torch.no_grad()
def test_things_without_a_track_are_left_out():
    """No score is above 1, so nothing starts a track: only stuff is left, and the pixels of things are void."""
    model, tracking = build("panoptic", {"MODEL.KNET.VIDEO.NEW_TRACK_SCORE": 1.0})
    segment_map, segments = tracking([frame()])[0]["panoptic_seg"]
    whole_map, whole = model([frame()])[0]["panoptic_seg"]
    stuff = [x["id"] for x in whole if not x["isthing"]]
    assert [x["id"] for x in segments] == stuff and len(whole) > len(stuff)
    assert torch.equal(segment_map, torch.where(torch.isin(whole_map, torch.tensor(stuff)), whole_map, 0))


@torch.no_grad()
def test_images_and_semantic_maps_stay_as_they_are():
    model, tracking = build("panoptic", {"MODEL.KNET.TEST.OUTPUTS": ["panoptic_seg", "sem_seg"]})
    image = {"image": frame()["image"]}
    for a, b in zip(model([image])[0]["panoptic_seg"], tracking([image])[0]["panoptic_seg"]):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(model([image])[0]["sem_seg"], tracking([frame()])[0]["sem_seg"])
    semantic = tiny_model("semantic").eval()
    followed = TrackingKNet(tiny_config("semantic"), semantic)([frame()])[0]
    assert torch.equal(semantic([image])[0]["sem_seg"], followed["sem_seg"])


def test_memory_bridges_frames():
    """A frame of another scene between two equal ones; with a memory of 0 frames everything is new."""
    for memory, same in ((1, True), (0, False)):
        options = {"MODEL.KNET.VIDEO.MEMORY": memory, "MODEL.KNET.VIDEO.MIN_COSINE": 1 - 1e-9}
        first, _, third = ids_of(build("instance", options)[1], frame(0), frame(1), frame(0))
        assert (first == third) is same and {x[0] for x in first} == {x[0] for x in third}


# Each with a value at which the ids, or the segments that have one, become others
VIDEO_OPTIONS = {
    "MIN_SCORE": 1.0,
    "NEW_TRACK_SCORE": 1.0,
    "MATCH_THRESHOLD": 1.0,
    "MIN_COSINE": 1.0,
    "TEMPERATURE": 1e3,
}


@pytest.mark.parametrize(("key", "value"), VIDEO_OPTIONS.items())
def test_options_have_an_effect(key, value):
    frames = frame(), frame()
    assert ids_of(build("instance")[1], *frames) != ids_of(
        build("instance", {f"MODEL.KNET.VIDEO.{key}": value})[1], *frames
    )


def test_every_option_reaches_the_tracker():
    options = {"MIN_SCORE": 0.1, "NEW_TRACK_SCORE": 0.2, "MATCH_THRESHOLD": 0.3, "MIN_COSINE": 0.4}
    options |= {"TEMPERATURE": 0.6, "MOMENTUM": 0.7, "MEMORY": 8}
    cfg = tiny_config("panoptic", {f"MODEL.KNET.VIDEO.{key}": value for key, value in options.items()})
    learned = {"EMBEDDING", "LINKING", "FUSING", "EMBEDDING_DIM", "REFERENCE_RANGE", "CONTRAST_WEIGHT", "COSINE_WEIGHT"}
    assert set(options) == set(cfg.MODEL.KNET.VIDEO) - learned  # those of training: test_video_training.py
    cfg.MODEL.KNET.TEST.OVERLAP_THRESHOLD = 0.9
    assert tracker_options(cfg) == (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 8, 0.9)


@pytest.mark.parametrize(
    ("key", "value"),
    [("MIN_SCORE", -0.1), ("MOMENTUM", 1.5), ("MIN_COSINE", 2.0), ("TEMPERATURE", 0.0), ("MEMORY", -1)],
)
def test_bad_options_are_errors_that_name_the_key(key, value):
    with pytest.raises(ConfigError, match=f"MODEL.KNET.VIDEO.{key} = {value}: use "):
        build("instance", {f"MODEL.KNET.VIDEO.{key}": value})


def test_no_tracking_of_several_views():
    with pytest.raises(ConfigError, match="TEST.AUG.ENABLED"):
        build("instance", {"TEST.AUG.ENABLED": True})


# ---- reading, writing, drawing ---------------------------------------------------------------------------------


def test_frames_are_read_ahead_and_errors_arrive():
    read = []

    def frames():
        for i in range(5):
            read.append(i)
            yield i
        raise DataError("frame 5 is broken")

    ahead, found = read_ahead(frames(), 2), []
    with pytest.raises(DataError, match="frame 5"):
        for i in ahead:
            found.append(i)
    assert found == read == list(range(5))
    read.clear()
    ahead = read_ahead(frames(), 2)
    next(ahead)
    ahead.close()
    assert read == [0, 1, 2][: len(read)]  # no more than were asked for; those not begun are cancelled
    assert read


def square(y, x, side, label, score, track_id):
    return Segment(label, score, np.ones((side, side), bool), (y, x), (40, 50), track_id)


def table():
    return ClassTable(["cat", "sky"], [0, 1], [(255, 0, 0), (0, 0, 255)], 1, [7, 9])


def video():
    """A thing moves right and is hidden in the second frame; another one comes; stuff has an id, but is no track."""
    sky = square(20, 0, 9, 1, 0.5, 1)
    segments = [
        [square(2, 5, 16, 0, 0.9, 2), sky],
        [sky],
        [square(2, 29, 16, 0, 0.6, 2), square(25, 25, 8, 0, 0.5, 3), sky],
    ]
    return [Prediction((40, 50), found, table()) for found in segments]


def test_tracks_are_written(tmp_path):
    sink = TrackFile(str(tmp_path / "tracks.json"))
    for i, prediction in enumerate(video()):
        sink.write(Frame(f"video#{i}", None), {"instances": prediction})
    sink.close()
    first, second = json.loads((tmp_path / "tracks.json").read_text())
    assert (first["video_id"], first["category_id"], first["score"]) == (1, 7, pytest.approx(0.75))
    expected = [prediction.segments[0].rle() for prediction in video()]
    assert first["segmentations"] == [expected[0], None, expected[2]]
    assert second["segmentations"] == [None, None, video()[2].segments[1].rle()]
    with pytest.raises(OSError):
        TrackFile(str(tmp_path / "tracks.json" / "other.json"))
    TrackFile(str(tmp_path / "new" / "empty.json")).close()
    assert json.loads((tmp_path / "new" / "empty.json").read_text()) == []


def test_colors_and_paths_stay():
    """A track has its colour in every frame, stuff that of its class; a path ends when it is older than the trail."""
    drawer, black = VideoDrawer(table(), trail=2), np.zeros((40, 50, 3), np.uint8)
    drawn = [drawer.draw(black, prediction) for prediction in video()]
    half = track_color(2) // 2
    assert (drawn[0][16, 7] == half).all() and (drawn[2][16, 31] == half).all()
    assert (drawn[0][28, 1] == (0, 0, 127)).all() and not (track_color(2) == track_color(3)).all()
    assert not drawn[2][9, 22].any()  # no path from frame 0 to frame 2: it is older than 2 frames
    longer = VideoDrawer(table(), trail=3)
    drawn = [longer.draw(black, prediction) for prediction in video()]
    assert (drawn[2][9, 22] == track_color(2)).all()
    for _ in range(3):
        longer.draw(black, video()[1])
    assert not longer._paths
    plain = VideoDrawer(table())
    assert not [plain.draw(black, prediction) for prediction in video()][2][9, 22].any()


def test_outputs_have_track_ids():
    classes = ClassTable([*"abcde"], [*range(5)], [(0, 0, 0)] * 5, 3, None)
    for task in ("instance", "panoptic"):
        with torch.no_grad():
            result = build(task)[1]([frame()])[0]
        (prediction,) = predictions_of(result, classes).values()
        assert len({x.track_id for x in prediction.segments}) == len(prediction.segments) > 0
        assert all(x.track_id > 0 for x in prediction.segments)
        image = main_prediction(build(task)[0]([frame()])[0], classes)
        assert {x.track_id for x in image.segments} == {None}
