"""Starts the processes of a run, stops them after a signal, and reports once why a run has failed.

The processes are started by torchrun or SLURM's srun if their environment variables are set, else by Detectron2's
``launch``.
"""

import argparse
import contextlib
import datetime
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..data.workers import STOP_SIGNALS
from ..errors import ConfigError, KNetError
from ..setup.compat import create_local_process_group, default_store

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again

_RESUME = "The last checkpoint is intact: continue with --resume."
# Grace period in seconds for the launcher to report a killed rank and to end the others.
_GRACE_PERIOD = 3
_PORTS = range(12000, 32000)  # below the ports that operating systems use for outgoing connections


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the launch options that Detectron2's command line does not have."""
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        help="a process fails when it waits longer than this for another process",
    )
    return parser


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Run ``main(args)`` in every process of a run.

    Args:
        main: function of a module or of the main program.
        args: arguments of Detectron2's command line and of :func:`add_launch_arguments`.

    Returns:
        The exit code: 0, or EXIT_FAILED after a failure, which the first failed process has reported.

    Raises:
        SystemExit: the run ends with another exit code, such as EXIT_PREEMPTED after a signal.
    """
    return _guarded(_start, main, args)


def _start(main: Callable, args: argparse.Namespace) -> None:
    timeout = datetime.timedelta(minutes=args.timeout_minutes)
    place = find_placement(os.environ, args.num_gpus, args.num_machines)
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use at most these."
        )
    if place is not None:
        _join(place, timeout)
    elif args.num_gpus * args.num_machines > 1:
        return _launch(main, args, timeout)
    main(args)


def _launch(main: Callable, args: argparse.Namespace, timeout: datetime.timedelta) -> None:
    # After a failure this logger would also report each of the other processes, which PyTorch then ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with _handlers(_pass_on):
            launch(
                _work,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
                timeout=timeout,
            )
    except ProcessExitedException as error:
        if error.signal_name is None:
            sys.exit(error.exit_code)  # the process has printed why
        raise KNetError(
            f"Process {error.error_index} was killed by {error.signal_name}, maybe because memory ran out. {_RESUME}"
        ) from error
    except ProcessRaisedException as error:  # raised while the processes connect: _work reports its own errors
        raise KNetError(f"The processes can't connect. {str(error).strip().splitlines()[-1]}") from error


def _work(main: Callable, args: argparse.Namespace) -> None:
    sys.exit(_guarded(main, args))


# ---- user-readable messages for infrastructure failures ------------------------------------------------------------


def explain(error: BaseException) -> str | None:
    """Return a message for the user that says what to do; None if only the traceback explains the failure."""
    if isinstance(error, KNetError):
        return str(error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_lost_process(error):
        return (
            "A process of this run or of its data loader has ended or has not answered in time. If memory ran out, use "
            f"a smaller DATALOADER.NUM_WORKERS. {_RESUME} ({reason})"
        )
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "A file of the run"
        return f"{name}: {error.strerror}. Set OUTPUT_DIR to a writable folder with free disk space."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return (
            "Out of memory. Use a smaller SOLVER.IMS_PER_BATCH, smaller images (INPUT.MIN_SIZE_TRAIN, "
            f"INPUT.MAX_SIZE_TRAIN) or more parts per batch (SOLVER.ACCUMULATE_GRADIENTS). ({reason})"
        )
    return None


def _is_lost_process(error: BaseException) -> bool:
    """Return whether an error means that another process has ended.

    The message must be searched, because gloo and DataLoader raise plain RuntimeErrors.
    """
    if isinstance(error, (distributed.DistError, ConnectionError, EOFError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "DataLoader worker" in str(error))


def _guarded(work: Callable, *args: Any) -> int:
    """Run the work of this process and report its failure; returns the exit code."""
    # With a full disk, writing log files and TensorBoard's thread fail, too, and would print more tracebacks.
    logging.raiseExceptions, threading.excepthook = False, _print_unexplained
    try:
        work(*args)
        return 0
    except Exception as error:
        if hasattr(signal, "SIGCHLD"):  # PyTorch's handler could raise another error while this one is reported
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _report(error)


def _report(error: Exception) -> int:
    """Print why this process ends, unless another process has failed before; returns the exit code."""
    if _is_lost_process(error):
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


# ---- signals ---------------------------------------------------------------------------------------------------


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

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Record a stop signal that arrives inside the ``with`` block in ``received``."""
        self.received = None
        try:
            with _handlers(self._receive):
                yield
        except Exception as error:
            if self.received and _is_lost_process(error):
                # The signal came from the launcher, which ends all processes and reports the one that failed.
                raise SystemExit(EXIT_FAILED) from error
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to all child processes."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)  # type: ignore[arg-type]


