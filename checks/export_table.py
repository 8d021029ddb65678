"""Export every architecture in both formats and all precisions, and compare each file with PyTorch in float32.

    python -m checks.export_table --output docs/benchmarks/exports.md                        # all architectures
    python -m checks.export_table coco/panoptic/knet_r50_fpn_1x.yaml --output exports.md     # one of them

Weights are random, with scores all over (0, 1) and mask logits as large as those of trained models. What is compared is
the class of each pixel: of the best instance, of the panoptic segment, or of the semantic map. "same" is the share of
pixels with the same class, over two generated images in a batch. "ms" is the median processor time of a batch in one
thread, and "x PyTorch" its ratio to PyTorch's in float32, which takes turns with the file. A model with attention in
windows is exported for the size of these images. Integers are calibrated on six other generated images.

Each architecture has a process of its own, whose memory --memory limits. Rows that the table has are kept, so that the
same command continues after an interruption; delete rows to measure them again.
"""

import argparse
import copy
import gc
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.export import ExportedProgram

from knet_d2.data.classes import class_table
from knet_d2.export import INPUT_NAMES, default_image_type, export_metadata, halve, save_onnx, save_pt2, trace
from knet_d2.export.graph import has_windows
from knet_d2.export.quantization import quantize
from knet_d2.programs import run
from knet_d2.programs.benchmark.filling import MASK_LOGITS, damp_residual_blocks
from knet_d2.programs.benchmark.models import Subject, build_subject

from .exports import Runner, Tensors, open_exported, run_model

ARCHITECTURES = (
    "coco/instance/knet_r50_fpn_1x.yaml",
    "coco/instance/knet_r50_fpn_1x_modern.yaml",
    "coco/instance/knet_r101_dcn_fpn_3x.yaml",
    "coco/panoptic/knet_r50_fpn_1x.yaml",
    "coco/panoptic/knet_r50_fpn_1x_modern.yaml",
    "coco/panoptic/knet_r101_fpn_3x.yaml",
    "coco/panoptic/knet_swin_l_fpn_3x.yaml",
    "ade20k/semantic/knet_fcn_r50_d8_80k.yaml",
    "ade20k/semantic/knet_pspnet_r50_d8_80k.yaml",
    "ade20k/semantic/knet_deeplabv3_r50_d8_80k.yaml",
    "ade20k/semantic/knet_upernet_r50_80k.yaml",
    "ade20k/semantic/knet_upernet_swin_t_80k.yaml",
    "ade20k/semantic/knet_upernet_swin_l_80k.yaml",
    "lite/instance_lite0.yaml",
    "lite/panoptic_lite0.yaml",
    "lite/semantic_lite0.yaml",
)
WRITERS = {".pt2": save_pt2, ".onnx": save_onnx}
# (precision, ending) of the files of an architecture
FILES = (("fp32", ".pt2"), ("fp32", ".onnx"), ("int8", ".onnx"), ("fp16", ".pt2"), ("fp16", ".onnx"))
SIZE = (128, 192)
THRESHOLD = 0.3
OPTIONS = {"SCORE_THRESHOLD": THRESHOLD, "THING_SCORE_THRESHOLD": THRESHOLD, "OVERLAP_THRESHOLD": 0.0}
ROUNDS = 3
NUM_COMPARED, NUM_CALIBRATED = 2, 6
HEADER = (
    "| config | file | precision | size | MB | export, s | same | ms | x PyTorch |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)

T = TypeVar("T")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="paths below configs/; default: all architectures")
    parser.add_argument("--output", required=True, metavar="FILE", help="Markdown file with the table")
    parser.add_argument("--memory", type=float, default=14, metavar="GB", help="address space of each process")
    return parser


def class_map(result: Tensors) -> np.ndarray:
    """The class of each pixel of one image, [h, w]; -1 where there is none."""
    if "label_map" in result:
        return result["label_map"]
    if "segment_map" in result:
        return np.append(-1, result["labels"])[result["segment_map"]]
    classes = np.full(result["masks"].shape[1:], -1)
    for score, label, mask in reversed(list(zip(result["scores"], result["labels"], result["masks"]))):
        if score >= THRESHOLD:
            classes[mask] = label
    return classes


@torch.no_grad()
def random_subject(config: str, size: tuple[int, int]) -> Subject:
    """A model of a config with random weights, in evaluation mode, whose results do not hang on rounding.

    Without the scaling, the mask logits of an untrained model are 20 times as large as trained ones: the softmax of a
    semantic model then chooses one kernel for each pixel, and each stage multiplies the rounding of the one before.

    Args:
        size: of the images in which its logits get their scale.
    """
    options = (f"MODEL.KNET.TEST.{key}={value}" for key, value in OPTIONS.items())
    subject = build_subject(",".join([config, *options]), "cpu")
    model = subject.model.eval()
    damp_residual_blocks(model)
    inputs = subject.inputs(size, 1, size)
    for stage in model.cascade.stages:
        if stage.class_branch is not None:
            classifier = stage.class_branch[-1]
            torch.nn.init.normal_(classifier.weight, std=classifier.in_features**-0.5)
            torch.nn.init.normal_(classifier.bias)
        found: list[torch.Tensor] = []
        hook = stage.register_forward_hook(lambda _, __, output, found=found: found.append(output.mask_logits))
        model(inputs)
        hook.remove()
        for parameter in stage.mask_branch[-1].parameters():
            parameter *= MASK_LOGITS[1] / found[0].std()
    return subject


