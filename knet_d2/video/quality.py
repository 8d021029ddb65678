"""Quality of a video's segmentation and tracks: STQ and VPQ, from label maps, in NumPy.

A frame becomes a small table of pixel counts, so that memory does not grow with the images or the video.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

VOID = -1
"""Class of pixels without a segment."""


class LabelMaps(NamedTuple):
    """What each pixel of a frame is.

    Attributes:
        classes: int [H, W], 0 to K - 1, or VOID.
        ids: int [H, W], number of the segment within its video, 0 or more. Of true things, 0 is a crowd.
    """

    classes: np.ndarray
    ids: np.ndarray


class OverlapTable(NamedTuple):
    """How many pixels of a frame are of each true and each predicted segment.

    Attributes:
        true, predicted: (class, id) of the rows and of the columns.
        counts: int64 [rows, columns].
    """

    true: list[tuple[int, int]]
    predicted: list[tuple[int, int]]
    counts: np.ndarray


def overlap_table(true: LabelMaps, predicted: LabelMaps) -> OverlapTable:
    """Count the pixels of each pair of segments; all void pixels are one segment (VOID, 0)."""
    (rows, row_of), (columns, column_of) = _segments(true), _segments(predicted)
    counts = np.bincount(row_of * len(columns) + column_of, minlength=len(rows) * len(columns))
    return OverlapTable(rows, columns, counts.reshape(len(rows), len(columns)))


def _segments(maps: LabelMaps) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The (class, id) of the segments in a frame, and the position in this list of each pixel, [H * W]."""
    classes = maps.classes.reshape(-1).astype(np.int64)
    ids = np.where(classes == VOID, 0, maps.ids.reshape(-1))
    codes, position = np.unique((classes << 32) + ids, return_inverse=True)
    return [(int(code >> 32), int(code & (2**32 - 1))) for code in codes], position.reshape(-1)


class TrackingQuality:
    """Segmentation and tracking quality of one video (STEP: Segmenting and Tracking Every Pixel, 2021).

    It agrees with deeplab2's reference: a track is (class, id), so that a track whose class flips is two. True tracks
    are of things and not crowds. Pixels of crowds do not count in a prediction's size, void pixels do.
    """

    def __init__(self, num_classes: int, things: Collection[int]):
        self._things = frozenset(things)
        # The last row and column are void
        self.confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
        self._true: Counter[tuple[int, int]] = Counter()
        self._predicted: Counter[tuple[int, int]] = Counter()
        self._common: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()

    def add(self, table: OverlapTable) -> None:
        """Add a frame."""
        for true, row in zip(table.true, table.counts.tolist()):
            is_thing = true[0] in self._things
            is_crowd = is_thing and true[1] == 0
            for predicted, count in zip(table.predicted, row):
                self.confusion[true[0], predicted[0]] += count  # VOID is the last one
                if is_thing and not is_crowd:
                    self._true[true] += count
                if predicted[0] in self._things and not is_crowd:
                    self._predicted[predicted] += count
                    if is_thing and count:
                        self._common[true, predicted] += count

    def association(self) -> tuple[float, int]:
        """The sum over the true tracks of their association quality, and their number."""
        total = sum(
            common / self._true[true] * common / (self._true[true] + self._predicted[predicted] - common)
            for (true, predicted), common in self._common.items()
        )
        return total, len(self._true)


def summarize_tracking(videos: Iterable[tuple[np.ndarray, float, int]]) -> dict[str, float]:
    """STQ, AQ and SQ of a set of videos, 0 to 1.

    AQ is the mean over all tracks of the set, 0 if there is none; SQ is the mean IoU of the classes that occur. Known
    pixels that are predicted as void add a class with the IoU 0.

    Args:
        videos: confusion matrix, sum of association qualities and number of tracks of each.
    """
    videos = list(videos)
    num_tracks = sum(count for _, _, count in videos)
    association = sum(total for _, total, _ in videos) / num_tracks if num_tracks else 0.0
    confusion = np.stack([matrix for matrix, _, _ in videos]).sum(axis=0)
    confusion[VOID] = 0
    right = confusion.diagonal()
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    segmentation = float((right[union > 0] / union[union > 0]).mean()) if union.any() else float("nan")
    return {"STQ": float(np.sqrt(association * segmentation)), "AQ": float(association), "SQ": segmentation}


