"""What the report shows of one output of a model on one data set; evaluators build it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Score thresholds that are compared: 0.01, 0.02, ..., 0.99
_STEPS = 100


class Metric(NamedTuple):
    """A metric in percent with its 95% interval; None: there are too few images for an interval."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


class ClassRow(NamedTuple):
    """A class: the interval of its main metric, and one value for each column of the table (NaN: it has none)."""

    name: str
    interval: tuple[float, float] | None
    values: tuple[float, ...]


class Curve(NamedTuple):
    """A curve of a chart; y may contain NaN."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Thresholds(NamedTuple):
    """Precision and recall of the predictions at or above each score threshold, arrays [n]; NaN where undefined."""

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray, num_objects: int, lowest: float = 0.0) -> Thresholds | None:
        """Compare thresholds in steps of 0.01.

        Args:
            scores: score of each prediction [n].
            right: whether each prediction is right [n].
            num_objects: number of objects that are to be found.
            lowest: the lowest score that the model gives; thresholds begin at the last step that is not above it.

        Returns:
            None if no prediction is right.
        """
        if not right.any() or not num_objects:
            return None
        steps = np.arange(np.clip(int(lowest * _STEPS + 1e-9), 1, _STEPS - 1), _STEPS) / _STEPS
        order = np.argsort(scores, kind="stable")
        first = np.searchsorted(scores[order], steps, side="left")
        kept = len(scores) - first
        hits = np.append(np.cumsum(right[order][::-1])[::-1], 0)[first]
        precision = np.divide(hits, kept, out=np.full(len(steps), np.nan), where=kept > 0)
        return cls(steps, precision, hits / num_objects)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall, 0 where both are 0 or nothing is predicted."""
        total = np.nan_to_num(self.precision) + self.recall
        product = 2 * np.nan_to_num(self.precision) * self.recall
        return np.divide(product, total, out=np.zeros(len(total)), where=total > 0)

    @property
    def best(self) -> int:
        """Index of the threshold with the highest F1; of several equal ones in a row, the middle one."""
        is_best = self.f1 == self.f1.max()
        first = int(is_best.argmax())
        length = int(np.append(is_best[first:], False).argmin())
        return first + (length - 1) // 2


class Section(NamedTuple):
    """The evaluation of one output.

    Attributes:
        title: name of the output, and what is counted.
        metrics: main metrics with intervals.
        columns: titles of the columns of the table of classes; the table is sorted by the first.
        rows: the classes.
        names: names of the classes, for the confusion matrix.
        confusion: counts [K + 1, K + 1] by predicted class (row) and true class (column). The last row counts what was
            missed, the last column what was predicted where nothing is. Row sums are the numbers of predictions, column
            sums those of objects (for label maps: of pixels, without a last row and column).
        notes: sentences on what was counted.
        curves: precision by recall.
        class_curves: the same for each class.
        thresholds: None if the predictions have no scores.
        threshold_option: the config option that the thresholds are values of.
        qualities: quality of each image, 0 to 1 (NaN: there is nothing to find, and nothing was found).
        key: key of the data set's records that names an image in ``qualities``.
    """

    title: str
    metrics: list[Metric]
    columns: tuple[str, ...]
    rows: list[ClassRow]
    names: list[str]
    confusion: np.ndarray
    notes: list[str]
    curves: list[Curve]
    class_curves: list[Curve]
    thresholds: Thresholds | None
    threshold_option: str
    qualities: dict[Any, float]
    key: str
