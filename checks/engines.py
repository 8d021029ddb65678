"""Compare engines and exported files on a data set: AP, PQ or mIoU, pixels of the same class, milliseconds per image.

    python -m checks.engines m.pth m.onnx m.onnx=openvino m_int8.onnx --config-file configs/shapes/panoptic.yaml

The weights file is computed by PyTorch, an exported file by onnxruntime or by the engine behind its name. All are asked
image by image in turn, so that a change of the machine's speed meets them alike. "same" is the share of the pixels that
have the class which the first model gives them. Times are medians with reading the file and making masks of the image's
size: of the clock, and of the processor, which other programs disturb less.
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode

from knet_d2.config.merging import load_config
from knet_d2.data.classes import class_table
from knet_d2.data.records import load_dataset
from knet_d2.evaluation import build_evaluators
from knet_d2.inference.from_file import load
from knet_d2.programs import run
from knet_d2.results.outputs import result_of
from knet_d2.tasks import get_task

# Evaluated output -> metric
METRICS = {"instances": ("segm", "AP"), "panoptic_seg": ("panoptic_seg", "PQ"), "sem_seg": ("sem_seg", "mIoU")}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="weights or FILE.onnx[=ENGINE] of one model")
    parser.add_argument("--config-file", required=True, help="config of the model, with the data set in DATASETS.TEST")
    parser.add_argument("--confidence-threshold", type=float, default=0.0, help="a panoptic model: that of its export")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


class Measured(NamedTuple):
    """A model on a data set.

    Attributes:
        value: AP, PQ or mIoU.
        same: share of the pixels with the same class as in the results of the first model.
        clock, processor: median seconds of an image.
    """

    value: float
    same: float
    clock: float
    processor: float


def measure(models: Sequence[str], cfg: CfgNode, confidence_threshold: float) -> dict[str, Measured]:
    """Evaluate models on the first data set in DATASETS.TEST, image by image in turn.

    Args:
        models: weights or FILE.onnx[=ENGINE].
    """
    name, table = cfg.DATASETS.TEST[0], class_table(cfg)
    output = get_task(cfg).checked_outputs(cfg.MODEL.KNET.TEST.OUTPUTS)[0]
    predictors, evaluators = {}, {}
    seconds: dict[str, list[tuple[float, float]]] = {path: [] for path in models}
    for path in models:
        file, _, engine = path.partition("=")
        predictors[path] = load(file, confidence_threshold=confidence_threshold, device="cpu", engine=engine or None)
        (evaluators[path],) = build_evaluators(cfg, name)
        evaluators[path].reset()
    same: dict[str, list[float]] = {path: [] for path in models}
    records: list[dict[str, Any]] = load_dataset(name)
    for record in records:
        expected = None
        for path, predictor in predictors.items():
            start = time.perf_counter(), time.process_time()
            prediction = predictor(record["file_name"])
            seconds[path].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            found = {output: result_of(output, prediction._replace(classes=table))}
            evaluators[path].process([record], [found])
            classes = prediction.class_map()
            expected = classes if expected is None else expected
            same[path].append(float(np.mean(classes == expected)))
    group, metric = METRICS[output]
    with contextlib.redirect_stdout(None):  # pycocotools' tables
        values = {path: evaluators[path].evaluate()[group][metric] for path in models}
    return {
        path: Measured(value, statistics.mean(same[path]), *map(statistics.median, zip(*seconds[path])))
        for path, value in values.items()
    }


def print_table(cfg: CfgNode, measured: Mapping[str, Measured]) -> None:
    (_, metric), name = METRICS[get_task(cfg).checked_outputs(cfg.MODEL.KNET.TEST.OUTPUTS)[0]], cfg.DATASETS.TEST[0]
    print(f"{name}, {len(load_dataset(name))} images, 1 thread")
    print(f"{'model':40} {metric:>8} {'same':>9} {'ms':>8} {'CPU ms':>8}")
    for path, x in measured.items():
        print(
            f"{os.path.basename(path):40} {x.value:8.2f} {x.same:9.3%} {1000 * x.clock:8.1f} {1000 * x.processor:8.1f}"
        )


def main(args: argparse.Namespace) -> None:
    logging.disable(logging.INFO)  # the evaluators' tables
    torch.set_num_threads(1)
    cfg = load_config(args.config_file, args.opts)
    print_table(cfg, measure(args.models, cfg, args.confidence_threshold))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
