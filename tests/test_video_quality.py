"""STQ, VPQ and the AP of tracks: closed forms, and a second implementation pixel by pixel on random label videos."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from knet_d2.video.precision import TrackMasks, VideoTracks, average_precision
from knet_d2.video.quality import (
    VOID,
    LabelMaps,
    PanopticQuality,
    TrackingQuality,
    overlap_table,
    summarize_panoptic,
    summarize_tracking,
)

THINGS, NUM_CLASSES, WINDOWS = (0, 1, 2), 5, (1, 2, 3, 4)


def maps(*pixels):
    """A frame from (class, id) of each pixel in a row."""
    classes, ids = np.array(pixels).reshape(-1, 2).T
    return LabelMaps(classes[None], ids[None])


def tracking(*videos, things=THINGS, num_classes=NUM_CLASSES):
    parts = []
    for video in videos:
        quality = TrackingQuality(num_classes, things)
        for true, predicted in video:
            quality.add(overlap_table(true, predicted))
        parts.append((quality.confusion, *quality.association()))
    return summarize_tracking(parts)


def panoptic(*videos, windows=WINDOWS, things=THINGS, num_classes=NUM_CLASSES):
    parts = []
    for video in videos:
        quality = PanopticQuality(num_classes, things, windows)
        for true, predicted in video:
            quality.add(overlap_table(true, predicted))
        parts.append(quality.counts)
    return summarize_panoptic(parts, things, windows)


# ---- closed forms ----------------------------------------------------------------------------------------------


def test_a_track_whose_class_flips_is_two_tracks():
    """2 x 10 pixels, class wrong in the second frame: each half has TPA 10 and IoU 1/2, so AQ is 0.5, not 1."""
    true = maps(*[(0, 1)] * 10)
    found = tracking([(true, true), (true, maps(*[(1, 1)] * 10))])
    assert found["AQ"] == pytest.approx(0.5, abs=1e-15)
    assert found["SQ"] == pytest.approx((10 / 20 + 0) / 2)  # class 0: half; class 1 occurs in the prediction only
    assert found["STQ"] == pytest.approx(math.sqrt(0.125))


def test_void_counts_in_the_size_of_a_prediction_and_crowds_do_not():
    """10 pixels of a car and 10 void ones, all predicted as the car: AQ 0.5; with a crowd in place of void 1."""
    car = [(0, 1)] * 10
    assert tracking([(maps(*car, *[(VOID, 0)] * 10), maps(*car, *car))])["AQ"] == 0.5
    assert tracking([(maps(*car, *[(0, 0)] * 10), maps(*car, *car))])["AQ"] == 1.0


def test_pixels_predicted_as_void_add_a_class():
    """Two classes, one pixel of ten void: (1 + 0.9 + 0) / 3, not 0.95. Void in the ground truth is not counted."""
    true, predicted = [(3, 9)] * 10 + [(4, 8)] * 10, [(3, 9)] * 10 + [(4, 8)] * 9 + [(VOID, 0)]
    assert tracking([(maps(*true), maps(*predicted))])["SQ"] == pytest.approx(1.9 / 3, abs=1e-15)
    assert tracking([(maps(*true, (VOID, 0)), maps(*predicted, (VOID, 0)))])["SQ"] == pytest.approx(1.9 / 3, abs=1e-15)


def test_association_is_the_mean_over_all_tracks_of_the_set():
    """One track at 1 and three at 0: 0.25. Without any track AQ is 0."""
    first, three = maps((0, 1)), maps((0, 1), (0, 2), (1, 3))
    assert tracking([(first, first)], [(three, maps(*[(3, 9)] * 3))])["AQ"] == 0.25
    stuff = maps((3, 9))
    assert tracking([(stuff, stuff)]) == {"STQ": 0.0, "AQ": 0.0, "SQ": 1.0}


def test_panoptic_windows():
    """A perfect prediction is 1 at every k. Of an id that changes in the middle of 4 frames, k = 1 says nothing."""
    video = [(maps(*[(0, 5)] * 4, *[(3, 9)] * 4),) * 2] * 4
    assert {v for k, v in panoptic(video).items()} == {1.0}
    changed = [
        (true, predicted if i < 2 else maps(*[(0, 6)] * 4, *[(3, 9)] * 4)) for i, (true, predicted) in enumerate(video)
    ]
    found = panoptic(changed)
    assert found["VPQ@1_th"] == 1.0 and found["VPQ_st"] == 1.0
    # k = 2: windows 0-1 and 2-3 are right; in 1-2 both halves have IoU 1/2, not above it: 1 missed and 2 false
    assert found["VPQ@2_th"] == pytest.approx(2 / (2 + (1 + 2) / 2))
    # k = 3: in both windows one half has IoU 2/3, the other one is false; k = 4: halves, as above
    assert found["VPQ@3_th"] == pytest.approx(2 * (2 / 3) / (2 + 2 / 2))
    assert found["VPQ@4_th"] == 0.0
    assert found["VPQ_th"] == pytest.approx((1 + 4 / 7 + 4 / 9 + 0) / 4)
    assert found["VPQ"] == pytest.approx((found["VPQ_th"] + 1) / 2)


def test_short_videos_have_no_long_windows():
    """3 frames: two windows at k = 2, none at k = 4, which is left out of the mean."""
    video = [(maps((0, 5)),) * 2] * 3
    found = panoptic(video)
    assert math.isnan(found["VPQ@4"]) and found["VPQ"] == 1.0
    quality = PanopticQuality(NUM_CLASSES, THINGS, WINDOWS)
    for true, predicted in video:
        quality.add(overlap_table(true, predicted))
    assert quality.counts[:, 0, 1].tolist() == [3, 2, 1, 0]


def test_predictions_on_void_and_crowds_are_not_false():
    true = maps(*[(0, 5)] * 4, *[(VOID, 0)] * 3, *[(1, 0)] * 3, *[(3, 9)] * 4)
    predicted = maps(*[(0, 1)] * 4, *[(0, 2)] * 3, *[(1, 3)] * 3, *[(3, 4)] * 4)
    assert panoptic([(true, predicted)], windows=(1,))["VPQ"] == 1.0
    wrong = maps(*[(0, 1)] * 4, *[(0, 2)] * 3, *[(2, 3)] * 3, *[(3, 4)] * 4)  # the crowd is of another class
    assert panoptic([(true, wrong)], windows=(1,))["VPQ"] == pytest.approx(2 / 3)


def tracks(*objects, size=10):
    """Objects of a frame from (class, id, pixels[, score[, crowd]])."""
    objects = [(*x, *(1.0, False)[len(x) - 3 :]) for x in objects]
    masks = np.zeros((len(objects), 1, size), bool)
    for mask, x in zip(masks, objects):
        mask[0, : x[2]] = True
    return TrackMasks(
        [x[1] for x in objects], [x[0] for x in objects], masks, *([x[i] for x in objects] for i in (3, 4))
    )


def precision(*videos, num_classes=3):
    found = []
    for video in videos:
        quality = VideoTracks()
        for true, predicted in video:
            quality.add(true, predicted)
        found.append(quality)
    return average_precision(found, num_classes)


def test_iou_of_tracks_is_of_whole_videos():
    """30 pixels right, then 10 missed: IoU 0.75, not 0.5: found at the thresholds 0.5 to 0.75, 6 of 10."""
    video = [(tracks((0, 4, 30), size=40), tracks((0, 0, 30), size=40)), (tracks((0, 4, 10), size=40), tracks(size=40))]
    metrics, of_class = precision(video)
    assert (
        metrics["AP"] == pytest.approx(0.6)
        and metrics["AP75"] == pytest.approx(1.0)
        and metrics["AR1"] == pytest.approx(0.6)
    )
    assert of_class[0] == pytest.approx(0.6) and math.isnan(of_class[1])
    assert metrics["APs"] == pytest.approx(0.6) and math.isnan(metrics["APl"])


def test_sizes_are_mean_areas_of_frames_with_area():
    """128 squared = 16,384 divides small from medium: 3 frames with 20,000 pixels and 7 empty ones are medium."""
    seen = (tracks((0, 1, 20000), size=40000),) * 2
    hidden = (tracks((0, 1, 0), size=40000),) * 2
    metrics, _ = precision([seen] * 3 + [hidden] * 7)
    assert metrics["APm"] == pytest.approx(1.0) and math.isnan(metrics["APs"])


def test_scores_and_crowds_of_tracks():
    """A false track with the higher mean score halves the precision; on a crowd it does not count."""
    right, false = (0, 1, 4, 0.6), (0, 2, 10, 0.7)
    video = [(tracks((0, 1, 4)), tracks(right, false))]
    assert precision(video)[0]["AP50"] == pytest.approx(0.5)
    lower = [*video, (tracks(), tracks((0, 2, 10, 0.1)))]  # its mean is 0.4 now
    assert precision(lower)[0]["AP50"] == pytest.approx(1.0)
    crowd = [(tracks((0, 1, 4), (0, 3, 10, 1.0, True)), tracks(right, false))]
    assert precision(crowd)[0]["AP50"] == pytest.approx(1.0)


# ---- a second implementation -----------------------------------------------------------------------------------


def random_video(rng):
    """Frames of (true, predicted) with empty frames, void, crowds, class flips, and ids that return.

    Ids are unique, but for crowds, of which each class has one at most.
    """
    num_frames, size = int(rng.integers(1, 7)), (int(rng.integers(2, 6)), int(rng.integers(2, 7)))
    true_segments = [(int(rng.integers(3)), i) for i in range(1, int(rng.integers(2, 6)))]
    true_segments += [(c, 0) for c in THINGS if rng.random() < 0.2] + [(3, 21), (4, 22), (VOID, 0)]
    classes_of = {number: c for c, number in true_segments if number}
    frames = []
    for _ in range(num_frames):
        seen = [x for x in true_segments if rng.random() < 0.7] or [(VOID, 0)]
        true = np.array(seen)[np.sort(rng.integers(len(seen), size=size), axis=1)]
        # Most predictions are right; ids may be exchanged, and classes wrong in a frame
        predicted = true.copy()
        renamed = {i: int(rng.integers(1, 7)) if rng.random() < 0.3 else i for i in range(30)}
        flipped = {i: int(rng.integers(5)) if rng.random() < 0.15 else None for i in range(30)}
        for place in np.ndindex(size):
            c, number = predicted[place]
            if rng.random() < 0.15:
                c, number = true[int(rng.integers(size[0])), int(rng.integers(size[1]))]
            if number == 0 and c != VOID:
                number = 10 + c  # a crowd is predicted as an object
            number = renamed[number] if c != VOID and number < 20 else number
            c = classes_of.get(number, c) if c != VOID else c
            c = c if flipped[number] is None or c == VOID else flipped[number]
            predicted[place] = (c, number) if rng.random() > 0.05 else (VOID, 0)
        if rng.random() < 0.1:
            predicted[:] = (VOID, 0)
        # One class per id and frame
        first = {}
        for place in np.ndindex(size):
            c, number = predicted[place]
            if c != VOID:
                predicted[place] = first.setdefault(number, c), number
        frames.append(tuple(LabelMaps(x[..., 0], x[..., 1]) for x in (true, predicted)))
    return frames


def pixels(video):
    """(frame, true class, true id, predicted class, predicted id) of every pixel."""
    for t, (true, predicted) in enumerate(video):
        columns = (true.classes, true.ids, predicted.classes, predicted.ids)
        for values in zip(*(x.reshape(-1).tolist() for x in columns)):
            yield t, *values


def slow_tracking(videos):
    total, tracks, confusion = 0.0, 0, Counter()
    for video in videos:
        true, predicted = defaultdict(set), defaultdict(set)
        for place, (_, c, i, pc, pi) in enumerate(pixels(video)):
            is_crowd = c in THINGS and i == 0
            if c in THINGS and not is_crowd:
                true[c, i].add(place)
            if pc in THINGS and not is_crowd:
                predicted[pc, pi].add(place)
            if c != VOID:
                confusion[c, pc] += 1
        tracks += len(true)
        for g in true.values():
            total += sum(len(g & p) * len(g & p) / len(g | p) for p in predicted.values()) / len(g)
    ious = []
    for k in (*range(NUM_CLASSES), VOID):
        union = sum(n for (c, pc), n in confusion.items() if k in (c, pc))
        if union:
            ious.append(confusion[k, k] / union)
    quality = total / tracks if tracks else 0.0
    return quality, sum(ious) / len(ious) if ious else math.nan


def slow_panoptic(videos, k):
    counts = {c: [0.0, 0, 0, 0] for c in range(NUM_CLASSES)}
    for video in videos:
        for start in range(len(video) - k + 1):
            sets, classes = ({}, {}), ({}, {})
            for place, (_, c, i, pc, pi) in enumerate(pixels(video[start : start + k])):
                crowd = c in THINGS and i == 0
                for side, key, of_class in ((0, ("crowd", c) if crowd else i, c), (1, pi, pc)):
                    if of_class != VOID:
                        sets[side].setdefault(key, set()).add(place)
                        classes[side].setdefault(key, of_class)
            void = {place for place, x in enumerate(pixels(video[start : start + k])) if x[1] == VOID}
            matched = set()
            for g, true in sets[0].items():
                if isinstance(g, tuple):
                    continue
                hits = [
                    (p, len(true & found) / len((true | found) - (void & found)))
                    for p, found in sets[1].items()
                    if classes[1][p] == classes[0][g]
                ]
                hits = [(p, iou) for p, iou in hits if iou > 0.5]
                if hits:
                    matched.add(hits[0][0])
                    counts[classes[0][g]][0] += hits[0][1]
                    counts[classes[0][g]][1] += 1
                else:
                    counts[classes[0][g]][3] += 1
            for p, found in sets[1].items():
                crowd = sets[0].get(("crowd", classes[1][p]), set())
                if p not in matched and len(found & (void | crowd)) / len(found) <= 0.5:
                    counts[classes[1][p]][2] += 1
    qualities = [iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in counts.values() if tp + fp + fn]
    return sum(qualities) / len(qualities) if qualities else math.nan


@pytest.fixture(scope="module")
def random_sets():
    """200 random videos in sets of 1 to 7."""
    rng = np.random.default_rng(0)
    sets, count = [], 0
    while count < 200:
        sets.append([random_video(rng) for _ in range(min(int(rng.integers(1, 8)), 200 - count))])
        count += len(sets[-1])
    return sets


def test_random_videos_have_every_case(random_sets):
    videos = [video for videos in random_sets for video in videos]
    assert len(videos) == 200 and min(map(len, videos)) == 1
    frames = [frame for video in videos for frame in video]
    assert any((true.classes == VOID).all() for true, _ in frames) and any((p.classes == VOID).all() for _, p in frames)
    assert sum(((true.ids == 0) & (true.classes != VOID)).any() for true, _ in frames) > 50  # crowds
    seen = [[i in true.ids and 1 <= i <= 5 for true, _ in video] for video in videos for i in range(1, 6)]
    assert sum("101" in "".join(str(int(x)) for x in of_id) for of_id in seen) > 20  # ids that return


def test_equal_to_the_second_implementation(random_sets):
    values = []
    for videos in random_sets:
        found, slow = tracking(*videos), slow_tracking(videos)
        np.testing.assert_allclose([found["AQ"], found["SQ"]], slow, atol=1e-12)
        np.testing.assert_allclose(found["STQ"], math.sqrt(slow[0] * slow[1]), atol=1e-12)
        of_windows = panoptic(*videos)
        for k in WINDOWS:
            np.testing.assert_allclose(of_windows[f"VPQ@{k}"], slow_panoptic(videos, k), atol=1e-12)
        values.append([found["AQ"], found["SQ"], of_windows["VPQ"]])
    assert (np.nanstd(values, axis=0) > 0.05).all()
