"""Reading and writing of weights files."""

from .checkpointer import Checkpointer, write_atomically
from .loading import as_checkpoint, load_file

__all__ = ["Checkpointer", "as_checkpoint", "load_file", "write_atomically"]
