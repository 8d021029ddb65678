"""Starting the processes of a run, and ending all of them, with one message, when one fails.

Processes are started by Detectron2's ``launch``, by torchrun or by SLURM's srun; whose they are is told by the
environment.
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
from ..setup.compat import create_local_process_group
from .failures import EXIT_FAILED, explain, is_lost_connection

logger = logging.getLogger(__name__)

# Seconds in which who started the processes tells (and ends this one) when another one was killed
_PATIENCE = 3
_PORTS = range(12000, 32000)  # below those that systems give to outgoing connections


class Placement(NamedTuple):
    """The place of a process that something else has started.

    Attributes:
        rank, world_size: among all processes.
        local_rank, local_size: among those of its machine.
        url: where the processes meet, as torch.distributed's init_method.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what Detectron2's command line lacks."""
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        help="a process that waits longer than this for another one fails",
    )
    return parser


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Run ``main(args)`` in every process of a run.

    Args:
        main: a function of a module, or of the program itself.
        args: of Detectron2's command line, with :func:`add_launch_arguments`.

    Returns:
        The exit code: 0, or EXIT_FAILED after a failure, whose message was printed once, by the first process that
        failed. Where a signal stopped the training it is EXIT_PREEMPTED, or SystemExit with that code is raised.
    """
    timeout = datetime.timedelta(minutes=args.timeout_minutes)
    try:
        place = find_placement(os.environ, args.num_gpus, args.num_machines)
        if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
            raise ConfigError(f"--num-gpus is {args.num_gpus}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs.")
    except KNetError as error:
        return _fail(f"Error: {error}")
    if place is not None:
        return _guarded(_join_and_run, place, timeout, main, args)
    if args.num_gpus * args.num_machines == 1:
        return _guarded(main, args)
    return _launch(main, args, timeout)


def _launch(main: Callable, args: argparse.Namespace, timeout: datetime.timedelta) -> int:
    # It would report each process that it ends after a failure
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with _signals_passed_on():
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
            return error.exit_code  # it has printed what there is to say
        return _fail(
            f"Error: Process {error.error_index} was killed by {error.signal_name} (out of memory, perhaps). The last "
            "checkpoint is intact: continue with --resume."
        )
    except ProcessRaisedException as error:  # before _work
        return _fail(f"Error: The processes could not be connected. {str(error).strip().splitlines()[-1]}")
    return 0


def _work(main: Callable, args: argparse.Namespace) -> None:
    sys.exit(_guarded(main, args))


def _join_and_run(place: Placement, timeout: datetime.timedelta, main: Callable, args: argparse.Namespace) -> None:
    if torch.cuda.is_available():
        # srun may show each process its own GPU alone
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
    main(args)


@contextlib.contextmanager
def _without_repetitions() -> Iterator[None]:
    """Leave out tracebacks of what fails as well when the run fails for one reason, as a full disk.

    These are log files, and TensorBoard's thread, whose exceptions it raises again where it is used next.
    """
    previous = logging.raiseExceptions, threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or explain(args.exc_value) is None:
            previous[1](args)

    logging.raiseExceptions, threading.excepthook = False, report
    try:
        yield
    finally:
        logging.raiseExceptions, threading.excepthook = previous


@_without_repetitions()
def _guarded(work: Callable, *args: Any) -> int:
    """Do the work of this process; returns its exit code.

    Only the first process that fails prints why: what the others meet then (lost connections) is a consequence.
    """
    try:
        work(*args)
        return 0
    except Exception as error:
        with _undisturbed_by_loaders():
            return _report(error)


def _report(error: Exception) -> int:
    """Print why this process ends; returns its exit code."""
    if is_lost_connection(error):
        time.sleep(_PATIENCE)
    if not _is_first_failure():
        logger.info(f"Process {comm.get_rank()} ends, because another one failed.")
        return EXIT_FAILED
    message = explain(error)
    if message is not None:
        return _fail(f"Error: {message}")
    logger.error("Unexpected failure:", exc_info=error)
    if not comm.is_main_process():  # whose log is the only one that is shown
        traceback.print_exception(error)
    return EXIT_FAILED


@contextlib.contextmanager
def _undisturbed_by_loaders() -> Iterator[None]:
    """Without PyTorch's handler of SIGCHLD, which raises wherever the program is when a loading process has died."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def _is_first_failure() -> bool:
    """Whether no other process of the run has failed before."""
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    try:
        return distributed.distributed_c10d._get_default_store().add("knet_d2/failures", 1) == 1
    except RuntimeError:  # the store ends with the main process
        return comm.is_main_process()


def _fail(message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return EXIT_FAILED


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Pass the signals that stop a run on to the processes that this one has started."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# Where the environment places this process.


def find_placement(environment: Mapping[str, str], num_gpus: int = 1, num_machines: int = 1) -> Placement | None:
    """The place that torchrun or srun gave this process; None where it has to start the others by itself.

    Args:
        num_gpus, num_machines: of the command line. With srun, several machines mean that it started one process on
            each, which starts the others there.

    Raises:
        ConfigError: the processes are said to be started twice, or their environment can't be used.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        starter, place = "torchrun", _torchrun_placement(environment)
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and num_machines == 1:
        starter, place = "srun", _slurm_placement(environment)
    else:
        return None
    if num_gpus > 1 or num_machines > 1:
        raise ConfigError(
            f"{starter} has started {place.world_size} processes already: leave out --num-gpus and --num-machines."
        )
    if place.rank % place.local_size != place.local_rank:
        raise ConfigError(
            f"{starter} must number the processes machine by machine, with the same number on each; this one is "
            f"{place.rank} of {place.world_size}, and {place.local_rank} of {place.local_size} on its machine. "
            "For srun use --ntasks-per-node and --distribution=block."
        )
    return place


def _torchrun_placement(environment: Mapping[str, str]) -> Placement:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world_size, local_rank, local_size = (_number(environment, name) for name in names)
    return Placement(rank, world_size, local_rank, local_size, url="env://")


def _slurm_placement(environment: Mapping[str, str]) -> Placement:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
    rank, world_size, local_rank, num_nodes = (_number(environment, name) for name in names)
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    # Steps of one job may share machines
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    port = environment.get("MASTER_PORT") or _PORTS[(job + 1009 * step) % len(_PORTS)]
    return Placement(rank, world_size, local_rank, max(world_size // max(num_nodes, 1), 1), f"tcp://{host}:{port}")


def first_host(hosts: str) -> str:
    """The first name in a list of hosts as SLURM writes it: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {hosts!r}; name the first machine in MASTER_ADDR.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"The environment variable {name} is {value!r}, but must be a number.")
    return int(value)
