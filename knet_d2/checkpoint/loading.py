"""Reads weights files of all supported formats without running code from them.

The result is a mapping with the parameters under "model", as in Detectron2's checkpoints.
"""

import contextlib
import hashlib
import io
import mmap
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import CheckpointError
from .pickles import MOST_OBJECTS, Builder, Refused, Storage, checked_key, read_pickle

SAFETENSORS_COMMAND = "install it with: python -m pip install safetensors"

# Largest directory of a zip archive that is read, enough for more than 100,000 records
_MOST_DIRECTORY_BYTES = 1 << 23
# Pickled magic number at the start of PyTorch's files before version 1.6
_OLD_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MOST_PARAMETERS, _LONGEST_NAME = 10_000, 500
_DAMAGED = "not a weights file of PyTorch (.pth), Detectron2 (.pkl) or safetensors, or a damaged one. Copy it again."


def split_options(path: str) -> tuple[str, dict[str, str]]:
    """Split the address of a weights file from its options, as in "model.pth?sha256=<64 hexadecimal digits>".

    The option "matching_heuristics=True" lets Detectron2 match parameters with different names by similarity. The
    option "sha256=..." rejects a file with another hash. Other text after "?" stays in the address.
    """
    options = {}
    while match := re.search(r"[?&](matching_heuristics=True|sha256=[0-9a-fA-F]{64})$", path):
        name, value = match[1].split("=")
        path, options[name] = path[: match.start()], value
    return path, options


def load_file(path: str, sha256: str | None = None) -> Any:
    """Read the object in a weights file by safe readers only.

    The format is detected from the content: PyTorch's formats (zip and older), pickles of arrays (Detectron2's model
    zoo) or safetensors, which is returned as {"model": tensors, "metadata": strings}. Arrays become tensors.

    Args:
        path: path of the file; may end in options, see :func:`split_options`.
        sha256: required sha256 in hexadecimal digits; None: any.

    Raises:
        CheckpointError: the file is missing or damaged, is not a weights file, or contains objects that can't be read
            without running code.
    """
    path, options = split_options(path)
    sha256 = sha256 or options.get("sha256")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such weights file or folder. Correct the path (MODEL.WEIGHTS).")
    size = os.path.getsize(path)
    try:
        # Reading from a memory map never reserves more memory than the size of the file, whatever length it claims.
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256.lower():
                raise Refused(f"its sha256 is not {sha256}, as required. Delete the file and download it again.")
            if content[:4] == b"PK\x03\x04":
                with open_archive(path) as archive:
                    return _read_archive(archive, size)
            if content[:15] == _OLD_TORCH_MAGIC:
                return _read_old_torch(content)
            if content[257:262] == b"ustar":
                raise Refused("a tar archive of an old PyTorch. If you trust it, load and save it again with PyTorch.")
            if content[8:9] == b"{":
                return _load_safetensors(path)
            return Builder(size, _no_storage).build(read_pickle(content))
    except CheckpointError:
        raise
    except MemoryError as e:
        raise CheckpointError(f"{path} ({size} bytes): too large for the free memory. Free some memory.") from e
    except Refused as e:
        raise CheckpointError(f"{path}: {e}") from None
    except Exception as e:  # a damaged file can cause almost any exception in a reader
        raise CheckpointError(f"{path} ({size} bytes): {_DAMAGED}") from e


