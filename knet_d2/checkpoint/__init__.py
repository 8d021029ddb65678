"""Weights files: reading, translating, checking, writing, and the published ones. Importing it registers knet://."""

from . import download
from .checkpointer import Checkpointer
from .description import changed_options, describe_model, has_description, read_description
from .load_report import LoadReport
from .loading import as_checkpoint, load_file
from .resume import best_checkpoint, periodic_checkpoints, remove_unfinished
from .saving import write_atomically

__all__ = [
    "Checkpointer",
    "LoadReport",
    "as_checkpoint",
    "best_checkpoint",
    "changed_options",
    "describe_model",
    "download",
    "has_description",
    "load_file",
    "periodic_checkpoints",
    "read_description",
    "remove_unfinished",
    "write_atomically",
]
