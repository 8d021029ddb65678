"""Measure what bounds a model in 8-bit integers: its time by operator, and what it loses by each group of layers.

    python -m checks.engines_int8 model.onnx --int8 datasets/shapes/v1/train/images \\
        --config-file configs/shapes/panoptic.yaml --leave-out backbone.bottom_up sem_seg_head

The float32 file is quantised as a whole, and once for each name behind --leave-out with the layers of this name in
float32. Of every file, this prints AP, PQ or mIoU and the time of an image, as checks.engines does, and then the time
in each operator of onnxruntime, of the float32 file and of the first integer file: the sum over the nodes of the median
over images.
"""

import argparse
import collections
import json
import logging
import os
import statistics
import sys
import tempfile

import onnxruntime
import torch

from knet_d2.config.merging import load_config
from knet_d2.data.records import load_dataset
from knet_d2.export.quantization import quantize
from knet_d2.inference.inputs import read_input
from knet_d2.inference.onnx_engine import OnnxPredictor
from knet_d2.programs import run
from knet_d2.programs.export_model import calibration_inputs

from .engines import measure, print_table

# Operators with less than this share of a file's time are summed up
SMALLEST_SHARE = 0.01


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="float32 FILE.onnx")
    parser.add_argument(
        "--int8", nargs="+", required=True, metavar="IMAGES", help="images of training, to calibrate on"
    )
    parser.add_argument("--int8-images", type=int, default=100, metavar="N", help="most images of the calibration")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="NAME", help="as --int8-float of the export")
    parser.add_argument("--config-file", required=True, help="config of the model, with the data set in DATASETS.TEST")
    parser.add_argument("--confidence-threshold", type=float, default=0.0, help="a panoptic model: that of its export")
    parser.add_argument("--profiled", type=int, default=20, metavar="N", help="images of the time by operator")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def times_of_operators(path: str, files: list[str]) -> dict[str, float]:
    """Milliseconds of an image in each operator of onnxruntime.

    Args:
        path: ONNX file.
        files: images.
    """
    engine, options = OnnxPredictor(path), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for file in files:
            session.run(None, engine.inputs([engine.sample(read_input(file, None, engine.pixel_format))]))
        with open(session.end_profiling()) as profile:
            events = json.load(profile)
    of_node = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            of_node[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    found: dict[str, float] = collections.defaultdict(float)
    for (operator, _), times in of_node.items():
        found[operator] += statistics.median(times)
    return found


def print_operators(times: dict[str, dict[str, float]]) -> None:
    """Print the time of each operator in each file."""
    totals = {path: sum(found.values()) for path, found in times.items()}
    names = {name for path, found in times.items() for name, x in found.items() if x >= SMALLEST_SHARE * totals[path]}
    print(f"\n{'ms of an image in':32} " + " ".join(f"{os.path.basename(path):>16}" for path in times))
    for name in sorted(names, key=lambda x: -max(found.get(x, 0) for found in times.values())):
        print(f"{name:32} " + " ".join(f"{found.get(name, 0):16.2f}" for found in times.values()))
    others = [sum(x for name, x in found.items() if name not in names) for found in times.values()]
    print(f"{'others':32} " + " ".join(f"{x:16.2f}" for x in others))
    print(f"{'all':32} " + " ".join(f"{x:16.2f}" for x in totals.values()))


def main(args: argparse.Namespace) -> None:
    logging.disable(logging.WARNING)  # onnxruntime advises to optimise a graph that is
    torch.set_num_threads(1)
    cfg, engine = load_config(args.config_file, args.opts), OnnxPredictor(args.model)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, "int8.onnx")]
        files += [os.path.join(folder, f"int8 without {name}.onnx") for name in args.leave_out]
        for file, excluded in zip(files, [(), *((name,) for name in args.leave_out)], strict=True):
            quantize(args.model, file, calibration_inputs(engine, args.int8, args.int8_images), excluded=excluded)
        print_table(cfg, measure([args.model, *files], cfg, args.confidence_threshold))
        images = [x["file_name"] for x in load_dataset(cfg.DATASETS.TEST[0])[: args.profiled]]
        print_operators({path: times_of_operators(path, images) for path in (args.model, files[0])})


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
