"""A report on a device: equality of results, training, speed, and what makes the processor wait for the device."""

from .program import get_parser, main

__all__ = ["get_parser", "main"]
