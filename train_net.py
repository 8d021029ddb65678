#!/usr/bin/env python
"""Train or evaluate K-Net; torchrun and srun start it as well, see docs/CLUSTERS.md."""

import sys

from knet_d2.programs import run_program

if __name__ == "__main__":
    sys.exit(run_program("train"))