class _Directory(io.BufferedReader):
    """A file that limits the bytes of one read, because zipfile's objects take 20 times the size of the directory."""

    most_bytes = _MOST_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most_bytes:
            raise Refused(f"its directory has more than {self.most_bytes} bytes. Save only the model's state dict.")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: str) -> Iterator[zipfile.ZipFile]:
    """Open a PyTorch file (zip), and check that its records are not larger than the file.

    Raises:
        Refused: a record is compressed, or the records claim more bytes than the file has.
        zipfile.BadZipFile, ...: the file is damaged.
    """
    with _Directory(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise Refused("a record in it is compressed, which torch.save never does. Save it with torch.save.")
        file.most_bytes = os.path.getsize(path)
        if sum(record.file_size for record in archive.infolist()) > file.most_bytes:
            raise Refused(f"its records claim more bytes than the file has. {_DAMAGED}")
        yield archive


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    folder = archive.namelist()[0].split("/")[0]
    if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
        raise Refused("written on a machine with another byte order. Save it again on a little-endian machine.")

    def read_storage(storage: Storage) -> bytes:
        return archive.read(f"{folder}/data/{storage.key}")

    return Builder(size, read_storage).build(read_pickle(io.BytesIO(archive.read(f"{folder}/data.pkl"))))


def _read_old_torch(content: mmap.mmap) -> Any:
    """Read PyTorch's format before version 1.6.

    The file contains five pickles (magic number, version, machine, object, keys of the storages), then the length and
    the values of each storage.
    """
    storages: dict[str | int, Storage] = {}
    _, version, machine = (read_pickle(content, most_objects=1000) for _ in range(3))
    if version != 1001 or machine["little_endian"] is not True:
        raise Refused("written on a machine with another byte order. Save it again on a little-endian machine.")
    tree, keys = read_pickle(content, storages), read_pickle(content, most_objects=MOST_OBJECTS // 10)
    places = {}
    position = content.tell()
    for key in keys:
        (length,) = struct.unpack_from("<q", content, position)
        places[checked_key(key)] = position + 8
        position += 8 + length * storages[key].dtype.itemsize
        if length < 0 or position > len(content):
            raise ValueError("a storage out of the file")

    def read_storage(storage: Storage) -> bytes:
        return content[places[storage.key] : places[storage.key] + storage.num_bytes]

    return Builder(len(content), read_storage).build(tree)


def _no_storage(storage: Storage) -> bytes:
    raise ValueError("a storage in a pickle of arrays")


def _load_safetensors(path: str) -> dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors; {SAFETENSORS_COMMAND}.") from None
    with safe_open(path, framework="pt") as f:
        return {"model": {name: f.get_tensor(name) for name in f.keys()}, "metadata": f.metadata() or {}}


def as_checkpoint(raw: Any, path: str) -> dict[str, Any]:
    """Convert the content of a weights file to Detectron2's layout.

    Args:
        raw: a Detectron2 checkpoint or Swin release ({"model": state dict, ...}), an OpenMMLab checkpoint
            ({"state_dict": ..., "meta": ...}), a bare state dict, or the arrays of a Caffe2 or Detectron1 model.
        path: path of the file, for error messages.

    Returns:
        {"model": {name: tensor}, ...}; "matching_heuristics" is set if the names must be matched by similarity.

    Raises:
        CheckpointError: the content is not a checkpoint.
    """
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(
            f"{path}: contains a {type(raw).__name__} instead of a mapping from names to tensors. Check MODEL.WEIGHTS."
        )
    if "model" in raw:
        checkpoint = dict(raw)
    elif "state_dict" in raw:
        checkpoint = {"model": raw["state_dict"]}  # OpenMMLab's optimiser state can't be used
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
    """Check a state dict; returns it without the prefix that DataParallel and DistributedDataParallel add."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise CheckpointError(f"{path}: contains no parameters. Check MODEL.WEIGHTS.")
    if len(state_dict) > _MOST_PARAMETERS or any(len(str(name)) > _LONGEST_NAME for name in state_dict):
        raise CheckpointError(
            f"{path}: has more than {_MOST_PARAMETERS} parameters or a name of more than {_LONGEST_NAME} letters, so "
            "it is not a K-Net. Check MODEL.WEIGHTS."
        )
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{path}: not a checkpoint of a known layout: its entry {name!r} is a {type(value).__name__}, but must "
                "be a tensor. Check MODEL.WEIGHTS."
            )
    if all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return dict(state_dict)
