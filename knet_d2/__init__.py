"""K-Net as a Detectron2 extension. Importing this package registers its parts and data sets with Detectron2."""

from .setup.bootstrap import require_detectron2, runs_setup_command

__version__ = "0.1.0"

if not runs_setup_command():
    require_detectron2()

    from . import checkpoint, data  # noqa: F401  register knet:// paths and the generated data sets
    from .config import add_knet_config
    from .modeling import backbone, static_kernels  # noqa: F401  register their builders and heads
    from .modeling.meta_arch import KNet

    __all__ = ["KNet", "add_knet_config", "load"]

    def __getattr__(name: str) -> object:
        if name == "load":
            try:
                from .inference import load  # brings matplotlib and OpenCV, which training does without
            except ModuleNotFoundError as error:
                message = f"knet_d2.load needs {error.name}, which is not installed: python -m knet_d2.doctor"
                raise ImportError(message, name=error.name) from error
            return load
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
