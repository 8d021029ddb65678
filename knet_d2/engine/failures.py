"""What failures of the machinery around a run mean, in words that help."""

import errno
import os
import re
import traceback

from torch import distributed

from ..errors import KNetError

EXIT_FAILED = 1

_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_CONTINUE = "The last checkpoint is intact: continue with --resume."


def explain(error: BaseException) -> str | None:
    """One message that says what to do; None for a failure that only its traceback explains."""
    if isinstance(error, KNetError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NO_WRITING:
        name = os.fsdecode(error.filename) if error.filename else "A file of the run"
        return f"{name}: {error.strerror}. Make room there or choose another OUTPUT_DIR. {_CONTINUE}"
    worker = re.search(r"DataLoader worker \(pid.*?\) (is killed by signal: \w+|exited unexpectedly)", str(error))
    if worker or _broke_while_loading(error):
        what = worker.group(1) if worker else "exited unexpectedly"
        return (
            f"A process that loads data {what} (out of memory, perhaps: try a smaller DATALOADER.NUM_WORKERS). "
            f"{_CONTINUE}"
        )
    if is_lost_connection(error):
        return f"Another process of this run has ended, or has not answered in time. {_CONTINUE} ({_first_line(error)})"
    return None


def _broke_while_loading(error: BaseException) -> bool:
    """Whether the connection to a process that loads data broke while a batch was fetched from it."""
    files = {os.path.basename(frame.filename) for frame in traceback.extract_tb(error.__traceback__)}
    return isinstance(error, (OSError, EOFError)) and {"dataloader.py", "connection.py"} <= files


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because of another process."""
    if isinstance(error, distributed.DistError):
        return True
    # PyTorch has no type for what gloo reports
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|connection (closed|reset)|timed out waiting", str(error), re.IGNORECASE)
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
