"""Reports once, and in one line where the user can mend it, why a run has failed."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed

from ..errors import KNetError
from ..setup.compat import default_store

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # as of a program that SIGINT ends

RESUME = "The last checkpoint is intact: continue with --resume."
# Grace period in seconds for the launcher to report a killed rank and to end the others.
_GRACE_PERIOD = 3


def explain(error: BaseException) -> str | None:
    """Return a message for the user that says what to do; None if the failure needs its traceback."""
    if isinstance(error, KNetError):
        return str(error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_lost_process(error):
        return (
            "A process of this run or of its data loader has ended or has not answered in time. If memory ran out, use "
            f"a smaller DATALOADER.NUM_WORKERS. {RESUME} ({reason})"
        )
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "A file of the run"
        return f"{name}: {error.strerror}. Set OUTPUT_DIR to a writable folder with free disk space."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return (
            "Out of memory. Use a smaller SOLVER.IMS_PER_BATCH, smaller images (INPUT.MIN_SIZE_TRAIN, "
            "INPUT.MAX_SIZE_TRAIN), more parts per batch (SOLVER.ACCUMULATE_GRADIENTS) or MODEL.KNET.CHECKPOINT True. "
            f"({reason})"
        )
    return None


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error means that another process has ended.

    The message must be searched, because gloo and DataLoader raise plain RuntimeErrors.
    """
    if isinstance(error, (distributed.DistError, ConnectionError, EOFError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "DataLoader worker" in str(error))


def run_guarded(work: Callable, *args: Any) -> int:
    """Run the work of this process and report its failure; returns the exit code."""
    # With a full disk, writing log files and TensorBoard's thread fail, too, and would print more tracebacks.
    logging.raiseExceptions, threading.excepthook = False, _print_unexplained
    try:
        work(*args)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # NCCL warns of resources that leak otherwise
        return 0
    except Exception as error:
        if hasattr(signal, "SIGCHLD"):  # PyTorch's handler could raise another error while this one is reported
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _report(error)


def _report(error: Exception) -> int:
    """Print why this process ends, unless another process has failed before; returns the exit code."""
    if is_lost_process(error):
        time.sleep(_GRACE_PERIOD)
    if not _is_first_failure():
        logger.info("Process %d ends because another process has failed.", comm.get_rank())
        return EXIT_FAILED
    message = explain(error)
    if message is not None:
        print(f"Error: {message}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    logger.error("Unexpected failure:", exc_info=error)
    if not comm.is_main_process():  # the console shows the main process's log only
        traceback.print_exception(error)
    return EXIT_FAILED


def _is_first_failure() -> bool:
    """Return whether no other process of the run has failed before."""
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    try:
        return default_store().add("knet_d2/failures", 1) == 1
    except RuntimeError:  # the store ends with the main process
        return comm.is_main_process()


def _print_unexplained(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or explain(args.exc_value) is None:
        threading.__excepthook__(args)
