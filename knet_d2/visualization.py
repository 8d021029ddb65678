"""The documented path of :mod:`knet_d2.results.drawing`."""

from .results.drawing import draw_prediction, draw_segments, picture_sheet

__all__ = ["draw_prediction", "draw_segments", "picture_sheet"]
