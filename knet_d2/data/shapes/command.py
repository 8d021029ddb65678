"""The command line of the generated data sets."""

import argparse
import os
from collections.abc import Callable, Iterable


def generate(
    parser: argparse.ArgumentParser,
    splits: Iterable[str],
    make_split: Callable[[str, str], str],
    write: Callable[[argparse.Namespace], None],
) -> None:
    """Generate all registered splits, or with --output a data set in another folder, and print the folders.

    Args:
        parser: with the options of the data set's own, whose defaults fit --output.
        splits: names of the registered splits.
        make_split: from the name of a split and the root of all data sets to the split's folder.
        write: writes the data set of --output.
    """
    parser.add_argument("--root", default=os.getenv("DETECTRON2_DATASETS", "datasets"), help="root of all data sets")
    parser.add_argument("--output", help="write one data set into this folder, instead of the registered splits")
    parser.add_argument("--seed", type=int, default=3, help="with --output: seed of the data set")
    parser.add_argument("--size", type=int, default=128, help="with --output: height and width in pixels")
    args = parser.parse_args()
    if args.output:
        write(args)
        print(args.output)
    else:
        for split in splits:
            print(make_split(split, args.root))
