"""The report's section on instances."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .average_precision import Annotation, ClassMatches, match_classes
from .bootstrap import RESAMPLES, groups_of, interval, mean_of_classes, resample
from .matches import Matches, confusion_matrix, greedy_pairs
from .section import ClassRow, Curve, Metric, Section, Thresholds

_MATCH_IOU = 0.5
# Detections times resamples is at most _MOST_WORK, but at least _FEWEST_RESAMPLES are drawn.
_MOST_WORK, _FEWEST_RESAMPLES = 100_000_000, 100
_RECALLS = np.linspace(0, 1, 101).tolist()


def instance_section(
    names: list[str],
    category_ids: Sequence[Any],
    image_ids: Sequence[Any],
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    ious: Mapping[tuple[Any, Any], Any],
    precision: np.ndarray | None,
    max_detections: int,
) -> Section:
    """Build the section from what COCO's program has computed for masks.

    Args:
        names, category_ids: the classes.
        image_ids: the images that are evaluated.
        truth, detections: annotations of all images; masks are RLE unless there is no detection.
        ious: COCOeval.ious.
        precision: COCOeval.eval["precision"] of the class, at all areas and the standard maximum [10, 101, K]; None
            without detections.
        max_detections: number of detections of an image that AP counts.
    """
    classes = match_classes(truth, detections, ious, image_ids, category_ids, max_detections)
    values, resampled = _average_precisions(classes, len(image_ids))
    thresholds = Thresholds.of(
        np.concatenate([x.scores[~x.ignored[0]] for x in classes]),
        np.concatenate([x.right[0][~x.ignored[0]] for x in classes]),
        int(sum(x.objects.sum() for x in classes)),
    )
    score = float(thresholds.scores[thresholds.best]) if thresholds else 0.0
    labels = {x: i for i, x in enumerate(category_ids)}
    matches, in_crowds = _match_images(truth, detections, image_ids, labels, score)
    percent = 100 * mean_of_classes(values.T)  # of each threshold
    metrics = [
        Metric("AP", float(mean_of_classes(percent)), interval(100 * mean_of_classes(resampled.mean(axis=2)))),
        Metric("AP50", float(percent[0]), interval(100 * mean_of_classes(resampled[..., 0]))),
    ]
    rows = [
        ClassRow(name, interval(100 * resampled[:, i].mean(axis=1)), _class_values(values[i], classes[i], score))
        for i, name in enumerate(names)
    ]
    notes = [
        f"The confusion matrix counts predictions with a score of at least {score:.2f}, matched with objects of any "
        f"class at an IoU of at least {_MATCH_IOU}. Precision and recall of classes hold for this threshold and IoU.",
        f"The intervals come from {len(resampled)} draws of the {len(image_ids)} images.",
    ]
    if in_crowds:
        notes.append(f"{in_crowds} predictions on crowd regions are left out.")
    return Section(
        title="Instances (masks)",
        metrics=metrics,
        columns=("AP", "AP50", "precision", "recall", "objects", "predictions"),
        rows=rows,
        names=names,
        confusion=confusion_matrix(list(matches.values()), len(names)),
        notes=notes,
        curves=[] if precision is None else _curves(precision),
        class_curves=[] if precision is None else [_curve(x, precision[0, :, i]) for i, x in enumerate(names)],
        thresholds=thresholds,
        threshold_option="MODEL.KNET.TEST.SCORE_THRESHOLD",
        qualities={image: x.quality() for image, x in matches.items()},
        key="image_id",
    )


def _average_precisions(classes: Sequence[ClassMatches], num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the AP of classes at IoU thresholds [K, 10], and of resampled images [B, K, 10]; 0 to 1."""
    groups = groups_of(num_images)
    work = max(1, sum(len(x.scores) for x in classes))
    number = int(np.clip(_MOST_WORK // work, _FEWEST_RESAMPLES, RESAMPLES))
    weights = resample(groups.max() + 1, number)[:, groups]
    values = [x.average_precision(np.ones((1, num_images), np.float32))[0] for x in classes]
    return np.stack(values), np.stack([x.average_precision(weights) for x in classes], axis=1)


def _class_values(values: np.ndarray, matches: ClassMatches, score: float) -> tuple[float, ...]:
    kept = (matches.scores >= score) & ~matches.ignored[0]
    hits, found, objects = matches.right[0][kept].sum(), kept.sum(), matches.objects.sum()
    precision, recall = (100 * hits / n if n else np.nan for n in (found, objects))
    return tuple(map(float, (100 * values.mean(), 100 * values[0], precision, recall, objects, found)))


def _match_images(
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    image_ids: Sequence[Any],
    labels: Mapping[Any, int],
    score: float,
) -> tuple[dict[Any, Matches], int]:
    """Match all images; returns also the number of predictions that are left out because they are on crowds."""
    objects_of, detections_of = defaultdict(list), defaultdict(list)
    for x in truth:
        if x["category_id"] in labels:
            objects_of[x["image_id"]].append(x)
    for x in detections:
        if x["score"] >= score:
            detections_of[x["image_id"]].append(x)
    found, in_crowds = {}, 0
    for image in image_ids:
        found[image], number = _match_image(objects_of[image], detections_of[image], labels)
        in_crowds += number
    return found, in_crowds


def _match_image(
    truth: list[Annotation], detections: list[Annotation], labels: Mapping[Any, int]
) -> tuple[Matches, int]:
    objects = [x for x in truth if not x["iscrowd"]]
    crowds = [x for x in truth if x["iscrowd"]]
    true, predicted = ([labels[x["category_id"]] for x in part] for part in (objects, detections))
    pairs: list[tuple[int, int, float]] = []
    left_out: set[int] = set()
    if truth and detections:
        masks = [[x["segmentation"] for x in part] for part in (detections, objects, crowds)]
        same = np.array(true)[:, None] == np.array(predicted)
        pairs = greedy_pairs(_iou(masks[0], masks[1], 0).T, same, _MATCH_IOU)
        inside = _iou(masks[0], masks[2], 1).max(axis=1, initial=0) >= _MATCH_IOU
        left_out = set(np.flatnonzero(inside).tolist()) - {p for _, p, _ in pairs}
    kept = [p for p in range(len(detections)) if p not in left_out]
    numbers = {p: i for i, p in enumerate(kept)}
    scores = [detections[p]["score"] for p in kept]
    pairs = [(t, numbers[p], iou) for t, p, iou in pairs]
    return Matches.of(true, [predicted[p] for p in kept], scores, pairs), len(left_out)


def _iou(first: list, second: list, crowd: int) -> np.ndarray:
    return np.reshape(mask_util.iou(first, second, [crowd] * len(second)), (len(first), len(second)))


def _curves(precision: np.ndarray) -> list[Curve]:
    mean = mean_of_classes(np.where(precision < 0, np.nan, precision))  # [10, 101]
    parts = {"IoU 0.50": mean[0], "IoU 0.75": mean[5], "mean of IoU 0.50 to 0.95": mean.mean(axis=0)}
    return [_curve(name, y) for name, y in parts.items()]


def _curve(name: str, precision: np.ndarray) -> Curve:
    return Curve(name, _RECALLS, np.where(precision < 0, np.nan, precision).tolist())
