"""Export every architecture in both formats and both precisions, and compare each file with PyTorch in float32.

    python -m checks.export_table --output docs/benchmarks/exports.md                        # all architectures
    python -m checks.export_table coco/panoptic/knet_r50_fpn_1x.yaml --output exports.md     # adds or replaces rows

Weights are random, with scores all over (0, 1) and mask logits as large as those of trained models. What is compared is
the class of each pixel: of the best instance, of the panoptic segment, or of the semantic map. "same" is the share of
pixels with the same class, over two generated images in a batch. "ms" is the median processor time of a batch in one
thread, and "x PyTorch" its ratio to PyTorch's in float32, which takes turns with the file. A model with attention in
windows is exported for the size of these images.
"""

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from knet_d2.data.classes import class_table
from knet_d2.export import default_image_type, export_metadata, halve, save_onnx, save_pt2, trace
from knet_d2.export.graph import has_windows
from knet_d2.programs import run
from knet_d2.programs.benchmark.filling import MASK_LOGITS, damp_residual_blocks
from knet_d2.programs.benchmark.models import Subject, build_subject

from .exports import Tensors, open_exported, run_model

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
PRECISIONS = ("fp32", "fp16")
SIZE = (128, 192)
THRESHOLD = 0.3
OPTIONS = {"SCORE_THRESHOLD": THRESHOLD, "THING_SCORE_THRESHOLD": THRESHOLD, "OVERLAP_THRESHOLD": 0.0}
ROUNDS = 3
HEADER = "| config | file | precision | MB | export, s | same | ms | x PyTorch |\n|---|---|---|---|---|---|---|---|\n"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="paths below configs/; default: all architectures")
    parser.add_argument("--output", required=True, metavar="FILE", help="Markdown file with the table")
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


def rows_of(path: str) -> Iterator[str]:
    """The table's rows of one architecture, each as soon as it is measured."""
    subject = random_subject(path, SIZE)
    model = subject.model
    images = np.stack([x["image"].numpy() for x in subject.inputs(SIZE, 2, SIZE)])
    fixed = SIZE if has_windows(model) else None
    image_type = default_image_type(subject.cfg)
    metadata = export_metadata(subject.cfg, class_table(subject.cfg), model, image_type, fixed)
    for precision in PRECISIONS:
        start = time.perf_counter()
        program: ExportedProgram | Exception
        try:
            program = trace(halve(copy.deepcopy(model)) if precision == "fp16" else model, image_type, fixed)
        except Exception as error:  # the exporters' exceptions have no common type
            program = error
        traced = time.perf_counter() - start
        for ending in WRITERS:
            try:
                if isinstance(program, Exception):
                    raise program
                numbers = measure(program, ending, metadata, traced, lambda: run_model(model, images, SIZE), images)
            except Exception as error:
                numbers = [f"refused: {' '.join(str(error).split())[:200]}", *[""] * 4]
            row = [path.removesuffix(".yaml"), ending + (", one size" if fixed else ""), precision, *numbers]
            yield f"| {' | '.join(row)} |"
            gc.collect()


def measure(
    program: ExportedProgram,
    ending: str,
    metadata: dict[str, str],
    traced: float,
    pytorch: Callable[[], list[Tensors]],
    images: np.ndarray,
) -> list[str]:
    """Write a file and compare it with PyTorch; returns the numbers of its row.

    Args:
        traced: seconds that the program took.
        pytorch: predicts the images.
        images: [B, C, H, W].
    """
    start, size = time.perf_counter(), np.array(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, f"model{ending}")
        WRITERS[ending](program, file, metadata)
        seconds, megabytes = traced + time.perf_counter() - start, os.path.getsize(file) / 2**20
        runner = open_exported(file, metadata["output"])
    rounds = [(timed(pytorch), timed(lambda: each(runner(images, size, size)))) for _ in range(ROUNDS)]
    of_pytorch, of_file = (statistics.median(x[i][1] for x in rounds) for i in (0, 1))
    (expected, _), (found, _) = rounds[0]
    same = np.mean([class_map(x) == class_map(y) for x, y in zip(found, expected, strict=True)])
    return [
        f"{megabytes:.0f}",
        f"{seconds:.0f}",
        f"{same:.3%}",
        f"{1000 * of_file:.0f}",
        f"{of_file / of_pytorch:.2f}",
    ]


def timed(call: Callable[[], list[Tensors]]) -> tuple[list[Tensors], float]:
    """The results of a batch, and the seconds of this thread's processor time that they took."""
    start = time.thread_time()
    return call(), time.thread_time() - start


def each(outputs: Tensors) -> list[Tensors]:
    """The outputs of each image of a batch."""
    return [{name: x[i] for name, x in outputs.items()} for i in range(len(next(iter(outputs.values()))))]


def write_row(target: Path, row: str) -> None:
    """Add a row to the table in a file, or replace that of the same file and precision."""
    known = target.read_text().removeprefix(HEADER).splitlines() if target.exists() else []
    rows = [x for x in known if x.split(" | ")[:3] != row.split(" | ")[:3]] + [row]
    order = {x.removesuffix(".yaml"): i for i, x in enumerate(ARCHITECTURES)}
    rows.sort(key=lambda x: order.get(x.split(" | ")[0].removeprefix("| "), len(order)))
    target.write_text(HEADER + "\n".join(rows) + "\n")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for path in args.configs or ARCHITECTURES:
        for row in rows_of(path):
            print(row, flush=True)
            write_row(Path(args.output), row)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
