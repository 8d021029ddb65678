"""``python -m knet_d2 NAME ...`` is the command ``knet NAME ...``."""

import sys

from knet_command import main

if __name__ == "__main__":
    sys.exit(main())
