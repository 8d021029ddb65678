"""``knet://<name>`` in MODEL.WEIGHTS: official checkpoints, downloaded once and checked."""

import hashlib
import http.client
import os
import re
import tempfile
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.download import download
from iopath.common.file_io import file_lock, get_cache_dir

from ..errors import CheckpointError, ConfigError
from .zoo import ZooEntry, zoo_entry

PREFIX = "knet://"


def cache_folder() -> str:
    """Where downloaded checkpoints are: below FVCORE_CACHE, as Detectron2's."""
    return os.path.join(get_cache_dir(), "knet_d2")


def fetch_checkpoint(entry: ZooEntry) -> str:
    """Path of the official checkpoint of a zoo entry, which is downloaded if it is not there yet.

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
        if not os.path.isfile(path):
            _download(entry.url, path)
        elif not has_published_hash(path):
            raise CheckpointError(
                f"{path}: not the published file: its sha256 does not begin with {_published_hash(path)}. "
                f"Delete it; the right one is {entry.url}."
            )
    return path


def _download(url: str, path: str) -> None:
    """Into a temporary folder beside ``path``; only a complete file with the right hash gets its name."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".download_") as folder:
        temporary = os.path.join(folder, os.path.basename(path))
        try:
            download(url, folder, filename=os.path.basename(path))
        except (OSError, http.client.HTTPException) as e:
            raise CheckpointError(
                f"{url}: can't be downloaded ({e or type(e).__name__}). Without network, get this file by other means "
                f"and put it at {path}, or name it in MODEL.WEIGHTS."
            ) from e
        if not has_published_hash(temporary):
            raise CheckpointError(
                f"{url}: what was downloaded ({os.path.getsize(temporary)} bytes) is not the published file: its "
                f"sha256 does not begin with {_published_hash(path)}. It was deleted; try again."
            )
        os.replace(temporary, path)


def has_published_hash(path: str) -> bool:
    """Whether a file's sha256 begins as the end of its name says."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest().startswith(_published_hash(path))


def _published_hash(path: str) -> str:
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", path)
    if match is None:
        raise CheckpointError(f"{path}: its name does not end in the first eight digits of its sha256.")
    return match[1]


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
