"""Reading and writing of weights files."""

import os
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toys import Parts, ToyNet, ToyTrainer, assert_identical, run, toy_cfg

from knet_d2.checkpoint import Checkpointer, as_checkpoint, load_file, write_atomically
from knet_d2.errors import CheckpointError


class Exploit:
    def __reduce__(self):
        return os.mkdir, (Exploit.path,)


def test_a_line_tells_that_all_parameters_are_loaded(tmp_path, caplog):
    model, path = ToyNet(None), str(tmp_path / "a.pth")
    torch.save({"model": model.state_dict()}, path)
    with caplog.at_level("INFO", "fvcore.common.checkpoint"):
        Checkpointer(ToyNet(None)).load(path)
    number = len(list(model.parameters()))
    assert f"{path}: all {number} parameters are loaded" in caplog.text and "re-initialised" not in caplog.text
    caplog.clear()
    torch.save({"model": {**model.state_dict(), "other.weight": torch.zeros(1)}}, path)
    with caplog.at_level("INFO", "fvcore.common.checkpoint"):
        Checkpointer(ToyNet(None)).load(path)
    assert "parameters are loaded" not in caplog.text and "not used: not in the model" in caplog.text


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl"])
def test_code_in_a_weights_file_never_runs(tmp_path, name):
    Exploit.path = str(tmp_path / "made_by_exploit")
    path = tmp_path / name
    content = {"model": {"a": Exploit()}}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"{name}.*mkdir.*could run code"):
        load_file(str(path))
    assert not os.path.exists(Exploit.path)


def test_files_that_are_no_checkpoints(tmp_path):
    checkpointer = Checkpointer(ToyNet(None))

    def message(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError) as error:
            checkpointer.load(str(path))
        assert name in str(error.value) or "none of the" in str(error.value)
        return str(error.value)

    assert "not a weights file" in message("notes.pth", b"SOLVER:\n  BASE_LR: 1\n")
    assert "not a weights file" in message("empty.pth", b"")
    assert "not a weights file" in message("notes.pkl", b"hello")
    # a dict that says it is entry 2^31 of the file's objects; a string that says it is of 2^40 bytes
    assert "not a weights file" in message("entry.pkl", b"\x80\x02}r\xff\xff\xff\x7f")
    assert "not a weights file" in message("long.pkl", b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"))
    torch.save({"model": ToyNet(None).state_dict()}, tmp_path / "good.pth")
    assert "not a weights file" in message("cut.pth", (tmp_path / "good.pth").read_bytes()[:-500])
    assert "list" in message("list.pth", [1, 2])
    assert "'epoch' is a int" in message("odd.pth", {"epoch": 3})
    assert "no parameters" in message("bare.pth", {"model": {}})
    assert "none of the 1 parameters" in message("other.pth", {"model": {"encoder.weight": torch.zeros(2)}})
    reasons = {
        str(tmp_path / "absent.pth"): "there is no such",
        str(tmp_path): r"this folder has no model_best\.pth",
        "nowhere://absent.pth": "(there is no such|can't be downloaded)",
        "https://[/absent.pth": "(there is no such|can't be downloaded)",
    }
    for absent, reason in reasons.items():
        with pytest.raises(CheckpointError, match=f"^{re.escape(absent)}: {reason}"):
            checkpointer.load(absent)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"model": s, "iteration": 7}])
def test_layouts_of_state_dicts(tmp_path, wrap):
    source, target = ToyNet(None), ToyNet(None)
    torch.save(wrap(source.state_dict()), tmp_path / "a.pth")
    Checkpointer(target).load(str(tmp_path / "a.pth"))
    assert_identical(dict(source.state_dict()), dict(target.state_dict()))


def test_numpy_arrays_in_files(tmp_path):
    """As in Detectron2's model zoo (.pkl) and in some converted weights (.pth)."""
    source, target = ToyNet(None), ToyNet(None)
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}, protocol=2))
    torch.save({"model": arrays, "mean": np.float64(3)}, tmp_path / "arrays.pth")
    for name in ("zoo.pkl", "arrays.pth"):
        nn.init.zeros_(target.head.weight)
        Checkpointer(target).load(str(tmp_path / name))
        assert_identical(dict(source.state_dict()), dict(target.state_dict()))


def test_caffe2_pickle_is_matched_by_heuristics(tmp_path):
    content = {"blobs": {"conv1_w": torch.zeros(1), "conv1_w_momentum": torch.zeros(1)}}
    checkpoint = as_checkpoint(content, "r50.pkl")
    assert list(checkpoint["model"]) == ["conv1_w"] and checkpoint["matching_heuristics"]


def test_matching_heuristics_on_request(tmp_path):
    source, target = Parts(), Parts()
    nn.init.normal_(source.backbone.bottom_up[0].weight)
    path = str(tmp_path / "backbone.pth")
    torch.save({f"bottom_up.{name}": p for name, p in source.backbone.bottom_up.state_dict().items()}, path)
    with pytest.raises(CheckpointError, match=r"none of the.*\?matching_heuristics=True"):
        Checkpointer(target).load(path)
    Checkpointer(target, partial=True).load(path + "?matching_heuristics=True")
    assert_identical(dict(source.backbone.bottom_up.state_dict()), dict(target.backbone.bottom_up.state_dict()))


def test_damaged_state_of_an_optimizer_is_refused(tmp_path):
    run(tmp_path, SOLVER__MAX_ITER=1)
    path = tmp_path / "model_final.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["_trainer"]["optimizer"]["param_groups"][0]["params"]
    torch.save(content, path)
    trainer = ToyTrainer(toy_cfg(tmp_path))
    with pytest.raises(CheckpointError, match="model_final.pth.*optimiser"):
        trainer.resume_or_load(resume=True)


def test_an_error_of_writing_names_the_file_itself(tmp_path):
    """Not the temporary one that it is until it is complete."""
    (tmp_path / "file").write_text("")
    for folder, error in (("file", NotADirectoryError), ("absent", FileNotFoundError)):
        path = str(tmp_path / folder / "model.onnx")
        with pytest.raises(error) as raised:
            write_atomically(path, lambda f: f.write(b"x"))
        assert raised.value.filename == path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, error):
    """Writing fails by Python's error for a full disk, and by the error that PyTorch's writer raises for it."""
    checkpointer = Checkpointer(ToyNet(None), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def fill_disk(data, f):
        f.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fill_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(CheckpointError, match="model.pth.*No space left"):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
