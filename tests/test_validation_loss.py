"""The training loss on validation images."""

import os

import pytest
import torch
from data_helpers import custom_entry, data_cfg
from helpers import make_example, tiny_config, tiny_model
from torch import nn

from knet_d2.data import build_loss_loader, load_dataset, resolve_classes
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import Trainer
from knet_d2.engine.validation import mean_loss


class Multiplier(nn.Module):
    """A model whose loss is the image times a weight, plus terms that dropout and batch norm add in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, samples):
        assert self.training and not self.dropout.training and not self.norm.training
        self.calls += 1
        x = self.dropout(self.norm(torch.tensor([[s["image"] for s in samples]])))
        return {"loss_a": x.mean(), "loss_b": 2 * x.mean()}


def batches(*values):
    return [[{"image": value}] for value in values]


def test_mean_over_images_without_dropout_and_with_fixed_statistics():
    model = Multiplier().train()
    model.norm.running_mean.fill_(1.0)
    model.norm.eps = 0.0
    assert mean_loss(model, batches(2.0, 3.0, 6.0), 3) == pytest.approx(3 * (1 + 2 + 5) / 3)
    assert all(m.training for m in model.modules()) and model.norm.num_batches_tracked == 0
    model.eval()
    mean_loss(model, batches(2.0), 1)
    assert not any(m.training for m in model.modules())


def test_modes_are_restored_after_a_failure():
    model = Multiplier().train()
    with pytest.raises(ValueError):
        mean_loss(model, batches("no number"), 1)
    assert all(m.training for m in model.modules())


def test_processes_share_the_images(monkeypatch):
    """Five images on two processes: each computes three losses, and the sixth, a repetition, doesn't count."""
    values, parts = [1.0, 2.0, 3.0, 4.0, 5.0], []
    for rank in (0, 1):
        monkeypatch.setattr("knet_d2.engine.validation.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("knet_d2.engine.validation.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("knet_d2.engine.validation.comm.all_gather", lambda x: [parts.append(x) or x])
        model = Multiplier()
        model.norm.eps = 0.0
        mean_loss(model, batches(*[values[(2 * i + rank) % 5] for i in range(3)]), 5)
        assert model.calls == 3
    assert sum(parts) == pytest.approx(3 * sum(values))


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_model_without_randomness_has_its_training_loss(task):
    options = {"MODEL.KNET.DROPOUT": 0.0, "MODEL.RESNETS.NORM": "FrozenBN"}
    if task == "semantic":
        options["MODEL.SEM_SEG_HEAD.NORM"] = "FrozenBN"
    model = tiny_model(task, options)
    examples = [[make_example((64, 64), count, seed=count)] for count in (1, 3)]
    model.train()
    expected = sum(float(sum(model(x).values())) for x in examples) / 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert mean_loss(model, examples, 2) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=3, seed=5, size=64)
    return folder


@pytest.mark.parametrize("rank, expected", [(0, [0, 2]), (1, [1, 0])])
def test_loader_is_equally_long_for_all_processes(root, monkeypatch, rank, expected):
    cfg = data_cfg("panoptic", custom=(custom_entry("coco_panoptic", root),))
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    monkeypatch.setattr("knet_d2.data.build.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("knet_d2.data.build.comm.get_rank", lambda: rank)
    loader, number = build_loss_loader(cfg, cfg.DATASETS.TRAIN[0])
    names = [record["file_name"] for record in load_dataset(cfg.DATASETS.TRAIN[0])]
    found = list(loader)
    assert number == 3 and [x["file_name"] for (x,) in found] == [names[i] for i in expected]
    for (x,), (y,) in zip(found, loader, strict=True):  # nothing is random
        assert torch.equal(x["image"], y["image"]) and x["ground_truth"].labels.shape == x["image"].shape[1:]


def test_in_a_run(root, tmp_path):
    """The option adds the loss to the metrics; it is computed with the saved model."""
    entry = custom_entry("coco_panoptic", root)
    found = {}
    for enabled in (False, True):
        options = {"MODEL.KNET.NUM_THING_CLASSES": 0, "MODEL.KNET.NUM_STUFF_CLASSES": 0}
        cfg = tiny_config("panoptic", options)
        cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [entry], (entry["name"],), (entry["name"],)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS = (64,), 64, 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED = 2, 1, (), 1
        cfg.OUTPUT_DIR, cfg.TEST.NUM_PICTURES, cfg.TEST.VALIDATION_LOSS = str(tmp_path / str(enabled)), 0, enabled
        cfg.SOLVER.EMA_DECAY = 0.5
        os.makedirs(cfg.OUTPUT_DIR)
        data_cfg("panoptic", custom=(entry,))
        resolve_classes(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        found[enabled] = trainer.train()
    assert "validation" not in found[False]
    loader, number = build_loss_loader(cfg, entry["name"])
    expected = mean_loss(trainer.evaluated_model, loader, number)
    assert found[True]["validation"]["total_loss"] == pytest.approx(expected, rel=1e-6) and expected > 1
    assert found[True]["panoptic_seg"] == found[False]["panoptic_seg"]
