"""The recorded cases, and models with the weights that the recording used.

A reference folder contains ``ref_<architecture>_<case>.npz`` (inference) and ``train_<architecture>_<case>.npz``
(training). It also has the names and shapes of the official state dicts, in ``manifests.json.gz`` or in one
``manifest_*.json`` each.
"""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from knet_d2.checkpoint.key_table import translate_state_dict
from knet_d2.checkpoint.openmmlab import openmmlab_rules
from knet_d2.config import get_knet_cfg

from .filling import filled_state_dict

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "data" / "references"


# Architecture with an official state dict -> config
CONFIGS = {
    "ins_r50": "coco/instance/knet_r50_fpn_1x.yaml",
    "ins_r101": "coco/instance/knet_r101_fpn_3x.yaml",
    "ins_r101dcn": "coco/instance/knet_r101_dcn_fpn_3x.yaml",
    "pan_r50": "coco/panoptic/knet_r50_fpn_1x.yaml",
    "pan_r101": "coco/panoptic/knet_r101_fpn_3x.yaml",
    "pan_r101dcn": "coco/panoptic/knet_r101_dcn_fpn_3x.yaml",
    "pan_swinl": "coco/panoptic/knet_swin_l_fpn_3x.yaml",
    "seg_fcn": "ade20k/semantic/knet_fcn_r50_d8_80k.yaml",
    "seg_psp": "ade20k/semantic/knet_pspnet_r50_d8_80k.yaml",
    "seg_dlv3": "ade20k/semantic/knet_deeplabv3_r50_d8_80k.yaml",
    "seg_uper": "ade20k/semantic/knet_upernet_r50_80k.yaml",
    "seg_uper_swint": "ade20k/semantic/knet_upernet_swin_t_80k.yaml",
    "seg_uper_swinl": "ade20k/semantic/knet_upernet_swin_l_80k.yaml",
    "seg_uper_swinl640": "ade20k/semantic/knet_upernet_swin_l_640_80k.yaml",
}


# Entries of a reference file that are inputs or descriptions of other entries
_DESCRIPTIONS = re.compile(r"info|image\d*|gt_\w+|spatial_step|masks_shape|masks_near_thr")


class Result(NamedTuple):
    """The comparison of one recorded value with ours.

    Attributes:
        case: name of the reference file.
        name: name of the compared entry.
        difference: difference relative to the largest recorded value, or share of entries that differ.
        tolerance: largest allowed difference.
    """

    case: str
    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def architecture_of(case: str) -> str:
    """Return the architecture of a case: "ref_seg_uper_swint_b" -> "seg_uper_swint"."""
    return case.split("_", 1)[1].rsplit("_", 1)[0]


def find_cases(folder: Path) -> list[str]:
    """Return the names of the reference files in a folder, sorted by architecture."""
    cases = [path.stem for pattern in ("ref_*.npz", "train_*.npz") for path in folder.glob(pattern)]
    order = list(CONFIGS)
    return sorted(cases, key=lambda case: (order.index(architecture_of(case)), case))


def load_case(folder: Path, case: str) -> dict[str, np.ndarray]:
    """Read the arrays of a reference file; "info" is its decoded description."""
    with np.load(folder / f"{case}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["info"] = json.loads(str(arrays.pop("info_json")))
    return arrays


def not_compared(arrays: Iterable[str], results: Iterable[Result]) -> list[str]:
    """Return the names of the recorded entries without a result."""
    compared = {re.sub(r"^float\d+ |:.*", "", result.name) for result in results}
    return [name for name in arrays if name not in compared and not _DESCRIPTIONS.fullmatch(name)]


def load_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """Read {architecture: {"num_params", "num_trainable", "state_dict": {official name: shape}}}."""
    packed = folder / "manifests.json.gz"
    if packed.exists():
        with gzip.open(packed, "rt") as f:
            return json.load(f)
    manifests = {}
    for path in folder.glob("manifest_*.json"):
        content = json.loads(path.read_text())
        manifests[content["name"]] = {
            "num_params": content["num_params"],
            "num_trainable": content["num_trainable"],
            "state_dict": {name: shape for name, shape, _ in content["state_dict"]},
        }
    return manifests


def zoo_config(path: str, device: str = "cpu") -> CfgNode:
    """Read a config below configs/, with empty MODEL.WEIGHTS."""
    cfg = get_knet_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / path))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = device
    return cfg


def filled_model(architecture: str, shapes: dict[str, list[int]], device: str = "cpu") -> torch.nn.Module:
    """Build a model without dropout, with the weights of :func:`filled_state_dict`.

    Raises:
        ValueError: an official key can't be translated.
    """
    cfg = zoo_config(CONFIGS[architecture], device)
    cfg.MODEL.KNET.DROPOUT = 0.0
    model = build_model(cfg)
    official = filled_state_dict(shapes)
    translation = translate_state_dict(official, openmmlab_rules(official), model.state_dict().keys())
    if translation.unknown:
        raise ValueError(f"{architecture}: no rule for {translation.unknown}")
    model.load_state_dict(translation.state_dict)
    return model


def relative_difference(ours, recorded, scale: float | None = None) -> float:
    """Return the largest difference divided by the largest recorded value (or ``scale``); inf if the shapes differ."""
    ours = ours.detach().cpu().double().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours, np.float64)
    recorded = np.asarray(recorded, np.float64)
    if ours.shape != recorded.shape:
        return float("inf")
    if recorded.size == 0:
        return 0.0
    difference = np.abs(ours - recorded).max()
    scale = np.abs(recorded).max() if scale is None else scale
    return float(difference / scale) if scale else float(difference)


def share_of_different(ours, recorded) -> float:
    """Return the share of entries that differ, 0 to 1; 1 if the shapes differ."""
    ours = ours.cpu() if isinstance(ours, torch.Tensor) else ours
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    if ours.shape != recorded.shape:
        return 1.0
    return float((ours != recorded).mean()) if recorded.size else 0.0
