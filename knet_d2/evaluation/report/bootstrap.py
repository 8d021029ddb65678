"""Bootstrap intervals: how much a metric would vary with other images of the same kind.

The images are drawn again, with replacement, and the metric is computed from them; 95% of the values are in the
interval (percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

import numpy as np

RESAMPLES = 1000
# If there are more images, they are divided into this number of groups, and groups are drawn: that saves memory.
MOST_GROUPS = 2000


def groups_of(num_images: int) -> np.ndarray:
    """Return the group of each image, int [num_images]; each image is its own group unless there are too many."""
    return np.arange(num_images) % MOST_GROUPS


def resample(num_groups: int, number: int = RESAMPLES) -> np.ndarray:
    """Draw ``num_groups`` groups with replacement, ``number`` times; returns counts, float32 [number, num_groups]."""
    draws = np.random.default_rng(0).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=number)
    return draws.astype(np.float32)


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95% interval of resampled values, without those that are NaN; None if no value is left."""
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else None


def mean_of_classes(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN; NaN where all are."""
    there = ~np.isnan(values)
    number = there.sum(axis=-1)
    total = np.where(there, values, 0).sum(axis=-1)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator > 0)
