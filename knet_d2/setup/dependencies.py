"""The packages that knet_d2 needs: the one list behind setup.py and ``python -m knet_d2.doctor``.

Standard library only; setup.py runs this file by itself.
"""

from typing import NamedTuple

VERSION = "0.1.0"  # of knet_d2
PYTHON = "3.11"
TORCH_COMMAND = "python -m pip install --upgrade torch torchvision"
DETECTRON2_COMMAND = "python -m knet_d2.install_detectron2"

# Imported to tell an installation that works from one that doesn't: what knet_d2 needs of these packages.
DETECTRON2_PROBES = ("detectron2.modeling", "detectron2.data", "detectron2.evaluation", "detectron2.engine")
PANOPTICAPI_PROBES = ("panopticapi.utils", "panopticapi.evaluation")


class Dependency(NamedTuple):
    """A package: the module to import, the distribution that pip installs, the oldest version that works."""

    module: str
    distribution: str
    minimum: str | None = None
    # What installs it; None = pip, by the distribution's name.
    command: str | None = None
    # False: pip can't install it as one of our dependencies (see the comments below).
    declared: bool = True
    # Modules to import as well, where the first alone would not show that it works.
    probes: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """As pip writes it."""
        return self.distribution + (f">={self.minimum}" if self.minimum else "")


# No registry has it by this name.
DETECTRON2 = Dependency("detectron2", "detectron2", "0.6", DETECTRON2_COMMAND, False, DETECTRON2_PROBES)
# Its metadata forbids numpy 2, with which its code runs.
PANOPTICAPI = Dependency("panopticapi", "panopticapi-lite", None, DETECTRON2_COMMAND, False, PANOPTICAPI_PROBES)

DEPENDENCIES = (
    # In older ones a file read with weights_only can corrupt memory.
    Dependency("torch", "torch", "2.10", TORCH_COMMAND),
    Dependency("torchvision", "torchvision", "0.25", TORCH_COMMAND),
    Dependency("numpy", "numpy", "1.26"),
    DETECTRON2,
    PANOPTICAPI,
    # opencv-python and opencv-python-headless exclude each other; either will do, and only the user can choose.
    Dependency("cv2", "opencv-python-headless", "4.5", declared=False),
    Dependency("pycocotools", "pycocotools", "2.0.2", probes=("pycocotools.mask",)),
    Dependency("scipy", "scipy", "1.9", probes=("scipy.optimize",)),
    Dependency("PIL", "Pillow", "9.1"),
    Dependency("fvcore", "fvcore", "0.1.5", probes=("fvcore.common.checkpoint",)),
    Dependency("iopath", "iopath", "0.1.9"),
    Dependency("yaml", "PyYAML", "5.1"),
    Dependency("tqdm", "tqdm", "4.29"),
    Dependency("tensorboard", "tensorboard", "2.5", probes=("torch.utils.tensorboard",)),
    Dependency("shapely", "shapely", "1.8"),
    # What Detectron2 needs besides; where it was installed without its dependencies they would be missing.
    Dependency("matplotlib", "matplotlib"),
    Dependency("yacs", "yacs", "0.1.8"),
    Dependency("omegaconf", "omegaconf", "2.1"),
    Dependency("hydra", "hydra-core", "1.1"),
    Dependency("termcolor", "termcolor", "1.1"),
    Dependency("tabulate", "tabulate"),
    Dependency("cloudpickle", "cloudpickle"),
)
