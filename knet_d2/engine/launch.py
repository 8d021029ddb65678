"""Starts the processes of a run.

torchrun or SLURM's srun has started them if their environment variables are set; else Detectron2's ``launch`` does.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import ConfigError, KNetError
from ..setup.compat import create_local_process_group, end_process
from .failures import EXIT_INTERRUPTED, RESUME, run_guarded
from .stop_signals import handlers, pass_on

_PORTS = range(12000, 32000)  # below the ports that operating systems use for outgoing connections


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the launch options that Detectron2's command line does not have, and change a default."""
    # Detectron2's default is one port for each user, so that a second run on the same machine could not start.
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        help="a process fails when it waits longer than this for another process",
    )
    return parser


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Run ``main(args)`` in every process of a run; a process that torchrun or srun has started ends here.

    Args:
        main: function of a module or of the main program.
        args: arguments of Detectron2's command line and of :func:`add_launch_arguments`.

    Returns:
        The exit code: 0, or EXIT_FAILED after a failure, which the first failed process has reported.

    Raises:
        SystemExit: the run ends with another exit code, such as EXIT_PREEMPTED after a signal.
    """
    return run_guarded(_start, main, args)


def _start(main: Callable, args: argparse.Namespace) -> None:
    timeout = datetime.timedelta(minutes=args.timeout_minutes)
    place = find_placement(os.environ, args.num_gpus, args.num_machines)
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use at most these."
        )
    if place is not None:
        _join(place, timeout)
        _work(main, args)
    if args.num_gpus * args.num_machines > 1:
        if args.num_machines > 1 and args.dist_url == "auto":
            raise ConfigError(
                f"--num-machines {args.num_machines}: name the first machine, as --dist-url tcp://first-machine:29500."
            )
        return _launch(main, args, timeout)
    main(args)


def _launch(main: Callable, args: argparse.Namespace, timeout: datetime.timedelta) -> None:
    # After a failure this logger would also report each of the other processes, which PyTorch then ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with handlers(pass_on):
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
            f"Process {error.error_index} was killed by {error.signal_name}, maybe because memory ran out. {RESUME}"
        ) from error
    except ProcessRaisedException as error:  # raised while the processes connect: _work reports its own errors
        raise KNetError(f"The processes can't connect. {str(error).strip().splitlines()[-1]}") from error


def _work(main: Callable, args: argparse.Namespace) -> NoReturn:
    try:
        code = run_guarded(main, args)
    except KeyboardInterrupt:  # multiprocessing would end with exit code 0
        code = EXIT_INTERRUPTED
    except SystemExit as ending:
        code = int(ending.code or 0)
    end_process(code)


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


# ---- the place of a process in a run that torchrun or srun has started -----------------------------------------


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
