"""The packages that knet_d2 needs; setup.py and ``python -m knet_d2.doctor`` read this list.

This file imports only the standard library, because setup.py runs it without the package.
"""

from typing import NamedTuple

VERSION = "0.1.0"  # of knet_d2
PYTHON = "3.11"
TORCH_COMMAND = "python -m pip install --upgrade torch torchvision"
DETECTRON2_COMMAND = "python -m knet_d2.install_detectron2"

# Modules that knet_d2 uses; importing them shows whether an installation of these packages works.
DETECTRON2_PROBES = ("detectron2.modeling", "detectron2.data", "detectron2.evaluation", "detectron2.engine")
PANOPTICAPI_PROBES = ("panopticapi.utils", "panopticapi.evaluation")


class Dependency(NamedTuple):
    """A required package: module to import, distribution that pip installs, oldest version that works."""

    module: str
    distribution: str
    minimum: str | None = None
    # Command that installs it; None = pip install with the distribution's name.
    command: str | None = None
    # Whether setup.py declares it; False if pip can't install it as a dependency (see the comments below).
    declared: bool = True
    # Further modules to import, if importing ``module`` does not show that the package works.
    probes: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """Requirement in pip's notation."""
        return self.distribution + (f">={self.minimum}" if self.minimum else "")


# Package registries do not have it under this name.
DETECTRON2 = Dependency("detectron2", "detectron2", "0.6", DETECTRON2_COMMAND, False, DETECTRON2_PROBES)
# Its metadata excludes numpy 2, although its code works with it.
PANOPTICAPI = Dependency("panopticapi", "panopticapi-lite", None, DETECTRON2_COMMAND, False, PANOPTICAPI_PROBES)

DEPENDENCIES = (
    # In older versions, a file that is read with weights_only can corrupt memory.
    Dependency("torch", "torch", "2.10", TORCH_COMMAND),
    Dependency("torchvision", "torchvision", "0.25", TORCH_COMMAND),
    Dependency("numpy", "numpy", "1.26"),
    DETECTRON2,
    PANOPTICAPI,
    # opencv-python and opencv-python-headless exclude each other. Both work, so the user chooses one.
    Dependency("cv2", "opencv-python-headless", "4.5", declared=False),
    Dependency("pycocotools", "pycocotools", "2.0.2", probes=("pycocotools.mask",)),
    Dependency("scipy", "scipy", "1.9", probes=("scipy.optimize",)),
    Dependency("PIL", "Pillow", "9.1"),
    Dependency("fvcore", "fvcore", "0.1.5", probes=("fvcore.common.checkpoint",)),
    Dependency("iopath", "iopath", "0.1.9"),
    Dependency("yaml", "PyYAML", "5.1"),
    Dependency("tqdm", "tqdm", "4.57", probes=("tqdm.contrib.logging",)),
    Dependency("tensorboard", "tensorboard", "2.5", probes=("torch.utils.tensorboard",)),
    Dependency("shapely", "shapely", "1.8"),
    # Further dependencies of Detectron2; they are missing if it was installed without its dependencies.
    Dependency("matplotlib", "matplotlib"),
    Dependency("yacs", "yacs", "0.1.8"),
    Dependency("omegaconf", "omegaconf", "2.1"),
    Dependency("hydra", "hydra-core", "1.1"),
    Dependency("termcolor", "termcolor", "1.1"),
    Dependency("tabulate", "tabulate"),
    Dependency("cloudpickle", "cloudpickle"),
)

# Packages that only some uses need, and what for.
OPTIONAL = {
    Dependency("timm", "timm", "1.0.31"): "K-Net Lite (also training without a GPU), and other backbones",
    Dependency("onnx", "onnx"): "writing ONNX files",
    Dependency("onnxruntime", "onnxruntime"): "prediction with ONNX files",
}
