"""Segments images with a model from one file, without data sets: ``knet_d2.load`` and its predictor."""

from ..results.prediction import Prediction
from ..results.segment import Segment
from .from_file import load
from .image_predictor import ImagePredictor
from .trace import Trace

__all__ = ["ImagePredictor", "Prediction", "Segment", "Trace", "load"]
