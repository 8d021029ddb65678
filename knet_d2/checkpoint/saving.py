"""Writing parameters alone, to share them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpointer import write_atomically
from .loading import SAFETENSORS_COMMAND


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
        _write(path, lambda f: f.write(save(tensors, {"format": "pt", **metadata})))
    elif path.endswith(".pth"):
        _write(path, lambda f: torch.save({"model": tensors, "metadata": metadata}, f))
    else:
        raise CheckpointError(f"{path}: the name of a weights file must end in .pth or .safetensors.")


def _write(path: str, write: Callable[[Any], None]) -> None:
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: can't be written ({e}).") from e
