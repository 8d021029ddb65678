"""Folders for Hugging Face's hub, and loading from there, with a stand-in for its package."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import tiny_config, tiny_model

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.hub import fetch_from_hub, read_card_facts
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.data.classes import ClassTable
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.programs import convert_checkpoint

pytest.importorskip("safetensors")

FACTS = {
    "name": "Cups and tables",
    "license": "apache-2.0",
    "data": "120 photos of my kitchen, evaluated on 30 others.",
    "metrics": {"PQ": 41.25, "PQ of a|b": 3},
}


@pytest.fixture
def folder(tmp_path):
    """What convert_checkpoint writes for a tiny panoptic model."""
    options = {"MODEL.KNET.NUM_STAGES": 1, "INPUT.MIN_SIZE_TEST": 64}
    cfg = tiny_config("panoptic", options)
    resolve_classes(cfg)
    names = ["cup", "fork", "<b>*\n# x", "table", "wall"]
    classes = ClassTable(names, [0, 1, 2, 3, 4], [(9, 9, 9)] * 5, 3, [5, 6, 7, 8, 9])
    model = tiny_model("panoptic", options)
    save_weights(str(tmp_path / "m.pth"), model.state_dict(), describe_model(cfg, classes))
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(FACTS))
    arguments = [str(tmp_path / "m.pth"), str(tmp_path / "hub"), "--model-card", str(tmp_path / "facts.yaml")]
    convert_checkpoint.main(convert_checkpoint.get_parser().parse_args(arguments))
    return tmp_path / "hub"


def test_what_is_in_the_folder(folder):
    assert sorted(x.name for x in folder.iterdir()) == ["README.md", "classes.json", "config.yaml", "model.safetensors"]
    head, body = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert yaml.safe_load(head)["tags"] == ["k-net", "panoptic-segmentation", "detectron2"]
    for text in (
        "# Cups and tables",
        "| PQ | 41.25 |",
        r"| PQ of a\|b | 3 |",
        "my kitchen",
        "cup (thing)",
        "wall (stuff)",
        "&#60;b&#62;&#42;&#10;&#35; x (thing)",
    ):
        assert text in body
    assert yaml.safe_load((folder / "config.yaml").read_text())["MODEL"]["KNET"]["NUM_STAGES"] == 1
    assert [x["dataset_id"] for x in json.loads((folder / "classes.json").read_text())] == [5, 6, 7, 8, 9]


def test_a_model_from_the_hub(folder, monkeypatch):
    asked = []

    def hf_hub_download(name, file, revision):
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    predictor = knet_d2.load("hf://me/cups@v2", device="cpu", confidence_threshold=0.0)
    assert asked == [("me/cups", "model.safetensors", "v2")] and predictor.classes.names[0] == "cup"
    image = np.random.RandomState(0).randint(0, 256, (64, 80, 3), np.uint8)
    expected = knet_d2.load(folder / "model.safetensors", device="cpu", confidence_threshold=0.0)(image, order="RGB")
    assert (predictor(image, order="RGB").segment_map() == expected.segment_map()).all()


def test_what_can_not_be_fetched(monkeypatch):
    def hf_hub_download(*_, **__):
        raise OSError("no network")

    for address in ("hf://me", "hf:///cups", "hf://a/b/c"):
        with pytest.raises(CheckpointError, match=f"{address}: write it as hf://user/name"):
            fetch_from_hub(address)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    with pytest.raises(CheckpointError, match="hf://me/cups: model.safetensors can't be downloaded .no network"):
        knet_d2.load("hf://me/cups")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub"):
        fetch_from_hub("hf://me/cups")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"license": None}, "license = None"),
        ({"metrics": {}}, "name at least one"),
        ({"metrics": {"PQ": "good"}}, r"metrics = \('PQ', 'good'\)"),
        ({"author": "me"}, "author = .* use the keys name, license"),
    ],
)
def test_facts_that_are_not_given(changes, message, tmp_path):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({**FACTS, **changes}))
    with pytest.raises(ConfigError, match=message):
        read_card_facts(str(tmp_path / "facts.yaml"))
    with pytest.raises(ConfigError, match="no such file"):
        read_card_facts(str(tmp_path / "absent.yaml"))
