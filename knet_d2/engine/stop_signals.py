"""Stop signals (SIGTERM, Ctrl-C and others): a run that gets one saves its state and ends."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ..data.workers import STOP_SIGNALS
from .failures import EXIT_FAILED, is_lost_process

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
_HANDLED = (*STOP_SIGNALS, signal.SIGINT)
# Seconds in which SIGINTs count as one: a terminal sends it to all processes, and torchrun passes it on to them again
_ONE_INTERRUPT = 1.0
_INTERRUPTED = b"\nCtrl-C: a checkpoint is written after this iteration. Press it again to end at once, without one.\n"


class Preempted(SystemExit):
    """Raised when a signal has stopped the run and its state is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class StopSignals:
    """Records that the process has received a stop signal.

    Attributes:
        received: name of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted = -math.inf

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Record a stop signal that arrives inside the ``with`` block in ``received``; a second Ctrl-C interrupts."""
        self.received, self._interrupted = None, -math.inf
        try:
            with handlers(self._receive):
                yield
        except Exception as error:
            if self.received and is_lost_process(error):
                # The signal came from the launcher, which ends all processes and reports the one that failed.
                raise SystemExit(EXIT_FAILED) from error
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if self._interrupted == -math.inf:
            self._interrupted = time.monotonic()
            os.write(2, _INTERRUPTED)  # print is not allowed in a handler, which may interrupt another print
        elif time.monotonic() - self._interrupted > _ONE_INTERRUPT:
            raise KeyboardInterrupt


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to all child processes."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)  # type: ignore[arg-type]


_handled: list[int] = []


@contextlib.contextmanager
def handlers(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals and SIGINT inside a ``with`` block.

    In other threads than the main thread it does nothing, because Python allows signal handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in _HANDLED}
    _handled.extend(previous)
    try:
        yield
    finally:
        _handled.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _reset_in_child() -> None:
    """Restore the default handlers in a forked child, because multiprocessing.Pool ends its processes by SIGTERM.

    SIGINT is ignored: a terminal sends it to all processes, and the parent still needs its children.
    """
    for number in _handled:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _handled)
    _handled.clear()


if hasattr(os, "register_at_fork"):
    # Block the signals during a fork: a signal that arrives before the child's handlers are reset would be lost.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _handled),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _handled),
        after_in_child=_reset_in_child,
    )
