"""Writing parameters alone, to share them."""

from typing import Dict, Mapping

import torch

from ..errors import CheckpointError
from .checkpointer import write_atomically
from .loading import SAFETENSORS_COMMAND


def save_weights(path: str, state_dict: Mapping[str, torch.Tensor], metadata: Dict[str, str]) -> None:
    """Write a file that MODEL.WEIGHTS takes; ``path`` is the old or the new file, whole.

    Args:
        path: ends in ".pth" ({"model": ..., "metadata": ...}) or ".safetensors".
        state_dict: in our names.
        metadata: about the parameters.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import save
        except ImportError:
            raise CheckpointError(f"{path}: writing it needs a package; {SAFETENSORS_COMMAND}.") from None
        write_atomically(path, lambda f: f.write(save(tensors, {"format": "pt", **metadata})))
    elif path.endswith(".pth"):
        write_atomically(path, lambda f: torch.save({"model": tensors, "metadata": metadata}, f))
    else:
        raise CheckpointError(f"{path}: the name of a weights file must end in .pth or .safetensors.")
