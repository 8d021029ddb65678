"""Code in files never runs, wherever one is read; damaged files end in the project's own errors."""

import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from program_helpers import ROOT
from toys import ToyNet

import knet_d2
from knet_d2.checkpoint import Checkpointer, load_file
from knet_d2.checkpoint.download import cache_folder, fetch_checkpoint
from knet_d2.checkpoint.zoo import zoo_entries
from knet_d2.engine import load_config
from knet_d2.engine.dump import load_batch
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.programs import convert_checkpoint

SHAPES_CONFIG = str(ROOT / "configs" / "shapes" / "instance.yaml")


class Exploit:
    """An object that creates a folder when an unsafe reader unpickles it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


FORMATS = {
    "zip": saved,
    "before 1.6": lambda content: saved(content, _use_new_zipfile_serialization=False),
    "pickle": lambda content: pickle.dumps(content, protocol=2),
    "text pickle": lambda content: pickle.dumps(content, protocol=0),
}


def resume(path):
    path.rename(path.parent / "model_0000001.pth")
    (path.parent / "last_checkpoint").write_text("model_0000001.pth")
    Checkpointer(ToyNet(None), str(path.parent)).resume_or_load("")


def read_from_cache(path):
    entry = next(entry for entry in zoo_entries().values() if entry.url)
    cached = os.path.join(cache_folder(), entry.checkpoint_file)
    os.makedirs(os.path.dirname(cached))
    path.rename(cached)
    fetch_checkpoint(entry)


READERS = {
    "load_file": lambda path: load_file(str(path)),
    "MODEL.WEIGHTS": lambda path: Checkpointer(ToyNet(None)).load(str(path)),
    "heuristics": lambda path: Checkpointer(ToyNet(None), partial=True).load(f"{path}?matching_heuristics=True"),
    "resume": resume,
    "knet_d2.load": knet_d2.load,
    "knet_d2.load with a config": lambda path: knet_d2.load(path, config_file=SHAPES_CONFIG),
    "replay": lambda path: load_batch(str(path)),
    "convert": lambda path: convert_checkpoint.convert(str(path), None, ()),
    "cache": read_from_cache,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", FORMATS)
def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, form, reader):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    marker, path = tmp_path / "made_by_exploit", tmp_path / "weights.pth"
    content = FORMATS[form]({"model": {"a": Exploit(marker)}})
    pickle.loads(pickle.dumps(Exploit(marker)))
    assert marker.exists()  # it would
    marker.rmdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        READERS[reader](path)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
@pytest.mark.parametrize("where", ["config", "base", "weights"])
def test_code_in_yaml_never_runs(tmp_path, tag, where):
    marker, path = tmp_path / "made_by_exploit", tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: {tag} [{marker}]\n")
    if where == "base":
        path = tmp_path / "derived.yaml"
        path.write_text('_BASE_: "config.yaml"\n')
    if where == "weights":
        metadata = {"config": (tmp_path / "config.yaml").read_text(), "classes": "[]"}
        torch.save({"model": {"a": torch.zeros(1)}, "metadata": metadata}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="config and classes"):
            knet_d2.load(tmp_path / "weights.pth")
    else:
        with pytest.raises(ConfigError, match="config.yaml|derived.yaml"):
            load_config(str(path))
    assert not marker.exists()


FUZZED = {"annotations": 40, "panoptic": 60, "images": 80, "weights": 40, "configs": 6}


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files(kind):
    """A small part of checks.fuzzing, as a program: its workers are forked, which must happen before any training."""
    command = [sys.executable, "-m", "checks.fuzzing", kind, "--count", str(FUZZED[kind]), "--seed", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert summary["inputs"] == summary["refused"] + summary.get("success", 0) == FUZZED[kind]
    assert summary["reached"] >= FUZZED[kind] // 5 and summary["refused"] > 0
