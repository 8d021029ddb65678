"""The table of published models, knet:// paths and their downloads, and the tool that verifies checkpoints."""

import hashlib
import math
import os
import re
import shutil
import urllib.error
from pathlib import Path
from urllib import request

import pytest
import torch
from checkpoint_helpers import ROOT, Exploit, assert_same_state, randomised, save
from data_helpers import custom_entry
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from helpers import tiny_config, tiny_model
from official_layout import official_checkpoint

from knet_d2 import model_zoo
from knet_d2.checkpoint import Checkpointer, download, zoo
from knet_d2.data import resolve_classes
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES, write_shapes
from knet_d2.engine import Trainer
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.programs import verify_zoo

# ---------------------------------------------------------------- table


def test_every_model_has_a_config_and_metrics():
    names = model_zoo.names()
    assert len(names) == len(set(names)) == 18
    tasks = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}
    for name in names:
        entry, cfg = zoo.zoo_entry(name), model_zoo.get_config(name)
        assert cfg.MODEL.KNET.TASK == name.split("/")[1]
        assert set(entry.metrics) <= {tasks[cfg.MODEL.KNET.TASK], "mIoU_ms"} and (entry.metrics or entry.note)
        assert entry.parameters == zoo.fingerprint(zoo.build_on_meta(cfg).state_dict())
        assert model_zoo.get_config_file(name + ".yaml") == str(ROOT / "configs" / f"{name}.yaml")
        assert cfg.MODEL.WEIGHTS.startswith(("detectron2://ImageNetPretrained/torchvision/", "https://"))
        if entry.url is None:
            continue
        assert f"/{entry.official_name}/{entry.official_name}_20" in model_zoo.get_checkpoint_url(name)
        assert re.search(r"-[0-9a-f]{8}\.pth$", entry.url)
        assert model_zoo.get_config(name, trained=True).MODEL.WEIGHTS == f"knet://{name}"
    assert sum(model_zoo.get_checkpoint_url(name) is not None for name in names) == 14


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'coco/panoptic/knet_r50_fpn_1x'"):
        model_zoo.get_config_file("coco/panoptic/knet_r50_1x")
    with pytest.raises(ConfigError, match="Did you mean"):
        PathManager.get_local_path("knet://coco/panoptic/knet_r50_1x")


def test_documented_table():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    for name in model_zoo.names():
        entry = zoo.zoo_entry(name)
        row = next(line for line in text.splitlines() if f"(configs/{name}.yaml)" in line)
        for metric in entry.metrics.values():
            assert f" {metric:g} " in row or f" {metric:.1f} " in row or f" {metric:.2f} " in row, row
        assert (entry.url or "none published") in row
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


# ---------------------------------------------------------------- downloads


def publish(tmp_path, monkeypatch, cfg, metric):
    """A zoo of one tiny model, whose checkpoint is "published" in a folder; returns its entry and its model."""
    torch.manual_seed(0)
    model = randomised(build_model(cfg))
    source = Path(save(tmp_path, official_checkpoint(model.state_dict()), "model.pth"))
    digits = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    source = source.rename(tmp_path / f"tiny_2026-{digits}.pth")
    config = tmp_path / "tiny.yaml"
    config.write_text(cfg.dump())
    entry = zoo.ZooEntry(str(config)[: -len(".yaml")], "tiny", {metric: 50.0}, "", source.as_uri())
    monkeypatch.setattr(zoo, "zoo_entries", lambda: {entry.name: entry})
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return entry, model


@pytest.fixture
def published(tmp_path, monkeypatch):
    return publish(tmp_path, monkeypatch, tiny_config("panoptic"), "PQ")


def cached_files():
    folder = Path(download.cache_folder())
    return [p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".sha256")]


def source_of(entry):
    return Path(request.url2pathname(entry.url.removeprefix("file://")))


def test_weights_by_name_are_downloaded_once(published):
    entry, model = published
    target = tiny_model("panoptic", seed=1)
    Checkpointer(target).load(f"knet://{entry.name}")
    assert_same_state(model.state_dict(), target.state_dict())
    assert cached_files() == [entry.checkpoint_file]
    source_of(entry).unlink()
    other = tiny_model("panoptic", seed=2)
    Checkpointer(other).load(f"knet://{entry.name}")
    assert_same_state(model.state_dict(), other.state_dict())


def test_get_builds_a_model(published):
    entry, model = published
    loaded = model_zoo.get(entry.name, device="cpu")
    assert not loaded.training
    assert_same_state(model.state_dict(), loaded.state_dict())
    fresh = model_zoo.get(entry.name, trained=False, device="cpu")
    name = "cascade.stages.0.mask_branch.0.weight"
    assert not torch.equal(fresh.state_dict()[name], model.state_dict()[name])