class PanopticQuality:
    """Video panoptic quality of one video (Video Panoptic Segmentation, CVPR 2020): PQ of tubes in sliding windows.

    A tube is a segment in k successive frames; its class is that of its first frame in the window. Areas are counted in
    the maps. Predictions that are mostly void or a crowd of their class are not counted.

    Attributes:
        counts: [windows, K, 4]: sum of IoUs, true positives, false positives, false negatives by class.
    """

    def __init__(self, num_classes: int, things: Collection[int], windows: Sequence[int]):
        """
        Args:
            windows: values of k, numbers of successive frames.
        """
        self._things = frozenset(things)
        self._windows = tuple(windows)
        self._frames: deque[OverlapTable] = deque(maxlen=max(windows))
        self.counts = np.zeros((len(windows), num_classes, 4))

    def add(self, table: OverlapTable) -> None:
        """Add a frame, and with it the windows that end there."""
        self._frames.append(table)
        frames = list(self._frames)
        for i, k in enumerate(self._windows):
            if len(frames) >= k:
                self._add_window(self.counts[i], frames[-k:])

    def _add_window(self, counts: np.ndarray, frames: Sequence[OverlapTable]) -> None:
        true, predicted = _Tubes(self._things), _Tubes(frozenset())
        places = [(true.places(frame.true), predicted.places(frame.predicted)) for frame in frames]
        common = np.zeros((len(true.classes), len(predicted.classes)), np.int64)
        for (rows, columns), frame in zip(places, frames):
            np.add.at(common, np.ix_(rows, columns), frame.counts)
        true_classes, classes = np.array(true.classes), np.array(predicted.classes)
        is_crowd, void = np.array(true.is_crowd), common[true_classes == VOID].sum(axis=0)
        areas = common.sum(axis=0)
        unions = common.sum(axis=1)[:, None] + areas - common - void
        comparable = (true_classes[:, None] == classes) & (classes != VOID) & ~is_crowd[:, None]
        matched = comparable & (2 * common > unions)
        for i, j in zip(*matched.nonzero()):
            counts[classes[j], :2] += common[i, j] / unions[i, j], 1
        for c in true_classes[(true_classes != VOID) & ~is_crowd & ~matched.any(axis=1)]:
            counts[c, 3] += 1
        of_crowd = (common * (is_crowd[:, None] & (true_classes[:, None] == classes))).sum(axis=0)
        for c in classes[(classes != VOID) & ~matched.any(axis=0) & (2 * (void + of_crowd) <= areas)]:
            counts[c, 2] += 1


class _Tubes:
    """The segments of a window.

    Attributes:
        classes: of each, in its first frame.
        is_crowd: whether each is a crowd.
    """

    def __init__(self, crowd_classes: frozenset[int]):
        """
        Args:
            crowd_classes: classes in which the id 0 is a crowd.
        """
        self._crowd_classes = crowd_classes
        self._places: dict[tuple[bool, int], int] = {}
        self.classes: list[int] = []
        self.is_crowd: list[bool] = []

    def places(self, segments: Iterable[tuple[int, int]]) -> list[int]:
        """The places of a frame's segments in the lists, which grow by new ones."""
        found = []
        for c, number in segments:
            is_crowd = c in self._crowd_classes and number == 0
            shares_id = is_crowd or c == VOID  # such segments are known by their class, all others by their id
            place = self._places.setdefault((shares_id, c if shares_id else number), len(self.classes))
            if place == len(self.classes):
                self.classes.append(c)
                self.is_crowd.append(is_crowd)
            found.append(place)
        return found


def summarize_panoptic(
    videos: Iterable[np.ndarray], things: Collection[int], windows: Sequence[int]
) -> dict[str, float]:
    """VPQ of a set of videos, 0 to 1: means over the windows, and PQ, SQ and RQ of each window.

    Keys end in "_th" for things and "_st" for stuff. The sums are over all windows and videos. Windows that are longer
    than every video are left out of the means.

    Args:
        videos: :attr:`PanopticQuality.counts` of each.
    """
    counts = np.sum(list(videos), axis=0)
    is_thing = np.isin(np.arange(counts.shape[1]), list(things))
    results = {}
    for suffix, chosen in (("", is_thing | True), ("_th", is_thing), ("_st", ~is_thing)):
        qualities = [_qualities(of_window[chosen]) for of_window in counts]
        means = [pq for pq, _, _ in qualities if not np.isnan(pq)]
        results["VPQ" + suffix] = float(np.mean(means)) if means else float("nan")
        for k, quality in zip(windows, qualities):
            results |= {f"{name}{k}{suffix}": x for name, x in zip(("VPQ@", "VSQ@", "VRQ@"), quality)}
    return results


def _qualities(counts: np.ndarray) -> tuple[float, float, float]:
    """PQ, SQ and RQ, means over the classes that occur; counts: [K, 4]."""
    occurs = counts[:, 1:].sum(axis=1) > 0
    if not occurs.any():
        return float("nan"), float("nan"), float("nan")
    iou, tp, fp, fn = counts[occurs].T
    recognition = tp / (tp + (fp + fn) / 2)
    segmentation = iou / np.maximum(tp, 1)
    return float((segmentation * recognition).mean()), float(segmentation.mean()), float(recognition.mean())
