"""AP by COCO's rules for images with weights, as the bootstrap needs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# As in pycocotools' Params
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
# Entries of the largest array
_LARGEST_ARRAY = 4_000_000

Annotation = dict[str, Any]


class ClassMatches(NamedTuple):
    """The detections of one class in all images, by falling score, matched with its objects.

    Attributes:
        scores: [D].
        images: index of the image of each detection, int [D].
        right: whether a detection is matched with an object at each IoU threshold, bool [10, D].
        ignored: whether it is matched with a crowd, bool [10, D].
        objects: number of objects in each image, without crowds, float [images].
    """

    scores: np.ndarray
    images: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Return the AP at each IoU threshold, 0 to 1, float [B, 10]; NaN where there are no objects.

        Args:
            weights: how often each image is counted, in each of B resamples, float [B, images].
        """
        chunk = max(1, _LARGEST_ARRAY // max(1, len(self.images)))
        return np.concatenate([self._precisions(weights[i : i + chunk]) for i in range(0, len(weights), chunk)])

    def _precisions(self, weights: np.ndarray) -> np.ndarray:
        objects = (weights @ self.objects)[:, None]
        of_detection = weights[:, self.images]
        every = np.cumsum(of_detection, axis=1, dtype=np.float64)
        found = np.zeros((len(weights), len(IOU_THRESHOLDS)))
        for i, (right, ignored) in enumerate(zip(self.right, self.ignored, strict=True)):
            hits = np.flatnonzero(right)
            counted = every if not ignored.any() else np.cumsum(of_detection * ~ignored, axis=1, dtype=np.float64)
            true = np.cumsum(of_detection[:, hits], axis=1, dtype=np.float64)
            # Precision falls between hits, so the highest precision at a recall or above is that of a hit.
            precision = true / np.maximum(counted[:, hits], 1)
            highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(_RECALLS, true / np.maximum(objects, 1), side="right")
            found[:, i] = (highest * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(_RECALLS)
        return np.where(objects > 0, found, np.nan)


def match_classes(
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    ious: Mapping[tuple[Any, Any], Any],
    image_ids: Sequence[Any],
    category_ids: Sequence[Any],
    max_detections: int,
) -> list[ClassMatches]:
    """Match the detections of each class with its objects, as pycocotools does.

    Args:
        truth, detections: annotations of all images.
        ious: COCOeval.ious: IoU [detections by falling score, objects] of each (image id, category id).
        image_ids, category_ids: what is evaluated, in the order of pycocotools.
        max_detections: number of detections of a class in an image that are counted.
    """
    objects_of, detections_of = _grouped(truth), _grouped(detections)
    return [
        _match_class(objects_of, detections_of, ious, image_ids, category, max_detections) for category in category_ids
    ]


def _grouped(annotations: Sequence[Annotation]) -> dict[tuple[Any, Any], list[Annotation]]:
    groups = defaultdict(list)
    for x in annotations:
        groups[x["image_id"], x["category_id"]].append(x)
    return groups


def _match_class(objects_of, detections_of, ious, image_ids, category, max_detections) -> ClassMatches:
    scores, images, right, ignored, number = [], [], [], [], np.zeros(len(image_ids))
    for i, image in enumerate(image_ids):
        objects, detections = objects_of.get((image, category), []), detections_of.get((image, category), [])
        crowd = np.array([bool(x["iscrowd"]) for x in objects], bool)
        number[i] = (~crowd).sum()
        if detections:
            falling = np.sort([-x["score"] for x in detections])[:max_detections]
            iou = np.reshape(ious[image, category], (-1, len(objects)))[: len(falling)] if objects else None
            hit = _match(iou, crowd) if objects else np.zeros((2, len(IOU_THRESHOLDS), len(falling)), bool)
            scores.append(-falling)
            images.append(np.full(len(falling), i))
            right.append(hit[0])
            ignored.append(hit[1])
    if not scores:
        empty = np.zeros((len(IOU_THRESHOLDS), 0), bool)
        return ClassMatches(np.zeros(0), np.zeros(0, int), empty, empty, number)
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="stable")
    of_image, is_right, is_ignored = (np.concatenate(x, axis=-1)[..., order] for x in (images, right, ignored))
    return ClassMatches(joined[order], of_image, is_right, is_ignored, number)


def _match(iou: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Match the detections of an image and class; returns whether each is right, and ignored, bool [2, 10, D]."""
    free = np.ones((len(IOU_THRESHOLDS), iou.shape[1]), bool)
    result = np.zeros((2, len(IOU_THRESHOLDS), len(iou)), bool)
    lowest = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    for d, row in enumerate(iou):
        possible = free & (row >= lowest)
        real = possible & ~crowd
        result[0, :, d] = real.any(axis=1)
        result[1, :, d] = ~result[0, :, d] & possible.any(axis=1)  # a crowd takes any number of detections
        best = len(row) - 1 - np.where(real, row, -1)[:, ::-1].argmax(axis=1)  # the last of equal ones
        free[result[0, :, d], best[result[0, :, d]]] = False
    return result
