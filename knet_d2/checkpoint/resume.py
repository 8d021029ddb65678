"""Which file a run continues from."""

import logging
import os
import re

from ..errors import CheckpointError
from .loading import open_archive

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_\d{7,}\.pth")


def periodic_checkpoints(folder: str) -> list[str]:
    """Names of a run's periodic checkpoints, ``model_<iteration>.pth``, the newest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((name for name in os.listdir(folder) if _PERIODIC.fullmatch(name)), key=_age, reverse=True)


def _age(name: str) -> tuple[int, str]:
    return len(name), name  # at least 7 digits, and more for later iterations only


def resumable_checkpoints(folder: str) -> list[str]:
    """Names of the files that a run in a folder can continue from, the best first.

    It is the file that "last_checkpoint" names, then the periodic ones before it (all, where there is no such file).
    """
    periodic, last = periodic_checkpoints(folder), ""
    try:
        with open(os.path.join(folder, "last_checkpoint"), errors="replace") as f:
            last = os.path.basename(f.read().strip("\0 \n"))
    except FileNotFoundError:
        pass  # killed between its first checkpoint and the file that names it
    if not last:
        return periodic
    # later ones are damaged: an earlier resume has passed over them
    before = [name for name in periodic if not _PERIODIC.fullmatch(last) or _age(name) < _age(last)]
    return [last, *before]


def newest_whole_checkpoint(folder: str) -> str | None:
    """Path of the last checkpoint in a folder; of the one before, with a warning, where the last one is damaged.

    Returns:
        None where no run has left a checkpoint.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    reasons = []
    for name in resumable_checkpoints(folder):
        path = os.path.join(folder, name)
        reason = find_damage(path)
        if reason is None:
            if reasons:
                logger.warning(f"Damaged: {'; '.join(reasons)}. The run continues from {path}, the one before.")
            return path
        reasons.append(f"{path} ({reason})")
    if reasons:
        raise CheckpointError(
            f"No checkpoint to resume from is whole: {'; '.join(reasons)}. Start anew without --resume, or put a good "
            "copy in place of one of them."
        )
    return None


def remove_unfinished(folder: str) -> None:
    """Remove what a killed run had begun to write, see write_atomically."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))


def find_damage(path: str) -> str | None:
    """Why a checkpoint, as PyTorch writes it, can't be whole; None if its checksums are right. Reads all of it."""
    try:
        with open_archive(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        return "it is not there"
    except Exception as error:  # readers of damaged files raise nearly anything
        return f"{os.path.getsize(path)} bytes: {error or type(error).__name__}"
    return None if damaged is None else f"the checksum of {damaged} in it is wrong"
