"""K-Net as a Detectron2 extension. Detectron2 itself comes from ``python -m knet_d2.install_detectron2``."""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEPENDENCIES = runpy.run_path(str(ROOT / "knet_d2" / "setup" / "dependencies.py"))
PAGES_BESIDE = runpy.run_path(str(ROOT / "knet_command.py"))["PAGES_BESIDE"]
README = ROOT / "README.md"


class BuildWithPages(build_py):
    """Copies the pages that lie beside docs/ into the package's folder of documents."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in PAGES_BESIDE for path in ROOT.glob(pattern)):
            target = Path(self.build_lib, "knet_d2", "docs", path.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(
    name="knet_d2",
    version=DEPENDENCIES["VERSION"],
    description="K-Net (instance, panoptic and semantic segmentation) as a Detectron2 extension",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=" + DEPENDENCIES["PYTHON"],
    # The config files and the documentation lie beside the package in a checkout, inside it in a wheel;
    # knet_d2.config.files and knet_command find both.
    packages=[*find_packages(include=["knet_d2", "knet_d2.*"]), "knet_d2.configs", "knet_d2.docs"],
    package_dir={"knet_d2.configs": "configs", "knet_d2.docs": "docs"},
    package_data={
        "knet_d2": ["**/*.json", "weights/*.safetensors"],
        "knet_d2.configs": ["**/*.yaml"],
        "knet_d2.docs": ["**/*.md"],
    },
    install_requires=[dependency.requirement for dependency in DEPENDENCIES["DEPENDENCIES"] if dependency.declared],
    entry_points={"console_scripts": ["knet = knet_command:main"]},
    py_modules=["knet_command"],
    cmdclass={"build_py": BuildWithPages},
    extras_require={
        # What most users want: OpenCV, K-Net Lite's backbones, export, safetensors and TIFF files
        "standard": [
            *("opencv-python-headless>=4.5", "timm>=1.0.31", "onnx", "onnxscript", "onnxruntime"),
            *("safetensors", "tifffile"),
        ],
        # Those who have another build of OpenCV (opencv-python, a system package) don't want this one.
        "opencv": ["opencv-python-headless>=4.5"],
        # Weights files that are no pickles at all
        "safetensors": ["safetensors"],
        # TIFF files with many channels in one page, as most satellite images
        "tiff": ["tifffile"],
        # MODEL.BACKBONE.NAME "build_timm_backbone", the K-Net Lite configs
        "timm": ["timm>=1.0.31"],
        # demo/web.py
        "web": ["gradio>=6"],
        # tools/serve.py
        "serve": ["starlette", "uvicorn"],
        # tools/predict_bulk.py --ray, --format parquet
        "ray": ["ray[data]"],
        "parquet": ["pyarrow"],
        # tools/export_model.py
        "export": ["onnx", "onnxscript", "onnxruntime"],
        # knet_d2.load(path, engine="openvino")
        "openvino": ["openvino", "onnx", "onnxscript"],
        # Prediction.to_supervision
        "supervision": ["supervision"],
        # knet_d2.load("hf://user/name")
        "hub": ["huggingface_hub", "safetensors"],
        "test": ["pytest", "pytest-xdist"],
    },
)
