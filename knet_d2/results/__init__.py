"""The results for an image: segments, their files (COCO, JSON, PNG, polygons) and pictures of them."""

from .outputs import draw_prediction, main_prediction, predictions_of
from .prediction import Prediction
from .segment import Segment

__all__ = ["Prediction", "Segment", "draw_prediction", "main_prediction", "predictions_of"]
