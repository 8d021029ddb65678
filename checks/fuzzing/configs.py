"""Fuzzing of config files."""

import json
import os
import random
from collections.abc import Sequence
from typing import Any

import yaml

from knet_d2.engine import Trainer, load_config

from .data import Files, Reached, default_config
from .mutations import mutate_bytes, nudge, odd_value

SECTIONS = ("MODEL", "INPUT", "SOLVER", "TEST", "DATALOADER", "DATASETS")
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "KNet",
    "MODEL.BACKBONE.NAME": "build_knet_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 4,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.SEM_SEG_HEAD.NAME": "SemanticFPNKernelHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3"],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
    "MODEL.KNET.TASK": "instance",
    "MODEL.KNET.NUM_KERNELS": 3,
    "MODEL.KNET.NUM_STAGES": 1,
    "MODEL.KNET.UPDATE_HEAD.FEATURE_DIM": 8,
    "MODEL.KNET.UPDATE_HEAD.FFN_DIM": 8,
    "MODEL.KNET.UPDATE_HEAD.NUM_HEADS": 2,
}
# Options that K-Net does not read
OTHERS = ("MODEL.ROI", "MODEL.RPN", "MODEL.RETINANET", "MODEL.PROPOSAL", "MODEL.ANCHOR", "MODEL.PANOPTIC_FPN")
TAGS = ("!!python/object/apply:os.mkdir [{0}]", "!!python/name:os.system", "!!python/object/new:os.mkdir [{0}]")
"""YAML tags that run code if the reader is not safe."""


class Configs:
    """Reads a config, and builds the trainer, its model and the first batch."""

    may_take_memory = True  # a config may describe a large model

    def __init__(self, folder: str) -> None:
        self._folder = folder
        files = Files(folder)
        with open(files.path("instances.json"), "w") as f:
            json.dump(files.instances(), f)
        cfg = files.config("instance", "fuzz_configs", "coco_instance", json=files.path("instances.json"))
        cfg.merge_from_list([item for pair in TINY.items() for item in pair])
        cfg.OUTPUT_DIR = folder
        self._valid = yaml.safe_load(cfg.dump())
        self._paths = [path for path in _leaves(self._valid) if _is_read(path)]
        defaults = yaml.safe_load(default_config().dump())
        self._changed = [path for path in self._paths if _get(self._valid, path) != _get(defaults, path)]
        self._knet_paths = [path for path in self._paths if path[:2] == ["MODEL", "KNET"]]
        self._path = os.path.join(folder, "config.yaml")
        self._marker = os.path.join(folder, "code_has_run")

    def make(self, draw: random.Random) -> None:
        content: dict[str, Any] = {}
        for path in self._changed:
            _set(content, path, _get(self._valid, path))
        for _ in range(draw.choice((1, 1, 2))):
            path = draw.choice(draw.choice((self._paths, self._knet_paths)))
            value = _get(self._valid, path)
            _set(content, path, nudge(value, draw) if draw.random() < 0.7 else odd_value(draw))
        form = draw.random()
        text = yaml.safe_dump(content, allow_unicode=False).encode("utf-8", "surrogatepass")
        if form < 0.1:
            text = mutate_bytes(text, draw)
        elif form < 0.13:
            text += f"\nOUTPUT_DIR: {draw.choice(TAGS).format(self._marker)}\n".encode()
        with open(self._path, "wb") as f:
            f.write(text)

    def use(self, draw: random.Random, reached: Reached) -> None:
        try:
            cfg = load_config(self._path, ["OUTPUT_DIR", self._folder, "DATALOADER.NUM_WORKERS", "0"])
            reached()
            trainer = Trainer(cfg)
            next(iter(trainer.build_train_loader(trainer.cfg)))
        finally:
            if os.path.exists(self._marker):
                os.rmdir(self._marker)
                raise RuntimeError("code in a config has run")


def _leaves(tree: dict[str, Any], prefix: Sequence[str] = ()) -> list[list[str]]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, [*prefix, key]) if isinstance(value, dict) else [[*prefix, key]]
    return found


def _is_read(path: list[str]) -> bool:
    return path[0] in SECTIONS and not ".".join(path).startswith(OTHERS) and path != ["DATASETS", "CUSTOM"]


def _get(tree: dict[str, Any], path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
