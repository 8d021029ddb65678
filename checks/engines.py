"""Compare engines and exported files on a data set: AP, PQ or mIoU of one model, and milliseconds per image.

    python -m checks.engines m.pth m.onnx m.onnx=openvino m_int8.onnx --config-file configs/shapes/panoptic.yaml

The weights file is computed by PyTorch, an exported file by onnxruntime or by the engine behind its name. All are asked
image by image in turn, so that a change of the machine's speed meets them alike. Times are medians with reading the
file and making masks of the image's size: of the clock, and of the processor, which other programs disturb less.
"""

import argparse
import logging
import os
import statistics
import sys
import time
from typing import Any

import torch

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


def main(args: argparse.Namespace) -> None:
    logging.disable(logging.INFO)  # the evaluators' tables
    torch.set_num_threads(1)
    cfg = load_config(args.config_file, args.opts)
    name, table = cfg.DATASETS.TEST[0], class_table(cfg)
    output = get_task(cfg).checked_outputs(cfg.MODEL.KNET.TEST.OUTPUTS)[0]
    predictors, evaluators = {}, {}
    seconds: dict[str, list[tuple[float, float]]] = {path: [] for path in args.models}
    for path in args.models:
        file, _, engine = path.partition("=")
        threshold = args.confidence_threshold
        predictors[path] = load(file, confidence_threshold=threshold, device="cpu", engine=engine or None)
        (evaluators[path],) = build_evaluators(cfg, name)
        evaluators[path].reset()
    records: list[dict[str, Any]] = load_dataset(name)
    for record in records:
        for path, predictor in predictors.items():
            start = time.perf_counter(), time.process_time()
            prediction = predictor(record["file_name"])
            seconds[path].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            found = {output: result_of(output, prediction._replace(classes=table))}
            evaluators[path].process([record], [found])
    group, metric = METRICS[output]
    print(f"{name}, {len(records)} images, 1 thread\n{'model':32} {metric:>8} {'ms':>8} {'CPU ms':>8}")
    for path in args.models:
        value = evaluators[path].evaluate()[group][metric]
        clock, processor = (1000 * statistics.median(x) for x in zip(*seconds[path]))
        print(f"{os.path.basename(path):32} {value:8.2f} {clock:8.1f} {processor:8.1f}")


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
