"""Compare engines and exported files on a COCO data set: mask AP of one model, and milliseconds per image.

    python -m checks.engines m.pth m.onnx m.onnx=openvino m_int8.onnx --annotations val.json --images val/images

The weights file is computed by PyTorch, an exported file by onnxruntime or by the engine behind its name. All are asked
image by image in turn, so that a change of the machine's speed meets them alike; the time is the median, with reading
the file. Of a panoptic model, the AP is that of its things.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import time

import torch
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO

from knet_d2.inference.from_file import load
from knet_d2.programs import run


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="weights or FILE.onnx[=ENGINE] of one model")
    parser.add_argument("--annotations", required=True, help="COCO JSON")
    parser.add_argument("--images", required=True, help="folder of its images")
    parser.add_argument("--confidence-threshold", type=float, default=0.0, help="a panoptic model: that of its export")
    parser.add_argument("--number", type=int, default=100, help="number of images")
    return parser


def mask_ap(truth: COCO, images: list[int], results: list[dict]) -> float:
    """COCO's AP of masks on some images; 0 without results."""
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval_opt(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def main(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(args.annotations)
    predictors = {}
    for path in args.models:
        file, _, engine = path.partition("=")
        threshold = args.confidence_threshold
        predictors[path] = load(file, confidence_threshold=threshold, device="cpu", engine=engine or None)
    images = sorted(truth.imgs)[: args.number]
    seconds: dict[str, list[float]] = {path: [] for path in args.models}
    results: dict[str, list[dict]] = {path: [] for path in args.models}
    for image in images:
        file = os.path.join(args.images, truth.imgs[image]["file_name"])
        for path, predictor in predictors.items():
            start = time.perf_counter()
            prediction = predictor(file)
            seconds[path].append(time.perf_counter() - start)
            results[path] += [{**x, "image_id": image} for x in prediction.to_coco()]
    print(f"{len(images)} images, {torch.get_num_threads()} threads\n{'model':32} {'mask AP':>8} {'ms':>8}")
    for path in args.models:
        ap, milliseconds = mask_ap(truth, images, results[path]), 1000 * statistics.median(seconds[path])
        print(f"{os.path.basename(path):32} {100 * ap:8.2f} {milliseconds:8.1f}")


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
