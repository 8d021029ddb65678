"""Reading weights files without running code from them.

Whatever the file, it becomes a mapping with the parameters under "model", as in Detectron2's own checkpoints.
"""

import mmap
import os
import pickle
import re
import tarfile
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..setup.compat import NUMPY_PICKLE_FUNCTIONS, under_name

SAFETENSORS_COMMAND = "install it with: python -m pip install safetensors"

# What a pickle of Detectron2's model zoo consists of besides the built-in containers, by the names in the file.
_PICKLE_TYPES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **NUMPY_PICKLE_FUNCTIONS,
}


# How PyTorch's files begin: a zip archive, or (before PyTorch 1.6) a pickle of a magic number.
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler that can make containers, strings, numbers and numpy arrays, and nothing else.

    It is the one written in Python, because that in C reserves memory for as many entries as a file claims to have.
    """

    # nor byte arrays, whose memory is reserved before they are read
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLE_TYPES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}") from None


def load_file(path: str) -> Any:
    """The object in a weights file, read by safe readers only; its format is told by its content.

    Formats are PyTorch's (zip and older), pickles of arrays (Detectron2's model zoo) and safetensors, which gives
    {"model": tensors, "metadata": strings}.

    Raises:
        CheckpointError: the file is missing, damaged, no weights file, or needs an unrestricted pickle.
    """
    try:
        # from a map, no more can be read (and no more memory reserved for it) than the file has
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:16].startswith(_TORCH_MAGIC):
                _refuse_tar(content)
                return _load_torch(content)
            if content[8:9] == b"{":
                return _load_safetensors(path)
            return _ArrayUnpickler(content, encoding="latin1").load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such weights file. Check MODEL.WEIGHTS.") from None
    except (MemoryError, CheckpointError):
        raise
    except Exception as e:  # readers of damaged files raise nearly anything
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        raise CheckpointError(f"{path} ({size} bytes): {_describe_failure(e)}") from e


def _describe_failure(error: Exception) -> str:
    foreign = re.search(r"it holds a \S+|GLOBAL \S+", str(error))
    if foreign:
        return (
            f"{foreign.group().replace('GLOBAL', 'it holds a').rstrip(',')}, and reading that could run code. "
            "A weights file must hold tensors, numpy arrays, numbers and strings only."
        )
    return "not a weights file of PyTorch (.pth), Detectron2 (.pkl) or safetensors, or a damaged one."


def _refuse_tar(f: mmap.mmap) -> None:
    """PyTorch tries its oldest format first, tar archives, which it read unsafely until 2.6 (CVE-2025-32434)."""
    try:
        tarfile.open(fileobj=f, mode="r:").close()
    except tarfile.TarError:
        f.seek(0)
    else:
        raise pickle.UnpicklingError("a tar archive")


def _load_torch(f: mmap.mmap) -> Any:
    arrays: list[Any] = [np.ndarray, np.dtype]
    arrays += [under_name(function, *name) for name, function in NUMPY_PICKLE_FUNCTIONS.items()]
    # dtypes are classes of their own since numpy 1.25
    arrays += [type(np.dtype(kind)) for kind in (bool, *np.typecodes["AllInteger"], *np.typecodes["Float"])]
    torch.serialization.add_safe_globals(arrays)
    return torch.load(f, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # any file will do


def _load_safetensors(path: str) -> dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise CheckpointError(f"{path}: reading it needs a package; {SAFETENSORS_COMMAND}.") from None
    with safe_open(path, framework="pt") as f:
        return {"model": {name: f.get_tensor(name) for name in f.keys()}, "metadata": f.metadata() or {}}


def as_checkpoint(raw: Any, path: str) -> dict[str, Any]:
    """Bring what a weights file holds into Detectron2's layout.

    Args:
        raw: a Detectron2 checkpoint or Swin release ({"model": state dict, ...}), an OpenMMLab checkpoint
            ({"state_dict": ..., "meta": ...}), a bare state dict, or the arrays of a Caffe2 or Detectron1 model.
        path: the file's name, for messages.

    Returns:
        {"model": {name: tensor}, ...}; "matching_heuristics" is set where names have to be guessed.
    """
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(f"{path}: holds a {type(raw).__name__} instead of a mapping from names to tensors.")
    if "model" in raw:
        checkpoint = dict(raw)
    elif "state_dict" in raw:
        checkpoint = {"model": raw["state_dict"]}  # OpenMMLab's optimiser is of no use here
    else:
        checkpoint = _bare_checkpoint(raw.get("blobs", raw))
    checkpoint["model"] = _checked_state_dict(checkpoint["model"], path)
    return checkpoint


def _bare_checkpoint(entries: Any) -> dict[str, Any]:
    if isinstance(entries, dict) and any(re.search(r"_[wb]$", str(name)) for name in entries):
        arrays = {name: value for name, value in entries.items() if not str(name).endswith("_momentum")}
        return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
    return {"model": entries}


def _checked_state_dict(state_dict: Any, path: str) -> dict[str, torch.Tensor]:
    """Tensors by name, without the prefix that DataParallel and DistributedDataParallel add."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise CheckpointError(f"{path}: no parameters in it.")
    checked = {}
    for name, value in state_dict.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)) or not isinstance(name, str):
            raise CheckpointError(
                f"{path}: no checkpoint that K-Net knows; its entry {name!r} is a {type(value).__name__}, "
                "where a tensor is expected."
            )
        try:
            checked[name] = torch.as_tensor(value)
        except TypeError as e:  # arrays of objects or strings
            raise CheckpointError(f"{path}: its entry {name!r} is no array of numbers.") from e
    if all(name.startswith("module.") for name in checked):
        checked = {name.removeprefix("module."): value for name, value in checked.items()}
    return checked
