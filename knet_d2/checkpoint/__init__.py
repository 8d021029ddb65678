"""Reading and writing of weights files."""

from knet_d2.checkpoint.checkpointer import Checkpointer, write_atomically
from knet_d2.checkpoint.loading import as_checkpoint, load_file

__all__ = ["Checkpointer", "as_checkpoint", "load_file", "write_atomically"]
