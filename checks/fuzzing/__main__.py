"""Read damaged files: each must be accepted, or rejected by one of the project's own errors.

python -m checks.fuzzing annotations --count 15000

The inputs are made from valid files. Each input depends only on --seed and its number, so --first N --count 1 repeats
input N. Time and memory of each input are limited. The exit code is 1 if an input causes any other error, a crash, a
hang, or too much memory.
"""

import argparse
import json
import sys

from knet_d2.programs import run

from .loop import FAULT, fuzz
from .targets import TARGETS


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: argparse.Namespace) -> int:
    summary = fuzz(args.kind, args.count, args.seed, args.first)
    for detail, outcome in summary.faults.items():
        print(f"input {outcome.index}: {detail}\n{outcome.trace}")
    print(json.dumps({"kind": args.kind, "inputs": args.count, "reached": summary.reached, **summary.counts}))
    return int(summary.counts[FAULT] > 0)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
