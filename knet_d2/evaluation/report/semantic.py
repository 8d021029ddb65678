"""The report's section on semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .bootstrap import groups_of, interval, mean_of_classes, ratio, resample
from .section import ClassRow, Metric, Section


class PixelCounts(NamedTuple):
    """The pixels of an image by class, for the classes that occur in it.

    Attributes:
        labels: the classes, int [n].
        counts: number of pixels that are right, that have the class, and that are predicted as it, int64 [n, 3].
    """

    labels: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> PixelCounts:
        """Count from pixels by predicted class (row) and true class (column), [K, K]."""
        counts = np.stack([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)], axis=1)
        labels = np.flatnonzero(counts.any(axis=1))
        return cls(labels, counts[labels])

    def quality(self) -> float:
        """The mean IoU of the image's classes, 0 to 1."""
        return float(mean_of_classes(_iou(self.counts)))


def semantic_section(names: Sequence[str], confusion: np.ndarray, images: Mapping[str, PixelCounts]) -> Section:
    """Build the section.

    Args:
        names: the classes.
        confusion: number of labelled pixels by predicted class (row) and true class (column), [K, K].
        images: counts by file name.
    """
    groups = groups_of(len(images))
    counts = np.zeros((groups.max() + 1, len(names), 3))
    for group, x in zip(groups, images.values(), strict=True):
        counts[group, x.labels] += x.counts
    draws = resample(len(counts))
    resampled = 100 * _iou((draws @ counts.reshape(len(counts), -1)).reshape(len(draws), len(names), 3))
    right, true, predicted = counts.sum(axis=0).T
    iou = 100 * _iou(counts.sum(axis=0))
    shares = (100 * x / max(true.sum(), 1) for x in (true, predicted))
    columns = (iou, 100 * ratio(right, predicted), 100 * ratio(right, true), *shares, true)
    return Section(
        title="Semantic segmentation",
        metrics=[Metric("mIoU", float(mean_of_classes(iou)), interval(mean_of_classes(resampled)))],
        columns=("IoU", "precision", "recall", "% of the pixels", "% predicted", "pixels"),
        rows=[
            ClassRow(name, interval(resampled[:, i]), tuple(float(x[i]) for x in columns))
            for i, name in enumerate(names)
        ],
        names=list(names),
        confusion=np.pad(confusion, (0, 1)),
        notes=[
            "Pixels are counted, without those that are ignored. Where the two shares of a class differ, areas that "
            "this model measures are too large or too small by as much.",
            f"The intervals come from {len(draws)} draws of the {len(images)} images.",
        ],
        curves=[],
        class_curves=[],
        thresholds=None,
        threshold_option="",
        qualities={name: x.quality() for name, x in images.items()},
        key="file_name",
    )


def _iou(counts: np.ndarray) -> np.ndarray:
    """IoU, 0 to 1, from the numbers of right, true and predicted pixels in the last axis; NaN without any."""
    right, true, predicted = np.moveaxis(counts, -1, 0)
    return ratio(right, true + predicted - right)
