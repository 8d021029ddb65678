"""Stopping a run by a signal: its state is saved, and it ends with an exit code of its own."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..data.workers import STOP_SIGNALS
from .failures import EXIT_FAILED, is_lost_connection

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: do the same again


class Preempted(SystemExit):
    """A signal stopped the run, and its state is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class StopSignals:
    """Remembers, inside its ``with`` block, that the process was asked to stop.

    Outside the main thread, where Python has no signal handlers, nothing is ever received.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received and error is not None and is_lost_connection(error):
            # Whoever started the processes is ending them, after one failed, and knows why
            raise SystemExit(EXIT_FAILED) from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
