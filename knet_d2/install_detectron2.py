"""Install Detectron2 0.6 without a compiler: ``python -m knet_d2.install_detectron2``."""

import sys

from .setup.install_program import main

if __name__ == "__main__":
    sys.exit(main())
