"""Measure the memory of a training step beyond backbone and neck, with and without what saves memory.

python -m checks.step_memory

A panoptic COCO model takes a step forward and backward, without the optimiser: with losses at every pixel, at sampled
points, with MODEL.KNET.CHECKPOINT, and with both; and its backbone and neck alone, where the sum of their features goes
backward. This prints the highest resident memory above that before the step, what of it is beyond backbone and neck,
and the processor time. Each is measured in a process of its own, on the CPU.
"""

import argparse
import multiprocessing
import os
import resource
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from knet_d2.config.merging import load_config
from knet_d2.modeling.layers import channels_last
from knet_d2.programs import run

from .references.cases import ROOT

CONFIG = ROOT / "configs/coco/panoptic/knet_r50_fpn_1x.yaml"
NUM_THINGS, NUM_STUFF = 80, 53


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1216], help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2, help="number of images")
    parser.add_argument("--objects", type=int, default=20, help="number of objects of an image")
    parser.add_argument("--points", type=int, default=12544, help="number of sampled points")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    return parser


def random_truth(size: tuple[int, int], num_objects: int, seed: int) -> dict:
    """An image with rectangles on five stuff regions."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    masks = torch.zeros(num_objects, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = (int(torch.randint(n * 3 // 4, (), generator=generator)) for n in size)
        mask[y : y + height // 5, x : x + width // 5] = True
    labels = NUM_THINGS + torch.arange(width).mul(5).div(width, rounding_mode="floor").expand(height, width)
    classes = torch.randint(NUM_THINGS, (num_objects,), generator=generator)
    instances = Instances(size, gt_classes=classes, gt_masks=BitMasks(masks))
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator),
        "instances": instances,
        "sem_seg": labels.clone(),
    }


def measure(args: argparse.Namespace, options: list[str] | None, results) -> None:
    """Put (MiB of memory above that before the step, CPU seconds) into the queue ``results``; None: the backbone."""
    torch.set_num_threads(args.threads)
    things, stuff = "MODEL.KNET.NUM_THING_CLASSES", "MODEL.KNET.NUM_STUFF_CLASSES"
    fixed = [things, str(NUM_THINGS), stuff, str(NUM_STUFF), "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    fixed += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    torch.manual_seed(0)
    model = build_model(load_config(str(CONFIG), fixed + (options or []))).train()
    batch = [random_truth(tuple(args.size), args.objects, seed) for seed in range(args.batch)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if options is None:
        features = model.backbone(channels_last(model.preprocess_image(batch).tensor))
        total = sum(features.pop(name).sum() for name in model.sem_seg_head.semantic_fpn.in_features)
    else:
        total = sum(model(batch).values())
    total.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put(((peak - before) / 1024, time.process_time() - start))


def main(args: argparse.Namespace) -> None:
    # glibc gives large tensors back at once then; else it keeps some, and a run differs from the next by 100 MiB
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "500000"
    context = multiprocessing.get_context("spawn")
    points, checkpoint = ["MODEL.KNET.LOSS.NUM_POINTS", str(args.points)], ["MODEL.KNET.CHECKPOINT", "True"]
    variants: dict[str, list[str] | None] = {
        "backbone and neck alone": None,
        "every pixel": [],
        f"{args.points} points": points,
        "every pixel, MODEL.KNET.CHECKPOINT": checkpoint,
        f"{args.points} points, MODEL.KNET.CHECKPOINT": points + checkpoint,
    }
    least = 0.0
    for name, options in variants.items():
        results = context.Queue()
        process = context.Process(target=measure, args=(args, options, results))
        process.start()
        memory, seconds = results.get()
        process.join()
        least = memory if options is None else least
        print(f"{name}: {memory:.0f} MiB, {memory - least:.0f} beyond, {seconds:.1f} CPU s", flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main, get_parser()))
