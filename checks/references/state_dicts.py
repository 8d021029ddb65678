"""Compares names, shapes and numbers of parameters with the official state dicts."""

from typing import Any

import torch
from detectron2.modeling import build_model

from knet_d2.checkpoint.key_table import translate_state_dict
from knet_d2.checkpoint.openmmlab import openmmlab_rules

from .cases import CONFIGS, Result, zoo_config

# The official files contain this constant of every window attention; here it is computed from the window size.
CONSTANT = "relative_position_index"


def check_state_dict(architecture: str, manifest: dict[str, Any]) -> list[Result]:
    """Count the differences of an official state dict from ours: missing, unexpected and differently shaped entries.

    The model is built on the meta device, without memory for its weights.
    """
    with torch.device("meta"):
        model = build_model(zoo_config(CONFIGS[architecture], "meta"))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    official = {name: torch.empty(shape, device="meta") for name, shape in manifest["state_dict"].items()}
    translation = translate_state_dict(official, openmmlab_rules(official), ours)
    found = {name: tuple(tensor.shape) for name, tensor in translation.state_dict.items()}
    unexpected = [*translation.unknown, *(found.keys() - ours.keys())]
    unexpected += [name for name in translation.ignored if not name.endswith(CONSTANT)]
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    counts = {
        "missing": len(ours.keys() - found.keys()),
        "unexpected": len(unexpected),
        "of another shape": sum(found[name] != ours[name] for name in found.keys() & ours.keys()),
        "parameters": abs(sum(p.numel() for p in parameters) - manifest["num_params"]),
        "trained parameters": abs(sum(p.numel() for p in trainable) - manifest["num_trainable"]),
    }
    case = f"manifest_{architecture}_{len(official)}"
    return [Result(case, f"state dict: {name}", float(count), 0.0) for name, count in counts.items()]
