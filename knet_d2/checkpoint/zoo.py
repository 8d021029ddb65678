"""The table of the published K-Nets with their configs and checkpoints, and the config that fits a state dict."""

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
    """Path of the config below ``configs``, without ".yaml"."""
    official_name: str | None
    """Name in the official release; None if only the paper has this model."""
    metrics: dict[str, float]
    """Metrics on the validation set: "PQ"; "AP"; "mIoU" and "mIoU_ms" (several scales, flipped)."""
    note: str
    """Note on the metrics."""
    url: str | None
    """URL of the official checkpoint; None if none was published."""
    parameters: str = ""
    """:func:`fingerprint` of the model."""

    @property
    def checkpoint_file(self) -> str | None:
        """File name of the checkpoint; None if none was published."""
        return self.url and self.url.rsplit("/", 1)[-1]


@functools.cache
def zoo_entries() -> dict[str, ZooEntry]:
    """Return all entries by name, in the order of MODEL_ZOO.md."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    entries = []
    for row in table["models"]:
        url = row["checkpoint"] and table["roots"][row["root"]] + row["checkpoint"]
        texts = row["name"], row["official_name"], row["metrics"], row.get("note", "")
        entries.append(ZooEntry(*texts, url, row["parameters"]))
    return {entry.name: entry for entry in entries}


def zoo_entry(name: str) -> ZooEntry:
    """Return the entry for a name, which may end in ".yaml" or in options ("?...").

    Raises:
        ConfigError: there is no such entry; suggests the most similar name.
    """
    entries, short = zoo_entries(), name.partition("?")[0].removesuffix(".yaml")
    if short in entries:
        return entries[short]
    nearest = difflib.get_close_matches(short, entries, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{name!r} is not in the model zoo. Did you mean {nearest!r}? knet_d2.model_zoo.names() lists all."
    )


def fitting_entries(state_dict: Mapping[str, torch.Tensor]) -> list[ZooEntry]:
    """Return the entries whose model has exactly the parameters of a state dict with our names."""
    return [entry for entry in zoo_entries().values() if entry.parameters == fingerprint(state_dict)]


def fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return 16 hexadecimal digits that depend only on the names and shapes of the parameters."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in state_dict.items() if not is_counter(name))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def build_on_meta(cfg: CfgNode, most_modules: int = 100_000) -> nn.Module:
    """Build the model of a config on the meta device: its parameters have names and shapes, but no values.

    Raises:
        ConfigError: the model has more than ``most_modules`` modules.
        Exception: almost any other exception, if the config is wrong.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    counter = itertools.count(1)

    def count(*_: Any) -> None:
        if next(counter) > most_modules:
            raise ConfigError(f"the model of this config has more than {most_modules} modules. Use smaller numbers.")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return build_model(cfg)
    finally:
        hook.remove()


def fitting_hint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return a sentence for error messages that names the config files that fit a state dict; "" if none fits."""
    paths = [os.path.join("configs", f"{entry.name}.yaml") for entry in fitting_entries(state_dict)]
    return f" It is a checkpoint for {' or '.join(paths)}." if paths else ""
