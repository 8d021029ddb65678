"""Generates the data set shapes: all registered splits, or with --output a data set in another folder."""

import argparse

from .command import generate
from .registration import SPLITS, make_split
from .writer import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m knet_d2.data.shapes", description=__doc__)
    parser.add_argument("--num-images", type=int, default=200, help="with --output: number of images")
    generate(parser, SPLITS, make_split, lambda x: write_shapes(x.output, x.num_images, x.seed, x.size))


if __name__ == "__main__":
    main()
