"""What may stand in the place of a weights file, the model that comes with the package, and weights in float16."""

import json
import socket
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from helpers import tiny_config, tiny_model

import knet_d2
from knet_d2.checkpoint import Checkpointer, describe_model, load_file
from knet_d2.checkpoint.address import FOLDER, packaged_names, weights_file
from knet_d2.checkpoint.saving import save_weights
from knet_d2.errors import CheckpointError
from knet_d2.programs import convert_checkpoint

FRUITS = Path(__file__).resolve().parent.parent / "demo" / "fruits_nuts"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def found_in(predictor, image, annotations, names):
    """Of the objects of a photo, those for which a segment of their class has an IoU above 0.7; and all segments."""
    segments = predictor(FRUITS / "images" / image["file_name"]).segments
    found = 0
    for x in annotations:
        rles = mask_util.frPyObjects(x["segmentation"], image["height"], image["width"])
        mask = mask_util.decode(mask_util.merge(rles)).astype(bool)
        ious = [(s.mask & mask).sum() / (s.mask | mask).sum() for s in segments if s.name == names[x["category_id"]]]
        found += max(ious, default=0) > 0.7
    return found, len(segments)


def test_the_model_that_comes_with_the_package_finds_fruits_that_it_has_not_seen(no_network):
    predictor = knet_d2.load("lite0_fruits", device="cpu")
    assert predictor.classes.names == ["date", "fig", "hazelnut"]
    truth = json.loads((FRUITS / "fold0.json").read_text())
    names = {x["id"]: x["name"] for x in truth["categories"]}
    counts = np.zeros(3, int)
    for image in truth["images"]:
        annotations = [x for x in truth["annotations"] if x["image_id"] == image["id"]]
        counts += (len(annotations), *found_in(predictor, image, annotations, names))
    objects, found, segments = counts
    assert objects == 61 and found >= 42 and segments <= 75


def test_packaged_files_are_small_and_safe():
    assert packaged_names() == ["lite0_fruits"]
    assert weights_file("lite0_fruit") == "lite0_fruit"
    path = FOLDER / "lite0_fruits.safetensors"
    assert path.stat().st_size < 8_000_000
    assert {x.dtype for x in load_file(str(path))["model"].values() if x.is_floating_point()} == {torch.float16}


def test_training_and_conversion_start_from_a_folder_too(tmp_path):
    cfg, model = tiny_config("instance"), tiny_model("instance")
    save_weights(str(tmp_path / "model_final.pth"), tiny_model("instance", seed=1).state_dict(), describe_model(cfg))
    save_weights(str(tmp_path / "model_best.pth"), model.state_dict(), describe_model(cfg))
    started = tiny_model("instance", seed=2)
    Checkpointer(started, partial=True).load(str(tmp_path))
    target = tmp_path / "converted.safetensors"
    convert_checkpoint.main(convert_checkpoint.get_parser().parse_args([str(tmp_path), str(target)]))
    converted = load_file(str(target))
    assert converted["metadata"]["source"] == "model_best.pth"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(converted["model"][name], value, rtol=0, atol=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model_best\.pth or model_final\.pth"):
        Checkpointer(started).load(str(tmp_path / "empty"))


def test_half_the_size_gives_nearly_the_same_model(tmp_path, capsys):
    cfg, model = tiny_config("instance"), tiny_model("instance")
    source, target = str(tmp_path / "model.pth"), str(tmp_path / "half.safetensors")
    save_weights(source, model.state_dict(), describe_model(cfg))

    def convert():
        convert_checkpoint.main(convert_checkpoint.get_parser().parse_args([source, target, "--half"]))

    convert()
    assert "Wrote" in capsys.readouterr().out
    loaded = knet_d2.load(target, device="cpu").model.state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        model.sem_seg_head.classifier.bias[0] = 1e5
    save_weights(source, model.state_dict(), describe_model(cfg))
    with pytest.raises(CheckpointError, match=r"--half: sem_seg_head\.classifier\.bias.*65,504"):
        convert()
