"""The signals that ask a run to stop, and how the worker processes of a data loader treat them."""

import os
import signal
import threading

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def ignore_stop_signals(worker: int) -> None:
    """Make a worker process ignore stop signals, except those of its parent process; DataLoader's worker_init_fn.

    Schedulers signal all processes of a run. Workers that ended then would stop the run before it is saved. Signals
    of the parent must work, because Python ends worker processes by SIGTERM when the parent exits, and waits for them.
    Ctrl-C reaches all processes of a terminal, too; the parent ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def obey_parent() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
