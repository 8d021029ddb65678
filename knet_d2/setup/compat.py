"""Functions for what differs between the supported versions of other packages, and for their private names.

Each function states why it is needed and when it can be removed.
"""

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = [
    "create_local_process_group",
    "default_store",
    "end_process",
    "quiet_torchscript",
    "replaced",
    "stored_images",
    "tensor_version",
]


def create_local_process_group(size: int) -> None:
    """Create Detectron2's process group of each machine, with ``size`` processes per machine.

    Reason: Detectron2 0.6 creates these groups only inside its launch().
    Remove with: Detectron2 0.6.
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
    """Return the key-value store through which the processes of a run have connected.

    Reason: torch has no public function for it when Detectron2's launch() has connected the processes.
    """
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()


def end_process(code: int) -> NoReturn:
    """End a process of several with this exit code, after its exit functions, but without the interpreter's own end.

    Reason: threads of PyTorch's process groups outlive destroy_process_group. With gloo, one of some twenty processes
    that had done their work was aborted by them (SIGABRT) at the interpreter's end.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tensor_version(tensor: Any) -> int:
    """Return a number that grows with each change of a tensor in place; tensors made in inference mode have none.

    Reason: torch has no public function for it.
    """
    return tensor._version


def stored_images(storage: Any) -> list[tuple[str, Any, int]]:
    """Return (name, image, iteration) of each image in Detectron2's EventStorage.

    Reason: EventStorage has no public function to read its images; Detectron2's own writer reads the same attribute.
    """
    return storage._vis_data


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Suppress the warning of newer torch versions that torch.jit.script is deprecated.

    Reason: Detectron2 and fvcore call torch.jit.script while they are imported, so it would appear at every start.
    Remove with: these calls.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        yield


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Give names of a module other values; afterwards they are as before, and those that it lacked are gone.

    Reason: lvis 0.5 and cityscapesscripts 2 use names that NumPy has removed, and write a file in a way that fails.
    Remove with: these versions.
    """
    earlier = {name: getattr(module, name) for name in values if hasattr(module, name)}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in earlier:
                setattr(module, name, earlier[name])
            else:
                delattr(module, name)
