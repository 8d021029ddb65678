"""All that differs between the versions of Detectron2, torch and numpy that are supported.

Each entry says why it is there and when it can go.
"""

import contextlib
import warnings
from typing import Iterator

__all__ = ["numpy_multiarray", "quiet_torchscript"]

# Reason: numpy 2 renamed its private package; the functions that pickled arrays name live there.
# Goes with: numpy 1.26.
try:
    from numpy._core import multiarray as numpy_multiarray
except ImportError:
    from numpy.core import multiarray as numpy_multiarray


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Keep newer torch from warning, on every start, of torch.jit.script.

    Reason: Detectron2 and fvcore call it while they are imported.
    Goes with: these calls.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        yield
