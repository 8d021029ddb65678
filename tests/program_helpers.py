"""Running the repository's programs with tiny models on a few generated images."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from knet_d2.data.shapes.writer import write_shapes

ROOT = Path(__file__).resolve().parent.parent
NUM_IMAGES = 4
SIZE = 64

TINY_MODEL = {
    "DEVICE": "cpu",
    "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4},
    "SEM_SEG_HEAD": {"CONVS_DIM": 32},
    "KNET": {"NUM_KERNELS": 8, "NUM_STAGES": 2, "UPDATE_HEAD": {"FEATURE_DIM": 32, "FFN_DIM": 32}},
}


def load_program(path):
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(str(folder), NUM_IMAGES, seed=5, size=SIZE)
    return folder


def write_config(folder, shapes, task, **solver):
    """A config file for ``task``; returns its path."""
    categories = json.loads((shapes / "panoptic.json").read_text())["categories"]
    entry = {
        "instance": {"type": "coco_instance", "json": str(shapes / "instances.json")},
        "panoptic": {
            "type": "coco_panoptic",
            "panoptic_json": str(shapes / "panoptic.json"),
            "panoptic_root": str(shapes / "panoptic"),
        },
        "semantic": {"type": "sem_seg", "labels": str(shapes / "semantic"), "classes": [c["name"] for c in categories]},
    }[task]
    name = f"programs_{task}_{shapes.name}"
    model = dict(TINY_MODEL)
    if task != "semantic":
        model["FPN"] = {"OUT_CHANNELS": 32}
    content = {
        "_BASE_": str(ROOT / "configs" / "shapes" / f"{task}.yaml"),
        "MODEL": model,
        "DATASETS": {
            "CUSTOM": [{"name": name, "images": str(shapes / "images"), **entry}],
            "TRAIN": [name],
            "TEST": [name],
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "INPUT": {"MIN_SIZE_TRAIN": [SIZE], "MIN_SIZE_TEST": SIZE},
        "SOLVER": {"IMS_PER_BATCH": 2, "STEPS": [], **solver},
        "TEST": {"EVAL_PERIOD": 0, "NUM_PICTURES": 0},
    }
    path = Path(folder) / f"{task}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


class Program:
    """A program of the repository in a process of its own, ended with the block."""

    def __init__(self, folder, program, *arguments, starter=(), environment=None):
        """
        Args:
            starter: arguments of Python that come before the program's path.
            environment: variables beside the present ones.
        """
        paths = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(environment or {})}
        self._log = tempfile.NamedTemporaryFile("w+", dir=folder)
        command = [sys.executable, *starter, str(ROOT / program), *map(str, arguments)]
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._log.close()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def wait_for(self, path):
        """Wait until a file exists."""
        while not path.exists():
            assert self.process.poll() is None, self.finish()
            time.sleep(0.002)

    def finish(self):
        """Returns exit code and output."""
        code = self.process.wait(timeout=300)
        self._log.seek(0)
        return code, self._log.read()


def errors_in(output):
    """What a program's output tells a person as the reason of its failure."""
    return [line for line in output.splitlines() if line.startswith("Error: ")]
