"""``knet://<name>`` in MODEL.WEIGHTS: official checkpoints, downloaded once and checked."""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.download import download
from iopath.common.file_io import file_lock, get_cache_dir

from ..errors import CheckpointError, ConfigError, KNetError
from .zoo import ZooEntry, zoo_entry

PREFIX = "knet://"
_SECONDS_WITHOUT_DATA = 20.0


def cache_folder() -> str:
    """Where downloaded checkpoints are: below FVCORE_CACHE, as Detectron2's."""
    return os.path.join(get_cache_dir(), "knet_d2")


@contextlib.contextmanager
def download_errors(address: str, advice: str) -> Iterator[None]:
    """Limit the time without data of downloads; turn their errors into a CheckpointError that ends in ``advice``."""
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
    """Path of the official checkpoint of a zoo entry, which is downloaded if it is not there yet.

    The file's name has eight digits of its sha256, which tell damage, but not an attacker, who finds another file with
    the same eight in minutes. All 64 are shown at the first use, kept beside the file, and compared at each later use.

    Raises:
        CheckpointError: there is none, it can't be had, or the file is not the published one.
    """
    if entry.url is None:
        raise CheckpointError(
            f"{PREFIX}{entry.name}: no checkpoint was published for this config. Train it with train_net.py "
            f"--config-file configs/{entry.name}.yaml, or give other weights in MODEL.WEIGHTS."
        )
    path = os.path.join(cache_folder(), entry.checkpoint_file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with file_lock(path):  # the processes of one run ask for it at the same time
        if os.path.isfile(path):
            _check_hash(path, path, f"Delete it; the right one is {entry.url}.")
        else:
            _download(entry.url, path)
    return path


def _download(url: str, path: str) -> None:
    """Into a temporary folder beside ``path``; only a complete file with the right hash gets its name."""
    folder, name = f"{path}.download", os.path.basename(path)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        with download_errors(url, f"get this file by other means and put it at {path}, or name it in MODEL.WEIGHTS."):
            temporary = download(url, folder, filename=name)
        size = os.path.getsize(temporary)
        _check_hash(temporary, path, f"What {url} gave ({size} bytes) was deleted; try again.")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_hash(file: str, path: str, advice: str) -> None:
    """Compare a file with the sha256 beside ``path``; if there is none, with the digits in its name, and write one."""
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
                f"{path}: its sha256 is {found}, and {expected} is written in {record}. Delete both files if you "
                "do not know why; the file is downloaded again."
            )
        return
    with open(record, "w") as f:  # as the program sha256sum writes and reads it
        f.write(f"{found}  {os.path.basename(path)}\n")
    print(f"{path}: sha256 {found}", file=sys.stderr)


class ZooPathHandler(PathHandler):
    """Resolves knet://<name of the model zoo> for Detectron2's PathManager."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return fetch_checkpoint(zoo_entry(path.removeprefix(PREFIX)))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        try:
            return zoo_entry(path.removeprefix(PREFIX)).url is not None
        except ConfigError:
            return False

    _exists = _isfile


PathManager.register_handler(ZooPathHandler(), allow_override=True)
