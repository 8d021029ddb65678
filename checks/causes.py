"""Measure what costs an instance model its AP: its masks, its classes, its scores, or several kernels on one object.

    python -m checks.causes output/a/model_0000399.pth output/a/model_final.pth

The weights files lie in the OUTPUT_DIR of their training run and are given in the order of training. For the first
data set in DATASETS.TEST, this prints one row for each file and stage, of the kernels that are matched to the objects
by the IoU of their masks alone, so that no number depends on another one's fault:

    IoU            mean IoU of an object and its kernel
    >.5, >.75      objects whose kernel has a larger IoU than this, in percent
    class          matched kernels whose most probable class is the object's, in percent
    twins          kernels with an IoU above 0.7 with an object, per object that has one
    rank           objects with twins of which the best kernel has the highest score, in percent
    second         score of the second best of these kernels by that of the best
    moved          objects that have another kernel than in the stage before, in percent
    moved since    the same, against the weights file before
    AP             AP of masks; then with one change each: "nms" by mask NMS at 0.7, "sure" by scores times the squared
                   expected IoU of the masks, "both"; "class" with the objects' classes for all kernels above IoU 0.5,
                   "mask" with the objects' masks for them, "one" with the score 0 for all kernels but the matched,
                   "score" with the IoU as the score of the matched and 0 for all others

Stage 0 are the static kernels. Gradient norms before clipping are in the run's metrics.json as grad_norm.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from detectron2.modeling import build_model
from pycocotools import mask as rle
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment

from knet_d2.checkpoint import Checkpointer
from knet_d2.config.merging import load_config
from knet_d2.data import build_loss_loader
from knet_d2.modeling.cascade import select_stage
from knet_d2.modeling.postprocessing.resize import ImageGeometry, mask_probabilities
from knet_d2.modeling.postprocessing.scores import thing_scores
from knet_d2.programs import run

SAME_OBJECT = 0.7
EXPONENT, MAX_IOU = 2.0, 0.7
# Digits behind the point, where it isn't 1
DIGITS = {"twins": 2, "second": 2}


class Image(NamedTuple):
    """What one stage predicts for one image of G objects.

    Attributes:
        probs: [M, T], probabilities of the M matched kernels' T classes.
        tests: name -> [M, T], scores under options of post-processing.
        size: (h, w) of the image.
        masks: [M], RLE.
        classes, truths: int [G], and RLE [G].
        ious: [M, G].
        match: int [G], each object's kernel; -1 where there are fewer kernels than objects.
    """

    probs: np.ndarray
    tests: dict[str, np.ndarray]
    size: tuple[int, int]
    masks: list[dict[str, Any]]
    classes: np.ndarray
    truths: list[dict[str, Any]]
    ious: np.ndarray
    match: np.ndarray


def best_match(ious: np.ndarray) -> np.ndarray:
    """The one-to-one assignment with the largest sum of IoUs: [M, G] -> int [G], -1 without a kernel."""
    match = np.full(ious.shape[1], -1)
    kernels, objects = linear_sum_assignment(-ious)
    match[objects] = kernels
    return match


def read_image(shown, index: int, truth, geometry: ImageGeometry, num_matched: int, num_things: int) -> Image:
    """One stage's predictions for an image of a batch, beside its ground truth."""
    logits = shown.mask_logits[index, :num_matched]
    probs = shown.class_logits[index, :num_matched, :num_things].sigmoid()
    masks = (mask_probabilities(logits, geometry) > 0.5).numpy()
    truths = truth.masks().bool().numpy()
    flat, own = (x.reshape(len(x), np.prod(truth.size)).astype(float) for x in (masks, truths))
    intersections = flat @ own.T
    unions = flat.sum(1)[:, None] + own.sum(1)[None] - intersections
    ious = intersections / np.maximum(unions, 1)
    options = {"nms": (0.0, MAX_IOU), "sure": (EXPONENT, 1.0), "both": (EXPONENT, MAX_IOU)}
    tests = {
        name: thing_scores(probs, logits, geometry, exponent=exponent, max_iou=iou).numpy()
        for name, (exponent, iou) in options.items()
    }
    encoded, own_encoded = ([encode(x) for x in some] for some in (masks, truths))
    return Image(probs.numpy(), tests, truth.size, encoded, truth.classes.numpy(), own_encoded, ious, best_match(ious))


