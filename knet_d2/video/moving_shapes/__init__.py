"""The generated data set "moving shapes": videos of things that cross, leave and return.

Importing this package registers it.
"""

import os

from .registration import register_moving_shapes
from .scenes import draw_video
from .writer import write_moving_shapes

__all__ = ["draw_video", "register_moving_shapes", "write_moving_shapes"]

register_moving_shapes(os.getenv("DETECTRON2_DATASETS", "datasets"))
