"""The published K-Nets: the table of their configs and checkpoints, and which config a state dict belongs to."""

import difflib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..config.files import get_config_file
from ..config.options import add_knet_config
from ..errors import ConfigError
from ..tasks import get_task
from .load_report import is_counter

_TABLE = Path(__file__).resolve().parent.parent / "model_zoo.json"


class ZooEntry(NamedTuple):
    """One published K-Net."""

    name: str
    """Path of its config below ``configs``, without ".yaml"."""
    official_name: str | None
    """What the official release calls it; None where only the paper has it."""
    metrics: dict[str, float]
    """On the validation set: "PQ"; "AP"; "mIoU" and "mIoU_ms" (several scales, flipped)."""
    note: str
    """On the metrics."""
    url: str | None
    """Of the official checkpoint; None where none was published."""

    @property
    def checkpoint_file(self) -> str | None:
        """The checkpoint's file name."""
        return self.url and self.url.rsplit("/", 1)[-1]


@functools.cache
def zoo_entries() -> dict[str, ZooEntry]:
    """All entries by name, in the order of MODEL_ZOO.md."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    entries = []
    for row in table["models"]:
        url = row["checkpoint"] and table["roots"][row["root"]] + row["checkpoint"]
        entries.append(ZooEntry(row["name"], row["official_name"], row["metrics"], row.get("note", ""), url))
    return {entry.name: entry for entry in entries}


def zoo_entry(name: str) -> ZooEntry:
    """The entry of a name, with or without ".yaml".

    Raises:
        ConfigError: there is none; names the nearest.
    """
    entries, short = zoo_entries(), name.removesuffix(".yaml")
    if short in entries:
        return entries[short]
    nearest = difflib.get_close_matches(short, entries, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{name!r} is not in the model zoo. Did you mean {nearest!r}? knet_d2.model_zoo.names() has all.")


def fitting_entries(state_dict: Mapping[str, torch.Tensor]) -> list[ZooEntry]:
    """The entries whose model has exactly the parameters of a state dict in our names.

    Builds the models without memory for their parameters; takes seconds.
    """
    shapes = _shapes(state_dict)
    has_class_branch = any(".class_branch." in name for name in shapes)
    return [
        entry
        for entry in zoo_entries().values()
        if get_task(_entry_config(entry.name)).has_class_branch == has_class_branch
        and _entry_shapes(entry.name) == shapes
    ]


@functools.cache
def _entry_config(name: str) -> CfgNode:
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.merge_from_file(get_config_file(name + ".yaml"))
    return cfg


@functools.cache
def _entry_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return _shapes(build_on_meta(_entry_config(name)).state_dict())


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model of a config with parameters that have names and shapes, and no values."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def _shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state_dict.items() if not is_counter(name)}


def fitting_hint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """For messages: the config files that :func:`fitting_entries` finds, as a sentence; "" where there is none."""
    paths = [os.path.join("configs", f"{entry.name}.yaml") for entry in fitting_entries(state_dict)]
    return f" It is a checkpoint for {' or '.join(paths)}." if paths else ""
