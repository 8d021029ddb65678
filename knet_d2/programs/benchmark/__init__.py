"""The benchmark of K-Net and Detectron2's models: models, weights, inputs, measurements and tables."""

from .program import get_parser, main

__all__ = ["get_parser", "main"]
