"""Start one of the programs: ``python -m knet_d2 NAME ...``."""

import argparse
import sys

from .programs import NAMES, run_program

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m knet_d2", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program; --help lists them")
    args = parser.parse_args()
    sys.exit(run_program(args.name, args.arguments, f"{parser.prog} {args.name}"))
