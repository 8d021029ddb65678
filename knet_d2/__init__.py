"""K-Net as a Detectron2 extension. Importing this package registers its parts and data sets with Detectron2.

Where Detectron2 is missing or broken, the package can still be imported; whatever needs Detectron2 then raises an
ImportError that names the command to mend it.
"""

from .setup.bootstrap import import_detectron2
from .setup.dependencies import VERSION as __version__

__all__ = ["KNet", "__version__", "add_knet_config", "load"]

if import_detectron2():
    from . import checkpoint, data  # noqa: F401  register knet:// paths and the generated data sets
    from .config import add_knet_config
    from .modeling import backbone, static_kernels  # noqa: F401  register their builders and heads
    from .modeling.meta_arch import KNet
    from .video import formats, moving_shapes  # noqa: F401  register types of data sets, and the generated videos


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # "load", which needs OpenCV; or any name where Detectron2 is missing, whose error the import raises
    try:
        from .inference import load
    except ModuleNotFoundError as error:
        message = f"knet_d2.load needs {error.name}, which is not installed: python -m knet_d2.doctor"
        raise ImportError(message, name=error.name) from error
    return load
