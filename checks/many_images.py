"""Predict many image files in batches: equal results, images per second from a fast and from a slow disk, and memory.

    python -m checks.many_images lite0_fruits demo/fruits_nuts/images --threads 1 2 --batches 1 4 8 --delays 0 200
    python -m checks.many_images lite0_fruits demo/fruits_nuts/images --copies 5000 --longest 64 --rounds 0

The first command prints a Markdown table. "slow disk" waits so many milliseconds before it reads each file; with
--workers threads, as many files wait at the same time. The combinations take turns in each round, and the table has the
median of the rounds. It also compares the classes of the pixels with those of single images.

The second command predicts --copies small files in batches, and the exit code is 1 if memory, open files or threads
grow. It is also 1 if results differ.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import cv2
import numpy as np
import torch
import tqdm
from tabulate import tabulate

import knet_d2
from knet_d2.data.files import find_images, read_image
from knet_d2.inference.batches import map_ahead
from knet_d2.inference.image_predictor import ImagePredictor
from knet_d2.inference.sources import Frame
from knet_d2.programs import run

from .growth import judge, take_sample

# Of all pixels; batches round differently, which may change a pixel at the border of a mask
EQUAL_PIXELS = 0.999
_MOMENTS = 50


def read_slowly(predictor: ImagePredictor, paths: list[str], workers: int, delay: float) -> Iterator[Frame]:
    """Frames of files that a disk gives after ``delay`` seconds each."""

    def read(path: str) -> Frame:
        time.sleep(delay)
        return Frame(path, read_image(path, predictor.pixel_format.as_rgb))

    return map_ahead(read, paths, workers)


def images_per_second(predictor: ImagePredictor, paths: list[str], batch: int, workers: int, delay: float) -> float:
    start = time.monotonic()
    for _ in predictor.predict_frames(read_slowly(predictor, paths, workers, delay), batch, workers):
        pass
    return len(paths) / (time.monotonic() - start)


def same_pixels(predictor: ImagePredictor, paths: list[str], batch: int) -> float:
    """The share of pixels with the same class in batches and in single images."""
    single = [x.class_map() for _, x in predictor.images(paths)]
    batches = [x.class_map() for _, x in predictor.images(paths, batch_size=batch, workers=2)]
    equal = [a == b for a, b in zip(single, batches, strict=True)]
    return float(np.mean(np.concatenate([x.ravel() for x in equal])))


def memory_is_flat(predictor: ImagePredictor, paths: list[str], copies: int, longest: int, batch: int) -> bool:
    """Whether the process stays as it is while it predicts ``copies`` files of at most ``longest`` pixels a side."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for number, path in zip(range(copies), itertools.cycle(paths)):
            image = cv2.imread(path)
            scale = longest / max(image.shape[:2])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            cv2.imwrite(os.path.join(folder, f"{number:06}.jpg"), image)
        for _ in tqdm.tqdm(predictor.images(folder, batch_size=batch, workers=2), total=copies, mininterval=10):
            samples.append(take_sample())
    # Threads that read hold files open for a moment; what stays open is in the minimum of many samples
    lowest = [min(x.files for x in samples[max(0, i - _MOMENTS) : i + 1]) for i in range(len(samples))]
    kept = [sample._replace(files=files) for sample, files in zip(samples, lowest, strict=True)]
    return judge(f"{copies} images in batches of {batch}", kept)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("images", nargs="+", help="files, folders or patterns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of PyTorch")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="threads that read files")
    parser.add_argument("--delays", type=float, nargs="+", default=[0], help="of the disk for each file, milliseconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=0, help="number of small files that must not make memory grow")
    parser.add_argument("--longest", type=int, default=64, help="longer side of the small files in pixels")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def main(args: argparse.Namespace) -> int:
    predictor = knet_d2.load(args.weights, opts=args.opts)
    paths = find_images(args.images)
    good = True
    if args.rounds:
        runs = list(itertools.product(args.threads, args.delays, args.workers, args.batches))
        rates: dict[tuple, list[float]] = {x: [] for x in runs}
        for _ in range(args.rounds):
            for threads, delay, workers, batch in runs:
                torch.set_num_threads(threads)
                rate = images_per_second(predictor, paths, batch, workers, delay / 1000)
                rates[threads, delay, workers, batch].append(rate)
        rows = [[*run, statistics.median(rates[run])] for run in runs]
        headers = ("threads", "slow disk, ms", "workers", "batch", "images/s")
        print(tabulate(rows, headers, tablefmt="github", floatfmt=("d", "g", "d", "d", ".2f")), flush=True)
        for batch in set(args.batches) - {1}:
            share = same_pixels(predictor, paths, batch)
            print(f"batch {batch}: {100 * share:.3f} % of the pixels have the class of single images")
            good &= share >= EQUAL_PIXELS
    if args.copies:
        good &= memory_is_flat(predictor, paths, args.copies, args.longest, max(args.batches))
    return int(not good)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
