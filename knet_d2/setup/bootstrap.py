"""What has to happen before anything of knet_d2 is imported: is there a Detectron2 that works?"""

import importlib
import sys

from .dependencies import DETECTRON2_COMMAND, DETECTRON2_PROBES

# They mend a missing or broken Detectron2, so they must start without one.
_SETUP_COMMANDS = ("knet_d2.doctor", "knet_d2.install_detectron2")


def runs_setup_command() -> bool:
    """Whether this process is ``python -m knet_d2.doctor`` or ``python -m knet_d2.install_detectron2``."""
    # While Python looks for the module of -m, and imports its package, argv has "-m" as the program's name.
    return sys.argv[:1] == ["-m"] and any(arg.removeprefix("-m") in _SETUP_COMMANDS for arg in sys.orig_argv)


def require_detectron2() -> None:
    """Import Detectron2, or raise one ImportError that names the command to install it."""
    try:
        from .compat import quiet_torchscript

        with quiet_torchscript():
            for module in ("detectron2", *DETECTRON2_PROBES):
                importlib.import_module(module)
    except Exception as error:  # a broken or outdated installation raises nearly anything
        if isinstance(error, ModuleNotFoundError) and error.name == "detectron2":
            message = f"knet_d2 needs Detectron2, which is not installed. Install it with: {DETECTRON2_COMMAND}"
        else:
            reason = (str(error).splitlines() or [""])[0]
            message = (
                f"knet_d2 needs Detectron2, which can't be imported ({type(error).__name__}: {reason}). "
                f"See what is missing: python -m knet_d2.doctor. Install Detectron2 with: {DETECTRON2_COMMAND}"
            )
        raise ImportError(message, name="detectron2") from None