def rows_of(path: str, files: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The table's rows of one architecture, each as soon as it is measured.

    Args:
        files: those of FILES that are asked for.
    """
    subject = random_subject(path, SIZE)
    images = np.stack([x["image"].numpy() for x in subject.inputs(SIZE, NUM_COMPARED + NUM_CALIBRATED, SIZE)])
    compared, calibration = images[:NUM_COMPARED], images[NUM_COMPARED:]
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(subject, folder, calibration)
        for precision, ending in files:
            try:
                file, seconds = writer.write(precision, ending)
                runner = open_exported(file, writer.metadata["output"])
                numbers = [f"{os.path.getsize(file) / 2**20:.0f}", f"{seconds:.0f}"]
                numbers += measure(lambda: run_model(subject.model, compared, SIZE), runner, compared)
            except Exception as error:  # the exporters' exceptions have no common type
                numbers = [f"refused: {' '.join(str(error).split())[:200]}", *[""] * 4]
            size = "any" if writer.fixed is None else "one"
            yield f"| {' | '.join([path.removesuffix('.yaml'), ending, precision, size, *numbers])} |"
            gc.collect()


class Writer:
    """Writes the files of one architecture; one trace serves all files of its precision."""

    def __init__(self, subject: Subject, folder: str, calibration: np.ndarray):
        """
        Args:
            folder: for the files.
            calibration: images for the ranges of integers, [B, C, H, W].
        """
        self.model, self.folder, self.calibration = subject.model, folder, calibration
        self.fixed = SIZE if has_windows(subject.model) else None
        self.image_type = default_image_type(subject.cfg)
        classes = class_table(subject.cfg)
        self.metadata = export_metadata(subject.cfg, classes, subject.model, self.image_type, self.fixed)
        self.traced: tuple[str, ExportedProgram, float] | None = None
        self.seconds: dict[str, float] = {}  # of written files

    def write(self, precision: str, ending: str) -> tuple[str, float]:
        """Write a file once; returns its path, and the seconds of processor time from the model to the file."""
        file = os.path.join(self.folder, precision + ending)
        if file not in self.seconds:
            self.seconds[file] = self._write(file, precision, ending)
        return file, self.seconds[file]

    def _write(self, file: str, precision: str, ending: str) -> float:
        if precision == "int8":
            source, before = self.write("fp32", ending)
            sizes = np.array(SIZE), np.array(SIZE)
            inputs = (dict(zip(INPUT_NAMES, (image[None], *sizes))) for image in self.calibration)
            _, seconds = timed(lambda: quantize(source, file, inputs))
            return before + seconds
        if self.traced is None or self.traced[0] != precision:
            self.traced = None  # frees its memory
            model = halve(copy.deepcopy(self.model)) if precision == "fp16" else self.model
            self.traced = precision, *timed(lambda: trace(model, self.image_type, self.fixed))
        _, program, before = self.traced
        _, seconds = timed(lambda: WRITERS[ending](program, file, self.metadata))
        return before + seconds


def measure(pytorch: Callable[[], list[Tensors]], runner: Runner, images: np.ndarray) -> list[str]:
    """Compare a file with PyTorch; returns the last numbers of its row.

    Args:
        pytorch: predicts the images.
        runner: of the file.
        images: [B, C, H, W].
    """
    size = np.array(SIZE)
    rounds = [(timed(pytorch), timed(lambda: each(runner(images, size, size)))) for _ in range(ROUNDS)]
    of_pytorch, of_file = (statistics.median(x[i][1] for x in rounds) for i in (0, 1))
    (expected, _), (found, _) = rounds[0]
    same = np.mean([class_map(x) == class_map(y) for x, y in zip(found, expected, strict=True)])
    return [f"{same:.3%}", f"{1000 * of_file:.0f}", f"{of_file / of_pytorch:.2f}"]


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds of this thread's processor time that it took."""
    start = time.thread_time()
    return call(), time.thread_time() - start


def each(outputs: Tensors) -> list[Tensors]:
    """The outputs of each image of a batch."""
    return [{name: x[i] for name, x in outputs.items()} for i in range(len(next(iter(outputs.values()))))]


def read_rows(target: Path) -> dict[tuple[str, ...], str]:
    """The rows of the table in a file, by config, ending and precision."""
    lines = target.read_text().removeprefix(HEADER).splitlines() if target.exists() else []
    return {tuple(x.removeprefix("| ").split(" | ")[:3]): x for x in lines}


def add_row(target: Path, row: str) -> None:
    """Add a row to the table in a file."""
    order = {x.removesuffix(".yaml"): i for i, x in enumerate(ARCHITECTURES)}
    rows = [*read_rows(target).values(), row]
    rows.sort(key=lambda x: order.get(x.split(" | ")[0].removeprefix("| "), len(order)))
    target.write_text(HEADER + "\n".join(rows) + "\n")


def fill_rows(path: str, files: Sequence[tuple[str, str]], target: Path, memory: float) -> None:
    """Measure rows of one architecture, in a process of its own."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    for row in rows_of(path, files):
        print(row, flush=True)
        add_row(target, row)
    print(f"{path}: at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of memory", flush=True)


def main(args: argparse.Namespace) -> int:
    target, failed = Path(args.output), []
    for path in args.configs or ARCHITECTURES:
        known = read_rows(target)
        files = [x for x in FILES if (path.removesuffix(".yaml"), x[1], x[0]) not in known]
        if not files:
            continue
        arguments = path, files, target, args.memory
        process = multiprocessing.get_context("spawn").Process(target=fill_rows, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            failed.append(path)
    if failed:
        print(f"Not complete: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
