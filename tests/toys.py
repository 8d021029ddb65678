"""A toy model, data, evaluator and trainer, to test the training loop without K-Net."""

import json
import os

import torch
from detectron2.config import get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from program_helpers import first_difference
from torch import nn

from knet_d2.config import add_knet_config
from knet_d2.engine import Trainer


class Interrupted(Exception):
    """An error that simulates any interruption of a run."""


@META_ARCH_REGISTRY.register()
class ToyNet(nn.Module):
    """A regression with dropout; ``fail_at`` = (image, what to raise or to multiply the first loss by)."""

    fail_at = (None, None)

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, samples):
        x = torch.stack([s["image"] for s in samples])
        features = self.backbone(x)
        self.seen_dtype = features.dtype
        pooled = self.norm(features.float()).relu().mean((2, 3))
        y = self.head(nn.functional.dropout(pooled, 0.5, self.training)).float()
        if not self.training:
            return [{"value": float(y.mean())}]
        first = (y - 1).pow(2).mean()
        image, failure = ToyNet.fail_at
        if samples[0]["file_name"] == image:
            if isinstance(failure, Exception):
                raise failure
            first = first * failure
        return {"loss_mask_s0": first, "loss_mask_s1": y.abs().mean()}


class ToyData:
    """Batch i is a function of (seed, i)."""

    def __init__(self, seed, start):
        self.seed, self.start = seed, start

    def __iter__(self):
        i = self.start
        while True:
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            yield [{"image": torch.rand(3, 8, 8, generator=generator), "file_name": f"image{i}.png"}]
            i += 1


class ToyEvaluator(DatasetEvaluator):
    values = None  # results of successive evaluations; None = the model's own output
    interrupt = False

    def process(self, inputs, outputs):
        self.value = outputs[0]["value"]

    def evaluate(self):
        if ToyEvaluator.interrupt:
            raise Interrupted
        return {"panoptic_seg": {"PQ": ToyEvaluator.values.pop(0) if ToyEvaluator.values else self.value}}


class ToyTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return ToyData(cfg.SEED, start_iter)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[{"image": torch.ones(3, 8, 8)}]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return ToyEvaluator()


class Parts(nn.Module):
    """A model with every kind of parameter that the optimiser treats differently."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone.bottom_up[0].relative_position_bias_table = nn.Parameter(torch.zeros(2))
        self.backbone.lateral = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def knet_cfg(**values):
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([x for key, value in values.items() for x in (key.replace("__", "."), value)])
    return cfg


def toy_cfg(folder, **values):
    settings = {
        "MODEL__META_ARCHITECTURE": "ToyNet",
        "MODEL__WEIGHTS": "",
        "OUTPUT_DIR": str(folder),
        "DATASETS__TEST": ("toy",),
        "MODEL__KNET__NUM_THING_CLASSES": 1,
        "MODEL__KNET__THING_CATEGORY_IDS": [0],
        "SEED": 3,
        "SOLVER__BASE_LR": 0.01,
        "SOLVER__MAX_ITER": 23,
        "SOLVER__STEPS": (15, 20),
        "SOLVER__WARMUP_ITERS": 10,
        "SOLVER__CHECKPOINT_PERIOD": 7,
        "SOLVER__LOG_PERIOD": 5,
        "TEST__EVAL_PERIOD": 14,
        "TEST__NUM_PICTURES": 0,
    }
    return knet_cfg(**{**settings, **values})


def run(folder, resume=False, **values):
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    trainer = ToyTrainer(toy_cfg(folder, **values))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def metrics_of(folder):
    with open(os.path.join(folder, "metrics.json")) as f:
        return [json.loads(line) for line in f]


def assert_identical(a, b):
    difference = first_difference(a, b)
    assert difference is None, difference


def reset_toys():
    ToyNet.fail_at, ToyEvaluator.values, ToyEvaluator.interrupt = (None, None), None, False
