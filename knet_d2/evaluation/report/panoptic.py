"""The report's section on panoptic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import groups_of, interval, mean_of_classes, ratio, resample
from .matches import Matches, confusion_matrix
from .section import ClassRow, Curve, Metric, Section, Thresholds


def panoptic_section(names: list[str], things: Sequence[bool], matches: Mapping[Any, Matches]) -> Section:
    """Build the section from the matched segments of each image.

    Args:
        names: the classes.
        things: whether each class is a thing.
        matches: matched segments by image id.
    """
    num_images, num_classes = len(matches), len(names)
    groups = groups_of(num_images)
    counts = np.zeros((groups.max() + 1, num_classes, 4))
    for group, x in zip(groups, matches.values(), strict=True):
        counts[group] += x.counts(num_classes)
    total = counts.sum(axis=0)
    draws = resample(len(counts))
    resampled = 100 * _quality((draws @ counts.reshape(len(counts), -1)).reshape(len(draws), num_classes, 4))
    values, is_thing = 100 * _quality(total), np.asarray(things, bool)
    parts = {"PQ": np.ones(num_classes, bool), "PQ of things": is_thing, "PQ of stuff": ~is_thing}
    metrics = [
        Metric(name, float(mean_of_classes(values[part])), interval(mean_of_classes(resampled[:, part])))
        for name, part in parts.items()
        if part.any()
    ]
    iou, hits, wrong, missed = total.T
    columns = (
        *(values, 100 * ratio(iou, hits), 100 * ratio(hits, hits + (wrong + missed) / 2)),
        *(100 * ratio(hits, hits + wrong), 100 * ratio(hits, hits + missed), hits + missed, hits + wrong),
    )
    rows = [
        ClassRow(name, interval(resampled[:, i]), tuple(float(x[i]) for x in columns)) for i, name in enumerate(names)
    ]
    thresholds = _thresholds(list(matches.values()), is_thing)
    curves = []
    if thresholds is not None:
        order = np.argsort(thresholds.recall, kind="stable")
        curves = [
            Curve("things, IoU above 0.50", thresholds.recall[order].tolist(), thresholds.precision[order].tolist())
        ]
    return Section(
        title="Panoptic segmentation",
        metrics=metrics,
        columns=("PQ", "SQ", "RQ", "precision", "recall", "segments", "predictions"),
        rows=rows,
        names=names,
        confusion=confusion_matrix(list(matches.values()), num_classes),
        notes=[
            "Segments are matched at an IoU above 0.5; void pixels and crowd regions count for nothing.",
            f"The intervals come from {len(draws)} draws of the {num_images} images.",
            "Thresholds count things alone, with the masks of this evaluation. They begin at the model's threshold, "
            "below which it gives no segments.",
        ],
        curves=curves,
        class_curves=[],
        thresholds=thresholds,
        threshold_option="MODEL.KNET.TEST.THING_SCORE_THRESHOLD",
        qualities={image: x.quality() for image, x in matches.items()},
        key="image_id",
    )


def _quality(counts: np.ndarray) -> np.ndarray:
    """PQ, 0 to 1, from the sums of IoU, TP, FP and FN in the last axis."""
    iou, hits, wrong, missed = np.moveaxis(counts, -1, 0)
    return ratio(iou, hits + (wrong + missed) / 2)


def _thresholds(matches: Sequence[Matches], is_thing: np.ndarray) -> Thresholds | None:
    of_thing = np.append(is_thing, False)  # class -1, without an object or prediction, is no thing
    true, predicted, score, right = (
        np.concatenate([getattr(x, key) for x in matches]) for key in ("true", "predicted", "score", "right")
    )
    kept = of_thing[predicted] & ~np.isnan(score)
    lowest = float(score[kept].min()) if kept.any() else 0.0
    return Thresholds.of(score[kept], right[kept], int(of_thing[true].sum()), lowest)
