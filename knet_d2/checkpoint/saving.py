"""Writes files atomically, and writes weights files that contain only parameters, for sharing."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from .loading import SAFETENSORS_COMMAND

# A disk with less free space counts as full: the last blocks may be too small for the write that failed.
_FULL_DISK_BYTES = 1 << 20


def write_atomically(path: str, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Write a file so that ``path`` is always either the complete old file or the complete new file.

    Args:
        path: path of the file.
        write: function that writes the content to an open file; the file is temporary and renamed at the end.
        mode: mode in which the file is opened.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as f:
            try:
                write(f)
            except RuntimeError as e:  # PyTorch's writer raises it without a reason when the disk is full
                if shutil.disk_usage(folder).free >= _FULL_DISK_BYTES:
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.filename == temporary:  # of which a user knows nothing
            e.filename = path
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    if os.name == "posix":  # the rename is on disk only after the folder is synchronised
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(path: str, write: Callable[[Any], None]) -> None:
    """Write a weights file by :func:`write_atomically`.

    Raises:
        CheckpointError: the file can't be written.
    """
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(
            f"{path}: can't be written ({e}). Earlier files are intact; free disk space or change the path."
        ) from e


def save_weights(path: str, state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a weights file for MODEL.WEIGHTS, atomically.

    Args:
        path: path that ends in ".pth" ({"model": ..., "metadata": ...}) or ".safetensors".
        state_dict: parameters by our names.
        metadata: description of the model.

    Raises:
        CheckpointError: the path has another ending, a package is missing, or the file can't be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import save
        except ImportError:
            raise CheckpointError(f"{path}: needs the package safetensors; {SAFETENSORS_COMMAND}.") from None
        write_checkpoint(path, lambda f: f.write(save(tensors, {"format": "pt", **metadata})))
    elif path.endswith(".pth"):
        write_checkpoint(path, lambda f: torch.save({"model": tensors, "metadata": metadata}, f))
    else:
        raise CheckpointError(f"{path}: the name of a weights file must end in .pth or .safetensors.")
