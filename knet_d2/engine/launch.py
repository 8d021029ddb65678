"""Starts the processes of a run.

torchrun or SLURM's srun has started them if their environment variables are set; else Detectron2's ``launch`` does.
"""

import argparse
import datetime
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import ConfigError, KNetError
from ..setup.compat import create_local_process_group, end_process
from .failures import EXIT_INTERRUPTED, RESUME, run_guarded
from .placement import Placement, find_placement
from .stop_signals import handlers, pass_on


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
