"""Imports Detectron2 and panopticapi; if one is missing, importing a module that needs it raises one clear error."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

from .compat import quiet_torchscript
from .dependencies import DETECTRON2_COMMAND, DETECTRON2_PROBES, PANOPTICAPI_PROBES

# Modules that work without Detectron2, because they repair its installation
_STANDALONE = ("doctor", "errors", "install_detectron2", "setup")


def import_detectron2() -> bool:
    """Import Detectron2 and panopticapi; if this fails, every later import of a module that needs them raises why.

    Returns:
        Whether both can be imported.
    """
    try:
        with quiet_torchscript():
            for module in ("detectron2", *DETECTRON2_PROBES, *PANOPTICAPI_PROBES):
                importlib.import_module(module)
        return True
    except Exception as error:  # a broken or outdated installation can raise almost any exception
        if isinstance(error, ModuleNotFoundError) and error.name == "detectron2":
            message = f"knet_d2 needs Detectron2, which is not installed. Install it with: {DETECTRON2_COMMAND}"
        elif isinstance(error, ModuleNotFoundError) and error.name == "panopticapi":
            message = f"knet_d2 needs panopticapi, which is not installed. Install it with: {DETECTRON2_COMMAND}"
        else:
            reason = (str(error).splitlines() or [""])[0]
            message = (
                f"knet_d2 needs Detectron2, which can't be imported ({type(error).__name__}: {reason}). "
                f"To see what is missing: python -m knet_d2.doctor. Install Detectron2 with: {DETECTRON2_COMMAND}"
            )
        sys.meta_path.insert(0, _Refusal(message))
        return False


class _Refusal(MetaPathFinder):
    """An import hook that raises the error when a module that needs Detectron2 is imported."""

    def __init__(self, message: str):
        self._message = message

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        package, _, module = name.partition(".")
        if package == "knet_d2" and module and module.partition(".")[0] not in _STANDALONE:
            raise ImportError(self._message, name="detectron2")
