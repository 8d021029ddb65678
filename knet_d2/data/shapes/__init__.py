"""The generated data set "shapes", written in the formats of COCO and registered like a built-in data set."""

from .drawing import STUFF_CLASSES, THING_CLASSES, draw_scene
from .registration import SPLITS, make_split, register_shapes, shapes_entries
from .writer import write_shapes

__all__ = [
    "SPLITS",
    "STUFF_CLASSES",
    "THING_CLASSES",
    "draw_scene",
    "make_split",
    "register_shapes",
    "shapes_entries",
    "write_shapes",
]
