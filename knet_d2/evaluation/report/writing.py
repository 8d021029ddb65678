"""Writes OUTPUT_DIR/report.html: how good the model is, where it fails, and how the training run went."""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from PIL import Image
from torch import nn

from ...checkpoint import write_atomically
from ...data import load_dataset
from ...data.formats.builder import read_yaml
from ...errors import DataError
from ...results.comparison import draw_comparisons
from .page import RECOMMENDED, DatasetReport, Picture, page, training_charts
from .section import Section

logger = logging.getLogger(__name__)

REPORT = "report.html"
_NUM_WORST, _NUM_BEST = 8, 4
_NUM_LOGGED = 3
# Pixels of the longer side of the ground truth, and of the prediction beside it
_PICTURE_SIZE = 480
_JPEG_QUALITY = 80
# What is read of a report for its recommended threshold
_HEAD_LETTERS = 2000


def write_report(
    cfg: CfgNode,
    model: nn.Module,
    evaluators: Sequence[DatasetEvaluator],
    results: dict[str, Any],
    history: Sequence[dict[str, Any]] = (),
    name: str = REPORT,
) -> None:
    """Write the report of an evaluation to OUTPUT_DIR on the main process, if TEST.REPORT is on.

    Args:
        cfg: the config, with its classes resolved.
        model: the evaluated model; it draws the pictures.
        evaluators: the evaluators of DATASETS.TEST, after evaluate(); the report shows their ``sections``.
        results: all metrics, as DefaultTrainer.test returns them.
        history: records of metrics.json.
        name: of the file, see :func:`report_name`.
    """
    if not cfg.TEST.REPORT or not cfg.DATASETS.TEST or not comm.is_main_process():
        return
    datasets = []
    for dataset, evaluator in zip(cfg.DATASETS.TEST, evaluators, strict=True):
        of_dataset = getattr(evaluator, "sections", [])
        for section in of_dataset:
            for metric in section.metrics:
                if metric.interval:
                    low, high = metric.interval
                    logger.info(
                        f"{metric.name} of {dataset}: {metric.value:.2f}, 95% interval {low:.2f} to {high:.2f}."
                    )
        pictures = _draw(cfg, model, dataset, of_dataset[0]) if of_dataset else []
        if pictures:
            listed = ", ".join(f"{x.name} {x.quality:.3f}" for x in pictures[:_NUM_LOGGED])
            logger.info(f"Images of {dataset} with the lowest quality: {listed}.")
        datasets.append(DatasetReport(dataset, of_dataset, pictures))
    title = f"K-Net, {cfg.MODEL.KNET.TASK} segmentation: {', '.join(cfg.DATASETS.TEST)}"
    path = os.path.join(cfg.OUTPUT_DIR, name)
    content = page(title, training_charts(history), datasets, flatten_results_dict(results))
    write_atomically(path, lambda f: f.write(content))
    logger.info("Report of this evaluation: %s", path)


def report_name(cfg: CfgNode) -> str:
    """report.html; report_<names>.html for other data sets than DATASETS.TEST of the training run in OUTPUT_DIR.

    Thus an evaluation on training images replaces neither the run's report nor the threshold that it recommends.
    """
    try:
        own = list(read_yaml(os.path.join(cfg.OUTPUT_DIR, "config.yaml"))["DATASETS"]["TEST"])
    except (KeyError, TypeError, DataError):  # no training run was here
        return REPORT
    if own == list(cfg.DATASETS.TEST):
        return REPORT
    names = re.sub(r"[^\w.-]+", "_", "_".join(cfg.DATASETS.TEST))
    return f"report_{names}.html"


def recommended_threshold(folder: str) -> float | None:
    """The lowest score of an object that the report in a training run's folder recommends; None if it has none."""
    path = os.path.join(folder, REPORT)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as f:
        found = re.search(RECOMMENDED.format(r"(0\.\d\d)"), f.read(_HEAD_LETTERS))
    return float(found[1]) if found else None


def _draw(cfg: CfgNode, model: nn.Module, dataset: str, section: Section) -> list[Picture]:
    """Draw the worst images, then the best; no image twice."""
    ranked = sorted((x for x in section.qualities.items() if not math.isnan(x[1])), key=lambda x: x[1])
    worst = ranked[:_NUM_WORST]
    best = ranked[len(worst) :][::-1][:_NUM_BEST]
    wanted = dict(worst + best)
    records = {x[section.key]: x for x in load_dataset(dataset, "DATASETS.TEST") if x.get(section.key) in wanted}
    score = None if section.thresholds is None else float(section.thresholds.scores[section.thresholds.best])
    drawn = draw_comparisons(cfg, model, [records[key] for key in wanted], score, _PICTURE_SIZE)
    try:
        return [
            Picture(os.path.basename(records[key]["file_name"]), quality, _jpeg(picture))
            for (key, quality), picture in zip(wanted.items(), drawn, strict=True)
        ]
    except DataError as error:  # pictures read all ground truth of a record, an evaluation maybe not all
        logger.warning("The report has no pictures of %s: %s", dataset, error)
        return []


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
