"""Whose parameter names a state dict has, and its translation into ours."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from .key_table import KeyRule, Translation, translate_state_dict
from .openmmlab import openmmlab_rules
from .openmmlab_backbones import pretrained_backbone_rules

_OFFICIAL_HEADS = ("rpn_head.localization_fpn.", "decode_head.kernel_generate_head.")
_OUR_HEADS = ("sem_seg_head.", "cascade.")


class Layout(NamedTuple):
    """A recognised state dict in our names."""

    name: str
    """For people."""
    scope: str
    """What it should fill: "model" (a whole K-Net), "backbone" (pretrained), or "unknown"."""
    translation: Translation
    backbone_prefix: str
    """What our names of the (bottom-up) backbone begin with."""


def recognise(state_dict: Mapping[str, torch.Tensor], model_keys: Collection[str]) -> Layout:
    """Tell the layout of a state dict by its names and translate it for a model.

    Args:
        state_dict: name -> tensor.
        model_keys: names in the model's state dict.
    """
    has_fpn = any(key.startswith("backbone.bottom_up.") for key in model_keys)
    prefix = "backbone.bottom_up." if has_fpn else "backbone."

    def layout(name: str, scope: str, rules: list[KeyRule]) -> Layout:
        return Layout(name, scope, translate_state_dict(state_dict, rules, model_keys), prefix)

    if any(key.startswith(_OFFICIAL_HEADS) for key in state_dict):
        return layout("official K-Net (OpenMMLab)", "model", openmmlab_rules(state_dict))
    if "res2.0.conv1.weight" in state_dict:
        return layout("backbone of Detectron2", "backbone", _detectron2_backbone_rules(prefix))
    backbone_rules = pretrained_backbone_rules(state_dict, prefix)
    if backbone_rules is not None:
        is_swin = "patch_embed.proj.weight" in state_dict
        return layout("Swin release" if is_swin else "ResNet of torchvision or OpenMMLab", "backbone", backbone_rules)
    unchanged = Translation(dict(state_dict), {key: key for key in state_dict}, [], [])
    is_whole = any(key.startswith(_OUR_HEADS) for key in state_dict)
    return Layout("names of this project", "model" if is_whole else "unknown", unchanged, prefix)


def _detectron2_backbone_rules(prefix: str) -> list[KeyRule]:
    """Detectron2's names, which are ours without the prefix; some of its files also have the classifier."""
    return [
        KeyRule(r"stem\.fc\.(weight|bias)", None),
        KeyRule(r"(?:stem|res[2-5])\..*num_batches_tracked", lambda m: prefix + m[0], optional=True),
        KeyRule(r"(?:stem|res[2-5])\..*", lambda m: prefix + m[0]),
    ]
