"""Generates moving shapes: all registered splits, or with --output a data set in another folder."""

import argparse

from ...data.shapes.command import generate
from .registration import SPLITS, make_split
from .writer import write_moving_shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m knet_d2.video.moving_shapes", description=__doc__)
    parser.add_argument("--num-videos", type=int, default=20, help="with --output: number of videos")
    parser.add_argument("--num-frames", type=int, default=20, help="with --output: frames of each video")
    generate(
        parser,
        SPLITS,
        make_split,
        lambda x: write_moving_shapes(x.output, x.num_videos, x.seed, x.num_frames, x.size),
    )


if __name__ == "__main__":
    main()
