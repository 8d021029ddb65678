"""Segmenting images with a model from one file, without data sets: what ``knet_d2.load`` gives."""

from ..results.prediction import Prediction, Segment
from .predictor import ImagePredictor
from .resolve import load
from .trace import Trace

__all__ = ["ImagePredictor", "Prediction", "Segment", "Trace", "load"]
