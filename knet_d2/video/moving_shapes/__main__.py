"""Generates moving shapes: all registered splits, or with --output a data set in another folder."""

import argparse
import os

from .registration import SPLITS, make_split
from .writer import write_moving_shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m knet_d2.video.moving_shapes", description=__doc__)
    parser.add_argument("--root", default=os.getenv("DETECTRON2_DATASETS", "datasets"), help="root of all data sets")
    parser.add_argument("--output", help="write one data set into this folder, instead of the registered splits")
    parser.add_argument("--num-videos", type=int, default=20, help="with --output: number of videos")
    parser.add_argument("--num-frames", type=int, default=20, help="with --output: frames of each video")
    parser.add_argument("--seed", type=int, default=3, help="with --output: seed of the videos")
    parser.add_argument("--size", type=int, default=128, help="with --output: height and width in pixels")
    args = parser.parse_args()
    if args.output:
        write_moving_shapes(args.output, args.num_videos, args.seed, args.num_frames, args.size)
        print(args.output)
    else:
        for split in SPLITS:
            print(make_split(split, args.root))


if __name__ == "__main__":
    main()
