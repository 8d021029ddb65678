"""K-Net as a Detectron2 extension. Importing this package registers its parts and data sets with Detectron2."""

from ._bootstrap import require_detectron2, runs_setup_command

__version__ = "0.1.0"

if not runs_setup_command():
    require_detectron2()

    # ---- imports that register parts, and the public names: everything of the package goes here ----
