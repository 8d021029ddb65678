"""Benchmark of K-Net and Detectron2's models: models that do their real work, their inputs, clocks, and the tables."""

from .program import get_parser, main

__all__ = ["get_parser", "main"]
