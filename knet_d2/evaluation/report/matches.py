"""Matches the objects of an image with the predictions, whatever their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_VOID = 0


class Matches(NamedTuple):
    """The objects and predictions of one image, one entry for each pair, missed object and false prediction.

    Attributes:
        true: class of the object, int [n]; -1 if there is none.
        predicted: class of the prediction, int [n]; -1 if there is none.
        iou: IoU of the pair, float [n]; 0 without a pair.
        score: score of the prediction, float [n]; NaN if there is none.
    """

    true: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray
    score: np.ndarray

    @classmethod
    def of(
        cls,
        true: Sequence[int],
        predicted: Sequence[int],
        scores: Sequence[float],
        pairs: Sequence[tuple[int, int, float]],
    ) -> Matches:
        """Make the entries from the classes of all objects and predictions, and pairs (object, prediction, IoU)."""
        paired_true, paired_predicted = ({pair[i] for pair in pairs} for i in (0, 1))
        rows = [(true[t], predicted[p], iou, scores[p]) for t, p, iou in pairs]
        rows += [(x, -1, 0.0, np.nan) for t, x in enumerate(true) if t not in paired_true]
        rows += [(-1, x, 0.0, scores[p]) for p, x in enumerate(predicted) if p not in paired_predicted]
        columns = np.array(rows, np.float64).reshape(-1, 4).T
        return cls(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2], columns[3])

    @property
    def right(self) -> np.ndarray:
        """Whether an entry is a pair of one class, bool [n]."""
        return (self.true == self.predicted) & (self.true >= 0)

    def quality(self) -> float:
        """The panoptic quality of the image over all its classes together: IoU sum / (TP + FP / 2 + FN / 2)."""
        half = ((self.true >= 0).sum() + (self.predicted >= 0).sum()) / 2  # TP + FP / 2 + FN / 2
        return float(self.iou[self.right].sum() / half) if half else float("nan")

    def counts(self, num_classes: int) -> np.ndarray:
        """Return the sum of IoUs, TP, FP and FN of each class, float [num_classes, 4]."""
        right = self.right

        def count(labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(labels, weights, minlength=num_classes)

        hits = count(self.true[right])
        found, there = (count(x[x >= 0]) for x in (self.predicted, self.true))
        return np.stack([count(self.true[right], self.iou[right]), hits, found - hits, there - hits], axis=1)


def confusion_matrix(matches: Sequence[Matches], num_classes: int) -> np.ndarray:
    """Return the counts by predicted class (row) and true class (column), int64 [K + 1, K + 1]; see :class:`Section`.

    The entry in the last row and column is 0.
    """
    size = num_classes + 1
    counts = np.zeros(size**2, np.int64)
    for x in matches:
        counts += np.bincount(x.predicted % size * size + x.true % size, minlength=size**2)
    return counts.reshape(size, size)


def greedy_pairs(ious: np.ndarray, same_class: np.ndarray, minimum: float) -> list[tuple[int, int, float]]:
    """Pair objects and predictions one-to-one, best IoU first; of equal IoUs, pairs of one class first.

    Args:
        ious: IoU of each object and prediction [G, D].
        same_class: whether their classes are equal, bool [G, D].
        minimum: pairs with a lower IoU are not formed.

    Returns:
        (object, prediction, IoU) of each pair.
    """
    objects, predictions = np.nonzero(ious >= minimum)
    values = ious[objects, predictions]
    pairs, used = [], (set(), set())
    for i in np.lexsort((~same_class[objects, predictions], -values)):
        t, p = int(objects[i]), int(predictions[i])
        if t not in used[0] and p not in used[1]:
            used[0].add(t)
            used[1].add(p)
            pairs.append((t, p, float(values[i])))
    return pairs


def panoptic_matches(
    truth: np.ndarray,
    objects: Sequence[dict[str, Any]],
    prediction: np.ndarray,
    segments: Sequence[dict[str, Any]],
    labels: dict[int, int],
) -> Matches:
    """Match the segments of an image by panopticapi's rules: IoU above 0.5, without void pixels.

    A prediction of which more than half is void, or crowd of its class, is left out unless it is right.

    Args:
        truth: segment id of each pixel [H, W]; 0 is void.
        objects: "id", "category_id", "area" and "iscrowd" of each segment of the ground truth.
        prediction: segment id of each pixel [H, W].
        segments: "id" and "category_id" of each predicted segment, and "score" if it has one.
        labels: class of each category id.
    """
    codes, counts = np.unique((truth.astype(np.int64) << 32) + prediction, return_counts=True)
    common: dict[tuple[int, int], int] = {(c >> 32, c & 0xFFFFFFFF): n for c, n in zip(codes.tolist(), counts.tolist())}
    areas: dict[int, int] = {}
    for (_, p), number in common.items():
        areas[p] = areas.get(p, 0) + number
    crowds = {x["category_id"]: x["id"] for x in objects if x["iscrowd"]}  # panopticapi takes the last of a category
    real = [x for x in objects if not x["iscrowd"]]
    places, found = {x["id"]: i for i, x in enumerate(real)}, {x["id"]: x for x in segments}
    pairs = []  # (id of the object, id of the prediction, IoU)
    for (t, p), shared in common.items():
        if t in places and p in found:
            iou = shared / (areas[p] + real[places[t]]["area"] - shared - common.get((_VOID, p), 0))
            if iou > 0.5:
                pairs.append((t, p, iou))
    right = {p for t, p, _ in pairs if real[places[t]]["category_id"] == found[p]["category_id"]}

    def is_left_out(p: int, category_id: int) -> bool:
        ignored = common.get((_VOID, p), 0) + common.get((crowds.get(category_id, -1), p), 0)
        return p not in right and ignored > 0.5 * areas[p]

    kept = [x for x in segments if not is_left_out(x["id"], x["category_id"])]
    numbers = {x["id"]: i for i, x in enumerate(kept)}
    return Matches.of(
        [labels[x["category_id"]] for x in real],
        [labels[x["category_id"]] for x in kept],
        [x.get("score", np.nan) for x in kept],
        [(places[t], numbers[p], iou) for t, p, iou in pairs if p in numbers],
    )
