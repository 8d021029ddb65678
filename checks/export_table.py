"""Export every architecture in both formats and both precisions, and compare each file with PyTorch in float32.

    python -m checks.export_table --output docs/benchmarks/exports.md                        # all architectures
    python -m checks.export_table coco/panoptic/knet_r50_fpn_1x.yaml --output exports.md     # adds or replaces rows

Weights are random, except that scores are all over (0, 1). What is compared is the class of each pixel: of the best
instance, of the panoptic segment, or of the semantic map. "same" is the share of pixels with the same class, over two
images of noise in a batch; "ms" is the median of a batch, "x PyTorch" its ratio to PyTorch's in float32.
A model with attention in windows is exported for the size of these images.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.export.graph import has_windows
from knet_d2.modeling.meta_arch import KNet
from knet_d2.programs import export_model, run

from .exports import Tensors, open_exported, run_model
from .references.cases import zoo_config

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
ENDINGS = (".onnx", ".pt2")
SIZE = (224, 320)
THRESHOLD = 0.3
ROUNDS = 3
HEADER = "| config | file | precision | MB | export, s | same | ms | x PyTorch |\n|---|---|---|---|---|---|---|---|\n"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="paths below configs/; default: all architectures")
    parser.add_argument("--output", required=True, metavar="FILE", help="Markdown file with the table")
    return parser


def save_random_model(cfg: CfgNode, path: str) -> KNet:
    """Write a model of a config with random weights; returns it."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for stage in model.cascade.stages:
        if hasattr(stage, "class_branch") and model.bank.num_matched:
            classifier = stage.class_branch[-1]
            torch.nn.init.normal_(classifier.weight, std=classifier.in_features**-0.5)
            torch.nn.init.normal_(classifier.bias)
    save_weights(path, model.state_dict(), describe_model(cfg))
    return model


def noise() -> np.ndarray:
    """Two images of coloured spots, uint8 [2, 3, H, W]."""
    rng = np.random.RandomState(0)
    spots = (cv2.resize(rng.randint(0, 256, (7, 10, 3), np.uint8), SIZE[::-1]) for _ in range(2))
    return np.stack([x.transpose(2, 0, 1) for x in spots])


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


def timed(call: Callable[[], list[Tensors]]) -> tuple[list[Tensors], float]:
    """The results of a batch, and the median of the seconds that it takes."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        results = call()
        seconds.append(time.perf_counter() - start)
    return results, statistics.median(seconds)


def rows_of(path: str) -> list[str]:
    """The table's rows of one architecture."""
    cfg = zoo_config(path)
    resolve_classes(cfg)
    cfg.MODEL.KNET.TEST.SCORE_THRESHOLD = cfg.MODEL.KNET.TEST.THING_SCORE_THRESHOLD = THRESHOLD
    cfg.MODEL.KNET.TEST.OVERLAP_THRESHOLD = 0.0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "model.pth")
        model = save_random_model(cfg, weights)
        expected, of_pytorch = timed(lambda: run_model(model, noise(), SIZE))
        fixed = ["--size", f"{SIZE[0]}x{SIZE[1]}"] if has_windows(model) else []
        for precision, options in (("fp32", []), ("fp16", ["--fp16"])):
            for ending in ENDINGS:
                words = [weights, os.path.join(folder, f"model{ending}"), *options, *fixed]
                try:
                    numbers = measure(words, model.postprocessor.options.outputs[0], expected, of_pytorch)
                except Exception as error:  # the exporters' exceptions have no common type
                    numbers = [f"refused: {' '.join(str(error).split())[:200]}", *[""] * 4]
                row = [path.removesuffix(".yaml"), ending + (", one size" if fixed else ""), precision, *numbers]
                rows.append(f"| {' | '.join(row)} |")
                print(rows[-1], flush=True)
                gc.collect()
    return rows


def measure(words: list[str], output: str, expected: list[Tensors], of_pytorch: float) -> list[str]:
    """Export a file and compare it with PyTorch; returns the numbers of its row.

    Args:
        words: of the command line of tools/export_model.py.
        output: the model's main output.
        expected, of_pytorch: results and seconds of a batch.
    """
    file, start, size = words[1], time.perf_counter(), np.array(SIZE)
    options = [*words, "--opts", "MODEL.KNET.TEST.OVERLAP_THRESHOLD", "0.0"]
    export_model.main(export_model.get_parser().parse_args(options))
    seconds, megabytes = time.perf_counter() - start, os.path.getsize(file) / 2**20
    runner = open_exported(file, output)
    found, of_file = timed(lambda: each(runner(noise(), size, size)))
    same = np.mean([class_map(x) == class_map(y) for x, y in zip(found, expected, strict=True)])
    os.remove(file)
    ratio = f"{of_file / of_pytorch:.2f}"
    return [f"{megabytes:.0f}", f"{seconds:.0f}", f"{same:.3%}", f"{1000 * of_file:.0f}", ratio]


def each(outputs: Tensors) -> list[Tensors]:
    """The outputs of each image of a batch."""
    return [{name: x[i] for name, x in outputs.items()} for i in range(len(next(iter(outputs.values()))))]


def main(args: argparse.Namespace) -> None:
    target = Path(args.output)
    for path in args.configs or ARCHITECTURES:
        known = target.read_text().removeprefix(HEADER).splitlines() if target.exists() else []
        name = path.removesuffix(".yaml")
        rows = [row for row in known if not row.startswith(f"| {name} |")] + rows_of(path)
        order = {x.removesuffix(".yaml"): i for i, x in enumerate(ARCHITECTURES)}
        rows.sort(key=lambda row: order.get(row.split(" | ")[0].removeprefix("| "), len(order)))
        target.write_text(HEADER + "\n".join(rows) + "\n")


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
