"""Weights files: reading, translating, checking, writing, and the published ones. Importing it registers knet://."""

from . import download
from .checkpointer import Checkpointer, write_atomically
from .loading import as_checkpoint, load_file
from .report import LoadReport

__all__ = ["Checkpointer", "LoadReport", "as_checkpoint", "download", "load_file", "write_atomically"]
