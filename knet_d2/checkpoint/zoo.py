"""The published K-Nets: the table of their configs and checkpoints, and which config a state dict belongs to."""

import difflib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import ConfigError
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
    parameters: str = ""
    """The :func:`fingerprint` of its model."""

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
        texts = row["name"], row["official_name"], row["metrics"], row.get("note", "")
        entries.append(ZooEntry(*texts, url, row["parameters"]))
    return {entry.name: entry for entry in entries}


def zoo_entry(name: str) -> ZooEntry:
    """The entry of a name, with or without ".yaml", or of what follows "knet://" in an address with options.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    entries, short = zoo_entries(), name.partition("?")[0].removesuffix(".yaml")
    if short in entries:
        return entries[short]
    nearest = difflib.get_close_matches(short, entries, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{name!r} is not in the model zoo. Did you mean {nearest!r}? knet_d2.model_zoo.names() has all.")


def fitting_entries(state_dict: Mapping[str, torch.Tensor]) -> list[ZooEntry]:
    """The entries whose model has exactly the parameters of a state dict in our names."""
    return [entry for entry in zoo_entries().values() if entry.parameters == fingerprint(state_dict)]


def fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """16 digits that follow from the names and shapes of parameters."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in state_dict.items() if not is_counter(name))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def build_on_meta(cfg: CfgNode, most_modules: int = 100_000) -> nn.Module:
    """The model of a config with parameters that have names and shapes, and no values.

    Raises:
        ConfigError: it has more modules than ``most_modules``.
        Exception: nearly any, where the config can't be built.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    counter = itertools.count(1)

    def count(*_: Any) -> None:
        if next(counter) > most_modules:
            raise ConfigError(f"the model of this config has more than {most_modules} modules. Check its numbers.")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return build_model(cfg)
    finally:
        hook.remove()


def fitting_hint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """For messages: the config files that :func:`fitting_entries` finds, as a sentence; "" where there is none."""
    paths = [os.path.join("configs", f"{entry.name}.yaml") for entry in fitting_entries(state_dict)]
    return f" It is a checkpoint for {' or '.join(paths)}." if paths else ""
