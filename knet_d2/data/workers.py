"""The signals that ask a run to stop, and the processes that must not follow them by themselves."""

import os
import signal
import threading

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def ignore_stop_signals(worker: int) -> None:
    """Let a process that loads data end at the word of the one that it loads for, and of no other.

    A signal to all processes of a run would end it before the run is saved. As DataLoader's worker_init_fn.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def obey_parent() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
