"""A bulk job on Ray Data: actors that hold the predictor complete its shards, on one machine or a cluster.

The shards are those of :class:`.bulk.BulkJob`, written by the same function: what a killed actor has written stays, and
Ray gives its block of shards to another one, which skips those that are complete.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import ConfigError
from .bulk import BulkJob, Progress

# Tries of a block of shards. The death of its actor, which an image may cause, uses up one or two of them
MOST_TRIES = 20
# Blocks of shards for each actor: more of them cost Ray time, fewer leave actors idle at the end
_BLOCKS_OF_ACTOR = 50


class _Shards:
    """The actor: it opens the job once, and completes the shards of a block."""

    def __init__(self, open_job: Callable[[], BulkJob]):
        self._job = open_job()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [self._job.run_shard(int(shard)) for shard in batch["item"]]
        return {name: np.array(numbers) for name, numbers in zip(Progress._fields, zip(*done))}


def run_on_ray(open_job: Callable[[], BulkJob], num_shards: int, actors: int) -> Iterator[Progress]:
    """Complete the shards of a job; yields the numbers so far after each shard that Ray reports.

    The cluster is that of RAY_ADDRESS, else this machine. Each actor takes one core, and a GPU where the cluster has
    some.

    Args:
        open_job: makes the job in each actor; it is pickled.
        num_shards: of the job.
        actors: number of processes that predict.

    Raises:
        ConfigError: Ray is missing or too small, or actors died at the same shards again and again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError(f"--ray {actors}: it is missing; pip install 'ray[data]'.") from None
    starts_ray = not ray.is_initialized()
    if starts_ray:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        yield from _completed(ray, open_job, num_shards, actors)
    except ray.exceptions.RayActorError as error:
        raise ConfigError(
            f"--ray {actors}: the processes that predict die again and again at the same shards "
            f"({' '.join(str(error).split())[:300]}). If there is too little memory, use fewer; else take out the "
            "image that ends them, which is in a shard that is missing. Complete shards stay."
        ) from error
    finally:
        if starts_ray:
            ray.shutdown()


def _completed(ray: Any, open_job: Callable[[], BulkJob], num_shards: int, actors: int) -> Iterator[Progress]:
    resources = ray.cluster_resources()
    gpus = 1 if resources.get("GPU") else 0
    fitting = int(resources["GPU"] if gpus else resources.get("CPU", 0))
    if not 1 <= actors <= fitting:
        raise ConfigError(f"--ray {actors}: this cluster has {fitting} {'GPUs' if gpus else 'cores'}; use 1 to that.")
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = min(num_shards, _BLOCKS_OF_ACTOR * actors)
    completed = ray.data.from_items(list(range(num_shards)), override_num_blocks=blocks).map_batches(
        _Shards,
        fn_constructor_args=[open_job],
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=MOST_TRIES,
    )
    total = Progress()
    for row in completed.iter_rows():
        total = Progress(*(a + int(row[name]) for name, a in zip(Progress._fields, total)))
        yield total
