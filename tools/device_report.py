#!/usr/bin/env python
"""Report what works on a device and how fast it is; see docs/BENCHMARKS.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from checks.references.device import steps
from knet_d2.programs import device_report, run

if __name__ == "__main__":
    # The recordings are in a checkout only, so the program gets them from here
    sys.exit(run(lambda args: device_report.main(args, steps), device_report.get_parser()))
