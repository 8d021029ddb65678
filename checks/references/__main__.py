"""Starts ``python -m checks.references``."""

import sys

from knet_d2.programs import run

from .program import get_parser, main

if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
