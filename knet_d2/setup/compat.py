"""All that differs between the versions of Detectron2 and torch that are supported.

Each entry says why it is there and when it can go.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["create_local_process_group", "default_store", "quiet_torchscript", "stored_images"]


def create_local_process_group(size: int) -> None:
    """Detectron2's, for ``size`` processes on every machine.

    Reason: Detectron2 0.6 has it inside its launch() only.
    Goes with: Detectron2 0.6.
    """
    from detectron2.utils import comm
    from torch import distributed

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, comm.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = distributed.new_group(ranks)
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def default_store() -> Any:
    """The key-value store in which the processes of a run have met.

    Reason: torch has no public name for it where Detectron2's launch() has connected the processes.
    """
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()


def stored_images(storage: Any) -> list[tuple[str, Any, int]]:
    """(name, image, iteration) of each image in Detectron2's EventStorage.

    Reason: it can put and clear images, but has no public way to read them; its own writer reads the same field.
    """
    return storage._vis_data


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Keep newer torch from warning, on every start, of torch.jit.script.

    Reason: Detectron2 and fvcore call it while they are imported.
    Goes with: these calls.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        yield
