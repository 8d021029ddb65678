"""The place of a process in a run that torchrun or SLURM's srun has started, from their environment variables."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import ConfigError

_PORTS = range(12000, 32000)  # below the ports that operating systems use for outgoing connections


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
