"""Keeps a second training out of the OUTPUT_DIR of one that is running."""

import errno
import os
import socket
from typing import TextIO

from detectron2.utils import comm

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_locks: dict[str, TextIO] = {}


def lock_output_dir(folder: str) -> None:
    """Let no other process train in an existing folder until this one ends or releases it; on the main process.

    The lock is the operating system's: it ends with the process, however that ends, and children don't inherit it.
    Where a file system has no locks, nothing is locked.

    Raises:
        ConfigError: names the process that trains there.
    """
    folder = os.path.realpath(folder)
    if fcntl is None or folder in _locks or not comm.is_main_process():
        return
    file = open(os.path.join(folder, "training.lock"), "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        raise ConfigError(
            f"OUTPUT_DIR = {folder}: {holder or 'another process'} trains there. End it, or choose another OUTPUT_DIR."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder] = file


def release_output_dir(folder: str) -> None:
    """Let others train in a folder again."""
    file = _locks.pop(os.path.realpath(folder), None)
    if file is not None:
        file.close()
