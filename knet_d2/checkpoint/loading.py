"""Reading weights files without running code from them.

A checkpoint is a mapping with the parameters under "model" and, for our own files, the trainer's state beside them.
"""

import os
import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO, Dict

import numpy as np
import torch

from ..compat import NUMPY_PICKLE_FUNCTIONS, under_name
from ..errors import CheckpointError

# What a pickle of Detectron2's model zoo consists of besides the built-in containers, by the names in the file.
_PICKLE_TYPES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **NUMPY_PICKLE_FUNCTIONS,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can make containers, strings, numbers and numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLE_TYPES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}") from None


def load_file(path: str) -> Any:
    """The object in a weights file (.pkl: Detectron2's model zoo; otherwise PyTorch), read by safe readers only.

    Raises:
        CheckpointError: the file is missing, damaged, no weights file, or needs an unrestricted pickle.
    """
    try:
        with open(path, "rb") as f:
            return _load_pickle(f) if path.endswith(".pkl") else _load_torch(f)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such weights file. Check MODEL.WEIGHTS.") from None
    except MemoryError:
        raise
    except Exception as e:  # readers of damaged files raise nearly anything
        raise CheckpointError(f"{path} ({os.path.getsize(path)} bytes): {_describe_failure(e)}") from e


def _describe_failure(error: Exception) -> str:
    foreign = re.search(r"it holds a \S+|GLOBAL \S+", str(error))
    if foreign:
        return (
            f"{foreign.group().replace('GLOBAL', 'it holds a').rstrip(',')}, and reading that could run code. "
            "A weights file must hold tensors, numpy arrays, numbers and strings only."
        )
    return "not a weights file of PyTorch (.pth) or Detectron2 (.pkl), or a damaged one."


def _load_pickle(f: BinaryIO) -> Any:
    return _ArrayUnpickler(f, encoding="latin1").load()


def _load_torch(f: BinaryIO) -> Any:
    arrays = [np.ndarray, np.dtype]
    arrays += [under_name(function, *name) for name, function in NUMPY_PICKLE_FUNCTIONS.items()]
    # dtypes are classes of their own since numpy 1.25
    arrays += [type(np.dtype(kind)) for kind in (bool, *np.typecodes["AllInteger"], *np.typecodes["Float"])]
    torch.serialization.add_safe_globals(arrays)
    return torch.load(f, map_location="cpu", weights_only=True)


def as_checkpoint(raw: Any, path: str) -> Dict[str, Any]:
    """Bring what a weights file holds into Detectron2's layout.

    Args:
        raw: a Detectron2 checkpoint ({"model": state dict, ...}), a bare state dict, or the arrays of a Caffe2 or
            Detectron1 model (.pkl).
        path: the file's name, for messages and for telling a .pkl.

    Returns:
        {"model": {name: tensor or array}, ...}; "matching_heuristics" is set where names have to be guessed.
    """
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(f"{path}: holds a {type(raw).__name__} instead of a mapping from names to tensors.")
    if "model" in raw:
        checkpoint = dict(raw)
    elif path.endswith(".pkl"):
        arrays = raw.get("blobs", raw)
        arrays = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
        checkpoint = {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
    else:
        checkpoint = {"model": raw}
    _check_state_dict(checkpoint["model"], path)
    return checkpoint


def _check_state_dict(state_dict: Any, path: str) -> None:
    if not isinstance(state_dict, dict) or not state_dict:
        raise CheckpointError(f"{path}: no parameters in it.")
    for name, value in state_dict.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise CheckpointError(
                f"{path}: no checkpoint that K-Net knows; its entry {name!r} is a {type(value).__name__}, "
                "where a tensor is expected."
            )
