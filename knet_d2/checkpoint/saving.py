"""Writing files whole or not at all, and parameters alone, to share them."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from .loading import SAFETENSORS_COMMAND

# Where less is free, a disk counts as full: its last blocks can be too few for what was to be written
_FULL_DISK_BYTES = 1 << 20


def write_atomically(path: str, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Let ``write`` fill a temporary file beside ``path`` and rename it; ``path`` is the old or the new file, whole."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as f:
            try:
                write(f)
            except RuntimeError as e:  # PyTorch's writer does not say that the disk is full
                if shutil.disk_usage(folder).free >= _FULL_DISK_BYTES:
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    if os.name == "posix":  # the new name reaches the disk with its folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(path: str, write: Callable[[Any], None]) -> None:
    """:func:`write_atomically` for weights files.

    Raises:
        CheckpointError: the file can't be written.
    """
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: can't be written ({e}). Earlier files are intact.") from e


def save_weights(path: str, state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file that MODEL.WEIGHTS takes; ``path`` is the old or the new file, whole.

    Args:
        path: ends in ".pth" ({"model": ..., "metadata": ...}) or ".safetensors".
        state_dict: in our names.
        metadata: about the parameters.

    Raises:
        CheckpointError: another ending, a missing package, or a file that can't be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import save
        except ImportError:
            raise CheckpointError(f"{path}: writing it needs a package; {SAFETENSORS_COMMAND}.") from None
        write_checkpoint(path, lambda f: f.write(save(tensors, {"format": "pt", **metadata})))
    elif path.endswith(".pth"):
        write_checkpoint(path, lambda f: torch.save({"model": tensors, "metadata": metadata}, f))
    else:
        raise CheckpointError(f"{path}: the name of a weights file must end in .pth or .safetensors.")
