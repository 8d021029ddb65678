"""Measure what makes a prediction on one CPU core faster: one lever at a time, in turns in one process.

    python -m checks.levers coco/panoptic/knet_r50_fpn_1x.yaml lite/panoptic_lite0.yaml --size 320x320 512x512

Every lever computes the same image with the same weights, from pixels to results. "time" is the median ratio of its
processor time to that of PyTorch as it is, which computes before and after it; below 1 is faster. "same" is the share
of the result's pixels that have the same class.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate

from knet_d2.data.classes import class_table
from knet_d2.errors import ConfigError
from knet_d2.export import OUTPUT_NAMES, export_metadata, save_onnx, trace
from knet_d2.inference.runtimes import open_runtime
from knet_d2.modeling import meta_arch
from knet_d2.programs import run
from knet_d2.programs.benchmark.models import Subject

from .export_table import class_map, each, random_subject
from .exports import Tensors, run_model

Call = Callable[[], list[Tensors]]
# A lever: from a model, images [B, C, H, W] and a folder for files of the model to a function that predicts the images
Lever = Callable[[Subject, np.ndarray, str], Call]


def as_it_is(subject: Subject, images: np.ndarray, folder: str) -> Call:
    return lambda: run_model(subject.model, images, images.shape[2:])


def without(name: str, value: Any, module: Any, subject: Subject, images: np.ndarray, folder: str) -> Call:
    """The model without one of the levers that it uses: a function of a module is replaced."""
    model = copy.deepcopy(subject.model)

    def predict() -> list[Tensors]:
        with mock.patch.object(module, name, value):
            return run_model(model, images, images.shape[2:])

    return predict


def bfloat16(subject: Subject, images: np.ndarray, folder: str) -> Call:
    def predict() -> list[Tensors]:
        with torch.autocast("cpu", torch.bfloat16):
            return run_model(subject.model, images, images.shape[2:])

    return predict


def compiled(subject: Subject, images: np.ndarray, folder: str, **options: Any) -> Call:
    """MODEL.COMPILE; options are torch.compile's."""
    model = copy.deepcopy(subject.model)
    function = torch.compile(lambda model, *inputs: model.static_network(*inputs), dynamic=False, options=options)
    model.compiled = function
    return as_it_is(subject._replace(model=model), images, folder)


def exported(subject: Subject, images: np.ndarray, folder: str, engine: str = "onnxruntime") -> Call:
    model, path = subject.model, os.path.join(folder, "model.onnx")
    metadata = export_metadata(subject.cfg, class_table(subject.cfg), model)
    if not os.path.exists(path):
        save_onnx(trace(model), path, metadata)
    runtime, size = open_runtime(engine, path, "cpu"), np.array(images.shape[2:])
    names = OUTPUT_NAMES[metadata["output"]]
    inputs = {"image": images, "image_size": size, "output_size": size}
    return lambda: each(dict(zip(names, runtime(inputs))))


LEVERS: dict[str, Lever] = {
    "without channels_last": functools.partial(without, "channels_last", lambda x: x, meta_arch),
    "onnxruntime": exported,
    "OpenVINO": functools.partial(exported, engine="openvino"),
    "bfloat16 (autocast)": bfloat16,
    "torch.compile": compiled,
    "torch.compile, all weights packed": functools.partial(compiled, freezing=True),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="paths below configs/")
    parser.add_argument("--size", nargs="+", default=["320x320", "512x512"], help="of the image, HxW")
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=list(LEVERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def timed(call: Call) -> float:
    """Seconds of processor time, of all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(
    subject: Subject, images: np.ndarray, folder: str, levers: Sequence[str], rounds: int
) -> Iterator[list[Any]]:
    """Rows of the table."""
    base = as_it_is(subject, images, folder)
    expected = base()
    yield ["as it is", 1000 * statistics.median(timed(base) for _ in range(rounds)), 1.0, ""]
    for name in levers:
        try:
            call = LEVERS[name](subject, images, folder)
            found = call()
        except ConfigError as error:
            yield [name, "", "", str(error)]
            continue
        same = np.mean([class_map(x) == class_map(y) for x, y in zip(found, expected, strict=True)])
        times = [(timed(base), timed(call), timed(base)) for _ in range(rounds)]
        ratio = statistics.median(2 * b / (a + c) for a, b, c in times)
        yield [name, 1000 * statistics.median(x[1] for x in times), ratio, f"{same:.3%}"]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sizes = [tuple(map(int, text.split("x"))) for text in args.size]
    rows = []
    for config in args.configs:
        subject = random_subject(config, sizes[0])
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for size in sizes:
                images = subject.inputs(size, 1, size)[0]["image"][None].numpy()
                for row in compare(subject, images, folder, args.levers, args.rounds):
                    rows.append([config.removesuffix(".yaml"), f"{size[0]} x {size[1]}", *row])
                    print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    headers = ["model", "size", "lever", "ms", "time", "same"]
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=(*"gg", "", ".0f", ".2f")))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
