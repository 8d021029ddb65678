"""State dicts in the names of the official releases, made from models of ours."""

from itertools import product

import numpy as np
import torch

from knet_d2.checkpoint.key_table import find_rule, translate_key
from knet_d2.checkpoint.openmmlab import openmmlab_rules

WEIGHTS = ("weight", "bias")
NORM = (*WEIGHTS, "running_mean", "running_var", "num_batches_tracked")
STAGE_LAYERS = """
attention.attn.in_proj_{} attention.attn.out_proj.{} attention_norm.{} ffn.layers.0.0.{} ffn.layers.1.{} ffn_norm.{}
kernel_update_conv.dynamic_layer.{} kernel_update_conv.input_layer.{} kernel_update_conv.input_gate.{}
kernel_update_conv.update_gate.{} kernel_update_conv.norm_in.{} kernel_update_conv.norm_out.{}
kernel_update_conv.input_norm_in.{} kernel_update_conv.input_norm_out.{} kernel_update_conv.fc_layer.{}
kernel_update_conv.fc_norm.{} feat_transform.conv.{} cls_fcs.0.{} cls_fcs.1.{} fc_cls.{}
mask_fcs.0.{} mask_fcs.1.{} fc_mask.{}
""".split()


def _expand(pattern, *values):
    return [pattern.format(*choice) for choice in product(*values)]


def _resnet_names(deep_stem):
    stem = ["conv1.weight", *_expand("bn1.{}", NORM)]
    if deep_stem:
        stem = [*_expand("stem.{}.weight", "036"), *_expand("stem.{}.{}", "147", NORM)]
    block = [
        *_expand("conv{}.weight", "123"),
        *_expand("bn{}.{}", "123", NORM),
        "downsample.0.weight",
        *_expand("downsample.1.{}", NORM),
    ]
    return ["backbone." + name for name in [*stem, *_expand("layer{}.{}.{}", "1234", range(6), block)]]


def _stage_names(head):
    return [f"{head}.{stage}.{layer.format(part)}" for stage in range(7) for layer in STAGE_LAYERS for part in WEIGHTS]


def _detection_names(deep_stem):
    conv = ("conv.weight", "gn.weight", "gn.bias")
    return [
        *_resnet_names(deep_stem),
        *_expand("neck.{}_convs.{}.conv.{}", ("lateral", "fpn"), "0123", WEIGHTS),
        *_expand("rpn_head.localization_fpn.convs_all_levels.{}.conv{}.{}", "0123", "012", conv),
        *_expand("rpn_head.{}.{}", ("localization_fpn.conv_pred", "localization_fpn.aux_convs.0"), conv),
        *_expand("rpn_head.{}.{}", ("loc_convs.0", "seg_convs.0"), conv),
        "rpn_head.init_kernels.weight",
        *_expand("rpn_head.conv_seg.{}", WEIGHTS),
        *_stage_names("roi_head.mask_head"),
    ]


def _segmentation_names(deep_stem):
    conv = ("conv.weight", *(f"bn.{entry}" for entry in NORM))
    head = "decode_head.kernel_generate_head."
    return [
        *_resnet_names(deep_stem),
        *_expand(head + "{}.{}", ("convs.0", "convs.1", "conv_cat"), conv),
        *_expand(head + "conv_seg.{}", WEIGHTS),
        *_expand("auxiliary_head.convs.0.{}", conv),
        *_expand("auxiliary_head.conv_seg.{}", WEIGHTS),
        *_stage_names("decode_head.kernel_update_head"),
    ]


def official_state_dict(model_state):
    """The official names and shapes of a K-Net's parameters (ResNet with FPN, or with an FCN head)."""
    detection = any(name.startswith("backbone.bottom_up.") for name in model_state)
    deep_stem = any("stem.conv2" in name for name in model_state)
    names = _detection_names(deep_stem) if detection else _segmentation_names(deep_stem)
    rules, found = openmmlab_rules({"neck.": 0} if detection else {}), {}
    for name in names:
        ours = translate_key(name, find_rule(name, rules))
        if ours in model_state:
            value = model_state[ours]
            found[name] = value[:, :, None, None] if "feat_transform.conv.weight" in name else value
    assert len(found) == len(model_state)
    return found


def official_checkpoint(model_state):
    """What an official file holds, besides the parameters, in the types that MMCV writes."""
    state_dict = official_state_dict(model_state)
    return {
        "meta": {
            "env_info": "sys.platform: linux",
            "config": "model = dict(type='KNet')\n",
            "seed": None,
            "epoch": 12,
            "iter": np.int64(87948),
            "hook_msgs": {"best_score": np.float64(0.34), "PALETTE": np.zeros((2, 3), np.uint8)},
            "CLASSES": ("person", "bicycle"),
            "PALETTE": [(220, 20, 60), (119, 11, 32)],
        },
        "state_dict": state_dict,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
    }
