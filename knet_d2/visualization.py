"""The documented path of what draws: see :mod:`knet_d2.results`."""

from .results.comparison import draw_validation_pictures
from .results.outputs import draw_prediction
from .results.pictures import draw_segments, picture_sheet

__all__ = ["draw_prediction", "draw_segments", "draw_validation_pictures", "picture_sheet"]