@torch.no_grad()
def predict(folder: str, weights: str, number: int | None) -> list[list[Image]]:
    """Stage -> image -> its predictions, by the config of a training run; of the first images, or of all (None)."""
    cfg = load_config(os.path.join(folder, "config.yaml"), ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"])
    model = build_model(cfg).eval()
    Checkpointer(model).load(weights)
    loader, _ = build_loss_loader(cfg, cfg.DATASETS.TEST[0])
    stages: list[list[Image]] = [[] for _ in range(cfg.MODEL.KNET.NUM_STAGES + 1)]
    for batch in itertools.islice(loader, number):
        images = model.preprocess_image(batch)
        output = model.network(images.tensor, torch.tensor(images.image_sizes))
        for stage, found in enumerate(stages):
            for i, truth in enumerate(model.send_ground_truth(batch)):
                geometry = ImageGeometry(tuple(images.tensor.shape[-2:]), images.image_sizes[i], truth.size)
                sizes = model.bank.num_matched, model.bank.num_things
                found.append(read_image(select_stage(output, stage), i, truth, geometry, *sizes))
    return stages


def truth_of(images: list[Image]) -> COCO:
    """The ground truth as COCO's program reads it."""
    annotations = [
        {"image_id": i, "category_id": int(c), "iscrowd": 0, "area": float(rle.area(mask)), "segmentation": mask}
        for i, image in enumerate(images)
        for c, mask in zip(image.classes, image.truths)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": image.size[0], "width": image.size[1]} for i, image in enumerate(images)],
        "categories": [{"id": i, "name": str(i)} for i in range(images[0].probs.shape[1])],
        "annotations": [{**x, "id": number} for number, x in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def encode(mask: np.ndarray) -> dict[str, Any]:
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))


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


def average_precision(truth: COCO, images: list[Image], scores: list[np.ndarray], with_masks: bool) -> float:
    """AP in percent of the (kernel, class) pairs with scores [M, T] above 0.

    Args:
        with_masks: whether kernels above an IoU of 0.5 get the object's mask.
    """
    results = []
    for i, (image, score) in enumerate(zip(images, scores)):
        encoded = list(image.masks)
        if with_masks and len(image.truths):
            for kernel in np.nonzero(image.ious.max(1) > 0.5)[0]:
                encoded[kernel] = image.truths[image.ious[kernel].argmax()]
        order = np.argsort(-score, axis=None, kind="stable")[: len(score)]
        for kernel, label in zip(*np.unravel_index(order, score.shape)):
            if score[kernel, label] > 0:
                result = {"category_id": int(label), "score": float(score[kernel, label])}
                results.append({**result, "image_id": i, "segmentation": encoded[kernel]})
    return 100 * mask_ap(truth, list(range(len(images))), results)


def with_classes(image: Image) -> np.ndarray:
    """Scores [M, T] where kernels above an IoU of 0.5 have all of their highest probability for the object's class."""
    scores = image.probs.copy()
    if len(image.truths):
        for kernel in np.nonzero(image.ious.max(1) > 0.5)[0]:
            best = scores[kernel].max()
            scores[kernel] = 0
            scores[kernel, image.classes[image.ious[kernel].argmax()]] = best
    return scores


def of_matched(image: Image, *, as_iou: bool) -> np.ndarray:
    """Scores [M, T] of the matched kernels alone: their own, or their IoU times their own over the highest of them."""
    scores = np.zeros_like(image.probs)
    for instance, kernel in enumerate(image.match):
        if kernel >= 0:
            own = image.probs[kernel]
            scores[kernel] = image.ious[kernel, instance] * own / max(own.max(), 1e-9) if as_iou else own
    return scores


def percent(values: list) -> float:
    return 100 * float(np.mean(values)) if values else float("nan")


def describe(images: list[Image], before: list[Image] | None, earlier: list[Image] | None) -> dict[str, float]:
    """The row of one stage.

    Args:
        before: the stage before, of the same weights.
        earlier: the same stage of the weights file before.
    """
    pairs = [(image, g, k) for image in images for g, k in enumerate(image.match) if k >= 0]
    ious = [image.ious[k, g] for image, g, k in pairs]
    twins, ranked, second = [], [], []
    for image in images:
        scores = image.probs.max(axis=1)
        for column in image.ious.T:
            own = np.nonzero(column > SAME_OBJECT)[0]
            if len(own):
                twins.append(len(own))
            if len(own) > 1:
                ranked.append(scores[own].argmax() == column[own].argmax())
                ordered = np.sort(scores[own])
                second.append(ordered[-2] / ordered[-1])
    row = {
        "IoU": percent(ious),
        ">.5": percent([x > 0.5 for x in ious]),
        ">.75": percent([x > 0.75 for x in ious]),
        "class": percent([image.probs[k].argmax() == image.classes[g] for image, g, k in pairs]),
        "twins": percent(twins) / 100,
        "rank": percent(ranked),
        "second": percent(second) / 100,
    }
    for name, others in (("moved", before), ("moved since", earlier)):
        moved = [] if others is None else [a != b for x, y in zip(images, others) for a, b in zip(x.match, y.match)]
        row[name] = percent(moved)
    truth = truth_of(images)
    row["AP"] = average_precision(truth, images, [x.probs for x in images], with_masks=False)
    for name in images[0].tests:
        row[f"AP, {name}"] = average_precision(truth, images, [x.tests[name] for x in images], with_masks=False)
    row["AP, class"] = average_precision(truth, images, [with_classes(x) for x in images], with_masks=False)
    row["AP, mask"] = average_precision(truth, images, [x.probs for x in images], with_masks=True)
    row["AP, one"] = average_precision(truth, images, [of_matched(x, as_iou=False) for x in images], with_masks=False)
    row["AP, score"] = average_precision(truth, images, [of_matched(x, as_iou=True) for x in images], with_masks=False)
    return row


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help="weights files of one training run, in the order of training")
    parser.add_argument("--number", type=int, help="number of images; default: all")
    return parser


def main(args: argparse.Namespace) -> None:
    earlier: list[list[Image]] | None = None
    for weights in args.weights:
        stages = predict(os.path.dirname(weights), weights, args.number)
        for number, images in enumerate(stages):
            row = describe(images, stages[number - 1] if number else None, earlier[number] if earlier else None)
            if earlier is None and number == 0:
                print("| weights | stage | " + " | ".join(row) + " |\n" + "|---" * (len(row) + 2) + "|")
            shown = ("" if np.isnan(value) else f"{value:.{DIGITS.get(name, 1)}f}" for name, value in row.items())
            print(f"| {os.path.basename(weights)} | {number} | " + " | ".join(shown) + " |", flush=True)
        earlier = stages


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
