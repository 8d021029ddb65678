"""Runs the programs of the repository with tiny models on a few generated images, in separate processes."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from knet_d2.programs import train

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64

TINY_MODEL = {
    "DEVICE": "cpu",
    "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4},
    "SEM_SEG_HEAD": {"CONVS_DIM": 32},
    "KNET": {"NUM_KERNELS": 8, "NUM_STAGES": 2, "UPDATE_HEAD": {"FEATURE_DIM": 32, "FFN_DIM": 32}},
}


def write_config(folder, shapes, task, **solver):
    """Write a config file for training a tiny model on a data set of write_shapes; returns its path."""
    shapes = Path(shapes)
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
    """A program of the repository in a separate process, which ends with the ``with`` block."""

    def __init__(self, folder, program, *arguments, starter=(), environment=None):
        """
        Args:
            folder: folder for a file with the program's output.
            program: path of the program in the repository.
            arguments: command line arguments.
            starter: arguments of Python before the program's path.
            environment: additional environment variables.
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
        """Wait for the end of the program; returns its exit code and output."""
        return self.process.wait(timeout=300), self.output()

    def output(self):
        """Return what the program has printed so far."""
        with open(self._log.name) as f:  # the process shares the position of _log
            return f.read()


class Training:
    """Runs ``train_net.py --resume`` in a process that is forked from this one, to save the time of the imports."""

    def __init__(self, config, opts, folder, log):
        """
        Args:
            config: path of the config file.
            opts: KEY VALUE pairs that change the config.
            folder: OUTPUT_DIR.
            log: file to which the output is appended.
        """
        self._log = Path(log)
        self._log.touch()
        args = train.get_parser().parse_args(["--resume", "--config-file", config, *opts, "OUTPUT_DIR", str(folder)])
        self.process = multiprocessing.get_context("fork").Process(target=self._work, args=(args,))
        self.process.start()

    def _work(self, args):
        log = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.exit(train.main(args))

    def output(self):
        """Return the output of this run and of earlier runs with the same log."""
        return self._log.read_text()

    def wait_until(self, is_reached):
        """Wait until a function returns True."""
        while not is_reached():
            assert self.process.is_alive(), self.output()
            time.sleep(0.0005)

    def finish(self):
        """Wait for the end of the run, which must succeed; returns its output."""
        self.process.join()
        assert self.process.exitcode == 0, self.output()
        return self.output()


def errors_in(output):
    """Return the error messages in the output of a program."""
    return [line for line in output.splitlines() if line.startswith("Error: ")]


def first_difference(a, b, where="content"):
    """Return the first difference of two nested values in a type, the order of keys or a value; None if equal."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where}: keys {list(a)} and {list(b)}"
        pairs = [(f"{where}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} items"
        pairs = [(f"{where}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        return None if same else f"{where}: {a} and {b}"
    return next(filter(None, (first_difference(x, y, place) for place, x, y in pairs)), None)


def compare_runs(folder, other):
    """Return the first difference of two runs in model_final.pth or metrics.json; None if they are identical."""
    states = [torch.load(Path(run) / "model_final.pth", weights_only=True) for run in (folder, other)]
    metrics = [(Path(run) / "metrics.json").read_bytes() for run in (folder, other)]
    return first_difference(*states, "model_final.pth") or first_difference(*metrics, "metrics.json")