_handled: list[int] = []


@contextlib.contextmanager
def _handlers(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals inside a ``with`` block.

    In other threads than the main thread it does nothing, because Python allows signal handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    _handled.extend(previous)
    try:
        yield
    finally:
        _handled.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _reset_in_child() -> None:
    """Restore the default handlers in a forked child, because multiprocessing.Pool ends its processes by SIGTERM."""
    for number in _handled:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _handled)
    _handled.clear()


if hasattr(os, "register_at_fork"):
    # Block the signals during a fork: a signal that arrives before the child's handlers are reset would be lost.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _handled),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _handled),
        after_in_child=_reset_in_child,
    )


# ---- the environment -------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """The place of this process in a run that torchrun or srun has started.

    Attributes:
        rank, world_size: number of this process, and of all processes.
        local_rank, local_size: the same among the processes of its machine.
        url: init_method of torch.distributed, the address at which the processes connect.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES"),
}


def find_placement(environment: Mapping[str, str], num_gpus: int = 1, num_machines: int = 1) -> Placement | None:
    """Read the place that torchrun or srun gave this process; None if this process must start the others.

    Args:
        environment: environment variables.
        num_gpus, num_machines: --num-gpus and --num-machines. More than one machine under srun means that srun has
            started one process per machine, and each of them starts the other processes of its machine.

    Raises:
        ConfigError: the command line asks for more processes although torchrun or srun has started them, or the
            environment variables can't be used.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        starter = "torchrun"
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and num_machines == 1:
        starter = "srun"
    else:
        return None
    rank, world_size, local_rank, size = (_number(environment, name) for name in _VARIABLES[starter])
    if starter == "torchrun":
        place = Placement(rank, world_size, local_rank, size, "env://")
    else:
        place = Placement(rank, world_size, local_rank, max(world_size // max(size, 1), 1), _slurm_url(environment))
    if num_gpus > 1 or num_machines > 1:
        raise ConfigError(f"{starter} has started {world_size} processes: omit --num-gpus and --num-machines.")
    if rank % place.local_size != local_rank:
        raise ConfigError(
            f"{starter}: the process ranks must be consecutive on each machine, with the same number of processes on "
            f"each; this process has rank {rank} of {world_size}, and local rank {local_rank} of {place.local_size}. "
            "For srun use --ntasks-per-node and --distribution=block."
        )
    return place


def _slurm_url(environment: Mapping[str, str]) -> str:
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    # Steps of one job may run on the same machine, so each needs a different port.
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    port = environment.get("MASTER_PORT") or _PORTS[(job + 1009 * step) % len(_PORTS)]
    return f"tcp://{host}:{port}"


def first_host(hosts: str) -> str:
    """Return the first name of a list of hosts in SLURM's notation: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST = {hosts!r}: set MASTER_ADDR to the name of the first machine.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value!r}: set this environment variable to a number.")
    return int(value)


def _join(place: Placement, timeout: datetime.timedelta) -> None:
    """Connect this process with the other processes of its run."""
    if torch.cuda.is_available():
        # srun may make only one GPU visible to each process; its number is then 0 in every process.
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=place.url,
        world_size=place.world_size,
        rank=place.rank,
        timeout=timeout,
    )
    create_local_process_group(place.local_size)
    comm.synchronize()
