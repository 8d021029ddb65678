"""Follow objects through a long video: memory and speed, and whether ids stay where the scene repeats.

    python -m checks.long_video lite0_fruits demo/fruits_nuts/images/3.jpg

A window pans and zooms over a photo, forwards and backwards again and again, as an MP4 file. The model follows the
objects in it, and the video with ids, the segments and the tracks are written, as the demo does.

Each segment is compared with the one at its place when the scene was the same before, one period ago. "same ids" is the
share of these pairs with one id, in all frames and in the last period. An object that is missing for more than
MODEL.KNET.VIDEO.MEMORY frames comes back with another id.

The exit code is 1 if memory, open files or threads grow.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator

import cv2
import numpy as np
import tqdm

import knet_d2
from knet_d2.inference.batches import read_ahead
from knet_d2.inference.sinks import JsonFile, Sink, TrackFile, VideoFile
from knet_d2.inference.sources import Video
from knet_d2.programs import run
from knet_d2.results.prediction import Prediction

from .growth import judge, take_sample
from .photo_videos import cut, windows

RATE = 25
# Segments of a class are at one place above this IoU; frames of an MP4 file are not equal to the bit
SAME_PLACE_IOU = 0.5


def write_video(path: str, photo: np.ndarray, count: int, turn: int, longest: int, seed: int) -> None:
    """Write a video in which the window returns to where it was after 2 (turn - 1) frames.

    Args:
        photo: uint8 BGR [H, W, 3].
        count: number of frames.
        turn: number of frames from one end of the window's way to the other.
        longest: longer side of a frame in pixels.
    """
    scale = longest / max(photo.shape[:2])
    size = tuple(round(side * scale) for side in photo.shape[:2])
    way = list(windows(photo.shape[:2], turn, np.random.default_rng(seed)))
    video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), RATE, size[::-1])
    for window in itertools.islice(itertools.cycle(way + way[-2:0:-1]), count):
        video.write(cut(photo, window, size, cv2.INTER_AREA))
    video.release()


def same_ids(before: Prediction, now: Prediction) -> Iterator[bool]:
    """Of each segment at the place of one before, with its class: whether it has the same id."""
    for segment in now.segments:
        for other in before.segments:
            both = np.count_nonzero(segment.mask & other.mask)
            if segment.label == other.label and both > SAME_PLACE_IOU * np.count_nonzero(segment.mask | other.mask):
                yield segment.track_id == other.track_id


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("photo")
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--turn", type=int, default=20, help="frames from one end of the window's way to the other")
    parser.add_argument("--longest", type=int, default=320, help="longer side of a frame in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the window's way")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def main(args: argparse.Namespace) -> int:
    predictor = knet_d2.load(args.weights, opts=args.opts)
    follow = predictor.follower()
    period = 2 * (args.turn - 1)
    latest: list[Prediction] = []
    repeated: list[list[bool]] = []
    samples, ids = [], set()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "in.mp4")
        write_video(path, cv2.imread(args.photo), args.frames, args.turn, args.longest, args.seed)
        source = Video(path)
        info = {"task": predictor.cfg.MODEL.KNET.TASK, "weights": args.weights}
        sinks: list[Sink] = [
            VideoFile(os.path.join(folder, "out.mp4"), source, predictor.classes, 15),
            JsonFile(os.path.join(folder, "out.json"), info, predictor.classes),
            TrackFile(os.path.join(folder, "tracks.json")),
        ]
        start = time.monotonic()
        for frame in read_ahead(tqdm.tqdm(source, total=source.count, unit=source.unit, mininterval=10)):
            predictions = follow(frame.image)
            for sink in sinks:
                sink.write(frame, predictions)
            (prediction,) = predictions.values()
            ids |= {x.track_id for x in prediction.segments}
            if len(latest) == period:
                repeated.append(list(same_ids(latest.pop(0), prediction)))
            latest.append(prediction)
            samples.append(take_sample())
        rate = len(samples) / (time.monotonic() - start)
        for sink in sinks:
            sink.close()
    print(f"{len(samples)} frames, {rate:.1f} images/s, {len(ids)} ids", flush=True)
    for name, part in (("all", repeated), ("the last period's", repeated[-period:])):
        pairs = list(itertools.chain(*part))
        print(f"same ids in {name} frames: {100 * np.mean(pairs) if pairs else float('nan'):.1f} % of {len(pairs)}")
    return int(not judge("long video", samples))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
