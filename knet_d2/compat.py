"""All that differs between the versions of Detectron2, torch and numpy that are supported.

Each entry says why it is there and when it can go.
"""

# Reason: numpy 2 renamed its private package; the functions that pickled arrays name live there.
# Goes with: numpy 1.26.
try:
    from numpy._core import multiarray as numpy_multiarray
except ImportError:
    from numpy.core import multiarray as numpy_multiarray

__all__ = ["numpy_multiarray"]
