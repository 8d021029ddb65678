"""Models for other runtimes: ONNX and torch.export, as one graph from the image to the final result."""

from .graph import INPUT_NAMES, MEMORY_INPUT_NAMES, OUTPUT_NAMES, ExportableKNet, memory_shape
from .writing import ONNX_COMMAND, default_image_type, export_metadata, halve, save_onnx, save_pt2, trace

__all__ = [
    "INPUT_NAMES",
    "MEMORY_INPUT_NAMES",
    "ONNX_COMMAND",
    "OUTPUT_NAMES",
    "ExportableKNet",
    "default_image_type",
    "export_metadata",
    "halve",
    "memory_shape",
    "save_onnx",
    "save_pt2",
    "trace",
]
