"""Start one of the programs: ``python -m knet_d2 NAME ...``."""

import argparse
import sys

from .programs import NAMES, run_named

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m knet_d2", description="Start one of the programs.")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program: NAME --help lists them")
    args = parser.parse_args()
    sys.exit(run_named(parser.prog, args.name, args.arguments))
