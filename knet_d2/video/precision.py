"""Average precision of the tracks of videos (YouTube-VIS), computed by COCO's own program."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
# Mean areas of small, medium and large tracks, in pixels
_AREAS = [[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]]


class TrackMasks(NamedTuple):
    """The objects of a frame, true or predicted.

    Attributes:
        ids: track of each.
        classes: class of each.
        masks: bool [n, H, W].
        scores: of each; 1 for true ones.
        crowds: whether each is a crowd.
    """

    ids: Sequence[int]
    classes: Sequence[int]
    masks: np.ndarray
    scores: Sequence[float]
    crowds: Sequence[bool]


class VideoTracks:
    """The tracks of one video, and how many pixels each pair has in common, without the masks."""

    def __init__(self) -> None:
        self._true: dict[tuple[int, int], _Track] = {}
        self._predicted: dict[tuple[int, int], _Track] = {}
        self._common: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()

    def add(self, true: TrackMasks, predicted: TrackMasks) -> None:
        """Add a frame."""
        keys = []
        for tracks, found in ((self._true, true), (self._predicted, predicted)):
            of_frame = list(zip(map(int, found.classes), map(int, found.ids)))
            for key, mask, score, is_crowd in zip(of_frame, found.masks, found.scores, found.crowds):
                tracks.setdefault(key, _Track(bool(is_crowd))).add(int(mask.sum()), float(score))
            keys.append(of_frame)
        if len(true.ids) and len(predicted.ids):
            flat = [x.masks.reshape(len(x.masks), -1).astype(np.float32) for x in (true, predicted)]
            common = flat[0] @ flat[1].T  # exact below 2 ** 24 pixels
            for i, j in zip(*common.nonzero()):
                self._common[keys[0][i], keys[1][j]] += int(common[i, j])

    def entries(self, video_id: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, np.ndarray]]:
        """True and predicted tracks as COCO's annotations, and their IoUs by class, [predicted, true]."""
        true = [track.entry(key, video_id) for key, track in self._true.items()]
        predicted = [track.entry(key, video_id) for key, track in self._predicted.items()]
        predicted.sort(key=lambda x: -x["score"])
        ious: dict[int, np.ndarray] = {}
        for c in {x["category_id"] for x in (*true, *predicted)}:
            rows, columns = ([x["key"] for x in side if x["category_id"] == c] for side in (predicted, true))
            ious[c] = np.array([[self._iou(t, p) for t in columns] for p in rows]).reshape(len(rows), len(columns))
        return true, predicted, ious

    def _iou(self, true: tuple[int, int], predicted: tuple[int, int]) -> float:
        """Sum of the intersections over sum of the unions."""
        common = self._common[true, predicted]
        return common / (self._true[true].pixels + self._predicted[predicted].pixels - common)


class _Track:
    def __init__(self, is_crowd: bool):
        self.pixels, self._frames, self._score, self._seen = 0, 0, 0.0, 0
        self._is_crowd = is_crowd

    def add(self, pixels: int, score: float) -> None:
        self.pixels += pixels
        self._seen += pixels > 0
        self._score += score
        self._frames += 1

    def entry(self, key: tuple[int, int], video_id: int) -> dict[str, Any]:
        return {
            "key": key,
            "image_id": video_id,
            "category_id": key[0],
            "score": self._score / self._frames,
            "area": self.pixels / max(self._seen, 1),
            "iscrowd": int(self._is_crowd),
            "ignore": int(self._is_crowd),
        }


def average_precision(videos: Sequence[VideoTracks], num_classes: int) -> tuple[dict[str, float], list[float]]:
    """The METRICS of a set of videos, and the AP of each class; 0 to 1, NaN where there is no true track.

    AP is COCO's, with the IoU of whole tracks, mean areas and at most 100 tracks per video. A crowd has the plain IoU.
    A score is the mean over the frames of a track.
    """
    evaluation = _TrackEval(videos, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes]
    of_class = [_mean(precision[:, :, i]) for i in range(num_classes)]
    return {key: float(x) if x > -1 else float("nan") for key, x in zip(METRICS, evaluation.stats)}, of_class


def _mean(precision: np.ndarray) -> float:
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


class _TrackEval(COCOeval):
    """COCO's program, which takes a video for an image and a track for an object."""

    def __init__(self, videos: Sequence[VideoTracks], num_classes: int):
        super().__init__(iouType="segm")
        self._videos = videos
        self.params.imgIds, self.params.catIds = list(range(len(videos))), list(range(num_classes))
        self.params.areaRng = _AREAS

    def _prepare(self) -> None:
        self._gts.clear()
        self._dts.clear()
        self._ious: dict[tuple[int, int], np.ndarray] = {}
        for i, video in enumerate(self._videos):
            true, predicted, ious = video.entries(i)
            self._ious |= {(i, c): x for c, x in ious.items()}
            for found, entries in ((self._gts, true), (self._dts, predicted)):
                for number, entry in enumerate(entries, 1):  # COCO's program reads the id 0 as "no match"
                    found[i, entry["category_id"]].append({**entry, "id": number})

    def computeIoU(self, imgId: int, catId: int) -> Any:
        found = self._ious.get((imgId, catId), [])
        return found[: self.params.maxDets[-1]] if len(found) else []
