"""Say what is installed, what is missing and which command mends it: ``python -m knet_d2.doctor``."""

import sys

from .setup.doctor import main

if __name__ == "__main__":
    sys.exit(main())
