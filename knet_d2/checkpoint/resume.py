"""Selects the checkpoint from which a run continues, and the one that a run's folder stands for."""

import logging
import os
import re

from ..errors import CheckpointError
from .loading import open_archive

logger = logging.getLogger(__name__)

# What a training run ends with: the best weights first
_RESULTS = ("model_best.pth", "model_final.pth")
_SET_ASIDE = re.compile(r"model_(best|final)_(\d+)\.pth")
_PERIODIC = re.compile(r"model_\d{7,}\.pth")


def periodic_checkpoints(folder: str) -> list[str]:
    """Return the names of a run's periodic checkpoints, ``model_<iteration>.pth``, newest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((name for name in os.listdir(folder) if _PERIODIC.fullmatch(name)), key=_age, reverse=True)


def _age(name: str) -> tuple[int, str]:
    return len(name), name  # names have at least 7 digits, so a longer name has a higher number


def resumable_checkpoints(folder: str) -> list[str]:
    """Return the names of the files from which a run in a folder can continue, best first.

    The first is the file that "last_checkpoint" names. The earlier periodic checkpoints follow, or all of them if
    there is no file "last_checkpoint".
    """
    periodic, last = periodic_checkpoints(folder), ""
    try:
        with open(os.path.join(folder, "last_checkpoint"), errors="replace") as f:
            last = os.path.basename(f.read().strip("\0 \n"))
    except FileNotFoundError:
        pass  # the run was killed after it wrote the first checkpoint and before it wrote this file
    if not last:
        return periodic
    # Checkpoints of later iterations are damaged: an earlier resume has skipped them.
    before = [name for name in periodic if not _PERIODIC.fullmatch(last) or _age(name) < _age(last)]
    return [last, *before]


def newest_whole_checkpoint(folder: str) -> str | None:
    """Return the path of the newest checkpoint that is not damaged; warns if a newer one is damaged.

    Returns:
        The path; None if the folder has no checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    reasons = []
    for name in resumable_checkpoints(folder):
        path = os.path.join(folder, name)
        reason = find_damage(path)
        if reason is None:
            if reasons:
                logger.warning(
                    "Damaged: %s. The run continues from the checkpoint before, %s.", "; ".join(reasons), path
                )
            return path
        reasons.append(f"{path} ({reason})")
    if reasons:
        raise CheckpointError(
            f"All checkpoints of the run are damaged: {'; '.join(reasons)}. Start again without --resume, or replace "
            "one of them by an intact copy."
        )
    return None


def best_checkpoint(folder: str) -> str:
    """Return the path of the best weights of a training run's folder.

    Raises:
        CheckpointError: the folder has none.
    """
    for name in _RESULTS:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
    earlier = _newest_set_aside(folder)
    found = f"; the earlier run's model is {os.path.join(folder, earlier)}" if earlier else ""
    raise CheckpointError(
        f"{folder}: this folder has no {' or '.join(_RESULTS)}{found}. Train first, or name a weights file."
    )


def _newest_set_aside(folder: str) -> str | None:
    """The best weights of the last run that a new one in the same folder has renamed: model_best_<number>.pth."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [match for name in names if (match := _SET_ASIDE.fullmatch(name))]
    return max(found, key=lambda match: (int(match[2]), match[1] == "best"))[0] if found else None


def remove_unfinished(folder: str) -> None:
    """Remove the temporary files of write_atomically that a killed run has left."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))


def find_damage(path: str) -> str | None:
    """Return why a checkpoint of PyTorch is damaged; None if its checksums are right. Reads the whole file."""
    try:
        with open_archive(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        return "the file does not exist"
    except Exception as error:  # a damaged file can cause almost any exception in a reader
        return f"{os.path.getsize(path)} bytes: {error or type(error).__name__}"
    return None if damaged is None else f"the checksum of its record {damaged} is wrong"
