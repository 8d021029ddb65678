"""Key tables for the official K-Net checkpoints (OpenMMLab): the heads, and the whole model."""

import re
from collections.abc import Mapping

import torch

from .key_table import KeyRule
from .openmmlab_backbones import openmmlab_backbone_rules, openmmlab_neck_rules

_WEIGHTS = r"(weight|bias)"
_NORM_ENTRIES = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

# Official name of a stage's layer -> our name
_STAGE_LAYERS = {
    "attention.attn.in_proj_": "interaction.in_proj.",
    "attention.attn.out_proj.": "interaction.out_proj.",
    "attention_norm.": "interaction.attention_norm.",
    "ffn.layers.0.0.": "interaction.ffn.0.",
    "ffn.layers.1.": "interaction.ffn.2.",
    "ffn_norm.": "interaction.ffn_norm.",
    "kernel_update_conv.dynamic_layer.": "kernel_update.feature_proj.",
    "kernel_update_conv.input_layer.": "kernel_update.kernel_proj.",
    "kernel_update_conv.update_gate.": "kernel_update.feature_gate.0.",
    "kernel_update_conv.norm_in.": "kernel_update.feature_gate.1.",
    "kernel_update_conv.input_gate.": "kernel_update.kernel_gate.0.",
    "kernel_update_conv.input_norm_in.": "kernel_update.kernel_gate.1.",
    "kernel_update_conv.norm_out.": "kernel_update.feature_norm.",
    "kernel_update_conv.input_norm_out.": "kernel_update.kernel_norm.",
    "kernel_update_conv.fc_layer.": "kernel_update.out_proj.0.",
    "kernel_update_conv.fc_norm.": "kernel_update.out_proj.1.",
    "cls_fcs.0.": "class_branch.0.",
    "cls_fcs.1.": "class_branch.1.",
    "fc_cls.": "class_branch.3.",
    "mask_fcs.0.": "mask_branch.0.",
    "mask_fcs.1.": "mask_branch.1.",
    "fc_mask.": "mask_branch.3.",
}


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Convert the weight of a 1x1 convolution to a matrix."""
    return tensor.flatten(1)


def _stage_rules(source: str) -> list[KeyRule]:
    """Return the rules for an update head; the only group of the pattern ``source`` is the index of the stage."""
    rules = [
        KeyRule(source + re.escape(theirs) + _WEIGHTS, rf"cascade.stages.\1.{ours}\2")
        for theirs, ours in _STAGE_LAYERS.items()
    ]
    transform = source + r"feat_transform\.conv\."
    return rules + [
        KeyRule(transform + "weight", r"cascade.stages.\1.feature_transform.weight", _matrix),
        KeyRule(transform + "bias", r"cascade.stages.\1.feature_transform.bias"),
    ]


def _semantic_fpn_rules() -> list[KeyRule]:
    source, target = r"rpn_head\.", "sem_seg_head."

    def conv_rules(pattern: str, name) -> list[KeyRule]:
        return [
            KeyRule(pattern + r"\.conv\.weight", lambda m: f"{name(m)}.weight"),
            KeyRule(pattern + rf"\.gn\.{_WEIGHTS}", lambda m: f"{name(m)}.norm.{m[m.re.groups]}"),
        ]

    return [
        *conv_rules(
            source + r"localization_fpn\.convs_all_levels\.([0-3])\.conv([0-2])",
            # Each convolution of a level is followed by an up-sampling layer, hence the factor 2.
            lambda m: f"{target}semantic_fpn.levels.p{int(m[1]) + 2}.{2 * int(m[2])}",
        ),
        *conv_rules(source + r"localization_fpn\.conv_pred", lambda m: f"{target}localization_branch.0"),
        *conv_rules(source + r"localization_fpn\.aux_convs\.0", lambda m: f"{target}semantic_branch.0"),
        *conv_rules(source + r"loc_convs\.0", lambda m: f"{target}localization_branch.1"),
        *conv_rules(source + r"seg_convs\.0", lambda m: f"{target}semantic_branch.1"),
        KeyRule(source + r"init_kernels\.weight", target + "instance_kernels.weight"),
        KeyRule(source + rf"conv_seg\.{_WEIGHTS}", target + r"classifier.\1"),
    ]


def _decode_head_rules(pyramid: bool) -> list[KeyRule]:
    """Return the rules for FCN, PSP, ASPP and UPer heads.

    Args:
        pyramid: whether the head is UPer; its "bottleneck" is then part of the pooling.
    """
    source, target = r"decode_head\.kernel_generate_head\.", "sem_seg_head."

    def conv_rules(pattern: str, name: str) -> list[KeyRule]:
        return [
            KeyRule(pattern + r"\.conv\.weight", name + ".weight"),
            KeyRule(pattern + rf"\.bn\.{_NORM_ENTRIES}", lambda m: f"{m.expand(name)}.norm.{m[m.re.groups]}"),
        ]

    return [
        KeyRule(source + rf"conv_seg\.{_WEIGHTS}", target + r"classifier.conv.\1"),
        *conv_rules(source + r"convs\.(\d)", target + r"convs.\1"),
        *conv_rules(source + r"psp_modules\.(\d)\.1", target + r"pooling.convs.\1"),
        *conv_rules(source + r"image_pool\.1", target + "image_pooling.convs.0"),
        *conv_rules(source + r"aspp_modules\.(\d)", target + r"branches.\1"),
        *conv_rules(source + r"lateral_convs\.(\d)", target + r"lateral_convs.\1"),
        *conv_rules(source + r"fpn_convs\.(\d)", target + r"output_convs.\1"),
        *conv_rules(source + "bottleneck", target + ("pooling_fuse" if pyramid else "fuse")),
        *conv_rules(source + "(conv_cat|fpn_bottleneck)", target + "fuse"),
        KeyRule(rf"auxiliary_head\.conv_seg\.{_WEIGHTS}", r"auxiliary_head.classifier.conv.\1"),
        *conv_rules(r"auxiliary_head\.convs\.0", "auxiliary_head.conv"),
    ]


def openmmlab_rules(state_dict: Mapping[str, torch.Tensor]) -> list[KeyRule]:
    """Return the rules for an official K-Net, of the detection or the segmentation release."""
    detection = any(key.startswith("neck.") for key in state_dict)
    pyramid = any(key.startswith("decode_head.kernel_generate_head.fpn_bottleneck.") for key in state_dict)
    return [
        *openmmlab_backbone_rules("backbone.bottom_up." if detection else "backbone."),
        *openmmlab_neck_rules(),
        *_semantic_fpn_rules(),
        *_decode_head_rules(pyramid),
        *_stage_rules(r"roi_head\.mask_head\.(\d+)\."),
        *_stage_rules(r"decode_head\.kernel_update_head\.(\d+)\."),
    ]
