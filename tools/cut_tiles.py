#!/usr/bin/env python
"""Cut large images into tiles; see docs/DEPLOYMENT.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from knet_d2.programs import run_program

if __name__ == "__main__":
    sys.exit(run_program("cut_tiles"))
