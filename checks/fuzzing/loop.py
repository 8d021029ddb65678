"""The fuzzing loop: reads damaged files in a separate process, with limits on time and memory."""

import logging
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from typing import NamedTuple

from knet_d2.errors import KNetError

from .targets import TARGETS

SUCCESS, REFUSED, FAULT = "success", "refused", "fault"
# Limit of the waiting time, as a multiple of the limit of processor time: a blocked process uses no processor time.
WAITING = 10


class Outcome(NamedTuple):
    """The outcome of one input."""

    index: int
    reached: bool
    """Whether the file was decoded, so that its content reached the model or the loader."""
    kind: str
    detail: str = ""
    """For a fault: one line that identifies it, for counting."""
    trace: str = ""


class Summary(NamedTuple):
    """The outcomes of all inputs of one kind."""

    counts: "Counter[str]"
    reached: int
    faults: dict[str, Outcome]
    """Detail of a fault -> its first outcome."""


def fuzz(kind: str, count: int, seed: int, first: int = 0, seconds: float = 20, memory_mib: int = 2048) -> Summary:
    """Make and read the inputs first, ..., first + count - 1; each depends only on kind, seed and its number.

    Args:
        seconds: limit of the processor time of an input, which does not depend on other load.
        memory_mib: limit of the address space of an input, in addition to that of the process before.
    """
    counts, faults, reached, index = Counter(), {}, 0, first
    while index < first + count:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (kind, range(index, first + count), seed, seconds, memory_mib, theirs)
        worker = multiprocessing.get_context("fork").Process(target=_work, args=arguments, daemon=True)
        worker.start()
        theirs.close()
        while index < first + count:
            try:
                # Poll for single seconds, so that the limit does not run while this process is suspended.
                if any(ours.poll(1) for _ in range(round(seconds * WAITING))):
                    outcome = ours.recv()
                else:
                    outcome = Outcome(index, True, FAULT, "waits forever")
            except EOFError:
                worker.join()
                reason = "hangs" if worker.exitcode == -signal.SIGPROF else f"ends the process: {worker.exitcode}"
                outcome = Outcome(index, True, FAULT, reason)
            counts[outcome.kind] += 1
            reached += outcome.reached
            if outcome.kind == FAULT:
                faults.setdefault(outcome.detail, outcome)
            index += 1
            if outcome.kind == FAULT and not outcome.trace:
                break  # the process has ended: start a new one
        worker.kill()
        worker.join()
    return Summary(counts, reached, faults)


def _work(kind: str, indices: range, seed: int, seconds: float, memory_mib: int, connection: Connection) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[kind](folder)
        with open("/proc/self/statm") as f:
            limit = int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE") + memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for index in indices:
            draw = random.Random(f"{kind} {seed} {index}")
            signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process after this time
            connection.send(_try(target, draw, index))


def _try(target, draw: random.Random, index: int) -> Outcome:
    reached = []
    try:
        target.make(draw)
        target.use(draw, lambda: reached.append(True))
        return Outcome(index, bool(reached), SUCCESS)
    except KNetError as error:
        if _ran_out_of_memory(error) and not target.may_take_memory:
            return Outcome(index, bool(reached), FAULT, "takes too much memory", traceback.format_exc())
        return Outcome(index, bool(reached), REFUSED)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        return Outcome(index, bool(reached), FAULT, f"{type(error).__name__} at {place}", traceback.format_exc())


def _ran_out_of_memory(error: BaseException) -> bool:
    chain = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "can't allocate memory" in str(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
