"""Segmenting images with a model from one file, without data sets: what ``knet_d2.load`` gives."""

from ..results.prediction import Prediction, Segment
from .loading import load
from .predictor import ImagePredictor
from .trace import Trace

__all__ = ["ImagePredictor", "Prediction", "Segment", "Trace", "load"]