def test_half_a_download_is_never_used(published, monkeypatch):
    entry, _ = published

    def interrupted(url, filename, reporthook=None):
        Path(filename).write_bytes(source_of(entry).read_bytes()[:1000])
        raise urllib.error.ContentTooShortError("retrieval incomplete", None)

    def silently_short(url, filename, reporthook=None):
        Path(filename).write_bytes(source_of(entry).read_bytes()[:1000])
        return filename, None

    for broken, text in ((interrupted, "can't be downloaded"), (silently_short, "not the published file.*1000 bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(request, "urlretrieve", broken)
            with pytest.raises(CheckpointError, match=text):
                PathManager.get_local_path(f"knet://{entry.name}")
        assert cached_files() == []
    path = PathManager.get_local_path(f"knet://{entry.name}")
    assert Path(path).read_bytes() == source_of(entry).read_bytes()


def test_without_network(published):
    entry, model = published
    source_of(entry).rename(source_of(entry).with_suffix(".away"))
    target = tiny_model("panoptic", seed=1)
    with pytest.raises(CheckpointError) as error:
        Checkpointer(target).load(f"knet://{entry.name}")
    place = os.path.join(download.cache_folder(), entry.checkpoint_file)
    assert entry.url in str(error.value) and f"from another machine to {place}" in str(error.value)
    shutil.copy(source_of(entry).with_suffix(".away"), place)
    Checkpointer(target).load(f"knet://{entry.name}")
    assert_same_state(model.state_dict(), target.state_dict())
    with pytest.raises(CheckpointError, match="^https://127.0.0.1:9/R-50.pkl: can't be downloaded.*MODEL.WEIGHTS"):
        Checkpointer(target).load("https://127.0.0.1:9/R-50.pkl")


def test_wrong_file_in_the_cache(published, tmp_path):
    entry, _ = published
    place = Path(download.cache_folder()) / entry.checkpoint_file
    place.parent.mkdir(parents=True)
    Exploit.target = str(tmp_path / "made_by_exploit")
    torch.save({"state_dict": Exploit()}, place)
    with pytest.raises(CheckpointError, match="not the published file.*Delete it"):
        Checkpointer(tiny_model("panoptic")).load(f"knet://{entry.name}")
    assert not os.path.exists(Exploit.target)


def test_model_without_a_checkpoint(published, monkeypatch):
    entry, _ = published
    monkeypatch.setattr(zoo, "zoo_entries", lambda: {entry.name: entry._replace(url=None)})
    with pytest.raises(CheckpointError, match="no checkpoint was published"):
        PathManager.get_local_path(f"knet://{entry.name}")


# ---------------------------------------------------------------- tools/verify_zoo.py


def test_verify_zoo(monkeypatch, capsys):
    assert len(verify_zoo.selected_names(verify_zoo.get_parser().parse_args([]))) == 14
    with pytest.raises(CheckpointError, match="n256: no checkpoint"):
        verify_zoo.selected_names(verify_zoo.get_parser().parse_args(["coco/instance/knet_r50_fpn_3x_n256"]))
    with pytest.raises(ConfigError, match="Did you mean"):
        verify_zoo.selected_names(verify_zoo.get_parser().parse_args(["knet_r50"]))

    results = {
        "coco/panoptic/knet_r50_fpn_1x": {"panoptic_seg": {"PQ": 44.27, "SQ": 80.0}},
        "coco/instance/knet_r50_fpn_1x": {"bbox": {"AP": 1.0}, "segm": {"AP": 34.04}},
        "ade20k/semantic/knet_fcn_r50_d8_80k": {"sem_seg": {"mIoU": 40.0}},
    }
    arguments = verify_zoo.get_parser().parse_args([*results, "--opts", "MODEL.DEVICE", "cpu"])
    seen = []

    def evaluate(name, output, opts):
        seen.append((name, output, opts))
        if name not in results:
            raise CheckpointError("it is broken")
        return results[name]

    monkeypatch.setattr(verify_zoo, "evaluate", evaluate)
    chosen = verify_zoo.selected_names(arguments)
    rows = verify_zoo.verify_all(arguments, chosen[:2])
    assert [(row.metric, row.official, row.ours) for row in rows] == [("PQ", 44.3, 44.27), ("AP", 34.0, 34.04)]
    assert seen[0] == (chosen[0], "output/verify_zoo", ["MODEL.DEVICE", "cpu"])
    text = capsys.readouterr().out
    assert re.search(r"knet_r50_fpn_1x +\| PQ +\| +44.30 \| +44.27 \| +-0.03", text)
    with pytest.raises(ValueError, match=r"1 of 3 differ by more than 0.1: ade20k"):
        verify_zoo.verify_all(arguments, chosen)
    row = verify_zoo.verify("coco/panoptic/knet_r101_fpn_3x", "x", [])
    assert math.isnan(row.ours) and "knet_r101_fpn_3x: it is broken" in verify_zoo.table([row])
    with pytest.raises(ValueError, match="1 of 1 differ"):
        verify_zoo.verify_all(arguments, ["coco/panoptic/knet_r101_fpn_3x"])


def test_verify_zoo_evaluates_what_it_downloads(tmp_path, monkeypatch):
    write_shapes(str(tmp_path / "shapes"), 4, seed=1, size=64)
    data = custom_entry("sem_seg", str(tmp_path / "shapes"))
    options = {"MODEL.KNET.NUM_STUFF_CLASSES": len(THING_CLASSES) + len(STUFF_CLASSES), "DATALOADER.NUM_WORKERS": 0}
    cfg = tiny_config("semantic", options)
    cfg.DATASETS.CUSTOM, cfg.DATASETS.TEST, cfg.INPUT.MIN_SIZE_TEST = [data], (data["name"],), 64
    entry, model = publish(tmp_path, monkeypatch, cfg, "mIoU")
    row = verify_zoo.verify(entry.name, str(tmp_path / "output"), ["MODEL.DEVICE", "cpu"])
    resolve_classes(cfg)
    expected = Trainer.test(cfg, model)["sem_seg"]["mIoU"]
    assert row.error == "" and row.ours == pytest.approx(expected) and expected > 0.1
    assert row.official == 50 and row.metric == "mIoU"
