"""Key tables for backbones and FPN: OpenMMLab's releases, pretrained backbones, the Swin release.

``target_prefix`` is the prefix of our keys: "backbone.bottom_up." with an FPN, "backbone." without one.
"""

import re
from collections.abc import Callable, Container

import torch

from .key_table import KeyRule

_WEIGHTS = r"(weight|bias)"


def _norm_rules(pattern: str, target: Callable[[re.Match], str]) -> list[KeyRule]:
    """Return the rules for a batch norm; its batch counter is optional, because a frozen batch norm has none.

    Args:
        pattern: regular expression for the official name of the norm.
        target: function that maps the match of the pattern to our name of the norm.
    """

    def entry(match: re.Match) -> str:
        return f"{target(match)}.{match['entry']}"

    return [
        KeyRule(rf"{pattern}\.(?P<entry>weight|bias|running_mean|running_var)", entry),
        KeyRule(rf"{pattern}\.(?P<entry>num_batches_tracked)", entry, optional=True),
    ]


def resnet_rules(source_prefix: str, target_prefix: str) -> list[KeyRule]:
    """Return the rules for ResNets of torchvision, mmdet and mmseg (also deformable, also with the V1c stem)."""
    source, target = re.escape(source_prefix), target_prefix
    block = source + r"layer([1-4])\.(\d+)"

    def block_name(match: re.Match) -> str:
        return f"{target}res{int(match[1]) + 1}.{match[2]}"

    return [
        KeyRule(source + r"conv1\.weight", target + "stem.conv1.weight"),
        *_norm_rules(source + "bn1", lambda m: f"{target}stem.conv1.norm"),
        KeyRule(source + r"stem\.([036])\.weight", lambda m: f"{target}stem.conv{int(m[1]) // 3 + 1}.weight"),
        *_norm_rules(source + r"stem\.([147])", lambda m: f"{target}stem.conv{int(m[1]) // 3 + 1}.norm"),
        KeyRule(block + r"\.conv([1-3])\.weight", lambda m: f"{block_name(m)}.conv{m[3]}.weight"),
        KeyRule(block + rf"\.conv2\.conv_offset\.{_WEIGHTS}", lambda m: f"{block_name(m)}.conv2.conv_offset.{m[3]}"),
        *_norm_rules(block + r"\.bn([1-3])", lambda m: f"{block_name(m)}.conv{m[3]}.norm"),
        KeyRule(block + r"\.downsample\.0\.weight", lambda m: f"{block_name(m)}.shortcut.weight"),
        *_norm_rules(block + r"\.downsample\.1", lambda m: f"{block_name(m)}.shortcut.norm"),
    ]


def swin_rules(source_prefix: str, target_prefix: str) -> list[KeyRule]:
    """Return the rules for Swin transformers of mmdet and mmseg."""
    source, target = re.escape(source_prefix), target_prefix
    block, ours = source + r"stages\.(\d)\.blocks\.(\d+)", target + r"stages.\1.blocks.\2"
    return [
        KeyRule(source + rf"patch_embed\.(projection|norm)\.{_WEIGHTS}", target + r"patch_embed.\1.\2"),
        KeyRule(block + rf"\.(norm[12])\.{_WEIGHTS}", ours + r".\3.\4"),
        KeyRule(block + rf"\.attn\.w_msa\.(qkv|proj)\.{_WEIGHTS}", ours + r".attention.\3.\4"),
        KeyRule(
            block + r"\.attn\.w_msa\.relative_position_bias_table", ours + ".attention.relative_position_bias_table"
        ),
        KeyRule(block + r"\.attn\.w_msa\.relative_position_index", None),
        KeyRule(block + rf"\.ffn\.layers\.0\.0\.{_WEIGHTS}", ours + r".mlp.0.\3"),
        KeyRule(block + rf"\.ffn\.layers\.1\.{_WEIGHTS}", ours + r".mlp.2.\3"),
        KeyRule(
            source + r"stages\.(\d)\.downsample\.(norm|reduction)\.(weight|bias)",
            lambda m: f"{target}stages.{int(m[1]) + 1}.merging.{m[2]}.{m[3]}",
        ),
        KeyRule(source + rf"norm([0-3])\.{_WEIGHTS}", lambda m: f"{target}out_norms.res{int(m[1]) + 2}.{m[2]}"),
    ]


def merging_from_swin_release(tensor: torch.Tensor) -> torch.Tensor:
    """Convert the norm or reduction of a patch merging from the Swin release's order of inputs to ours.

    The release concatenates the channels of the neighbours (y, x) = (0, 0), (1, 0), (0, 1), (1, 1). Our order groups
    the four neighbours of each channel, in row-major order.

    Args:
        tensor: weight or bias, [4 C] or [2 C, 4 C].
    """
    by_x_y_channel = tensor.unflatten(-1, (2, 2, -1))
    return by_x_y_channel.transpose(-1, -3).flatten(-3)  # by channel, y, x


def swin_release_rules(target_prefix: str) -> list[KeyRule]:
    """Return the rules for the classifiers of the Swin release, which have no norms of the outputs."""
    target = target_prefix
    block, ours = r"layers\.(\d)\.blocks\.(\d+)", target + r"stages.\1.blocks.\2"
    return [
        KeyRule(rf"patch_embed\.proj\.{_WEIGHTS}", target + r"patch_embed.projection.\1"),
        KeyRule(rf"patch_embed\.norm\.{_WEIGHTS}", target + r"patch_embed.norm.\1"),
        KeyRule(block + rf"\.(norm[12])\.{_WEIGHTS}", ours + r".\3.\4"),
        KeyRule(block + rf"\.attn\.(qkv|proj)\.{_WEIGHTS}", ours + r".attention.\3.\4"),
        KeyRule(block + r"\.attn\.relative_position_bias_table", ours + ".attention.relative_position_bias_table"),
        KeyRule(block + r"\.(attn\.relative_position_index|attn_mask)", None),
        KeyRule(block + rf"\.mlp\.fc1\.{_WEIGHTS}", ours + r".mlp.0.\3"),
        KeyRule(block + rf"\.mlp\.fc2\.{_WEIGHTS}", ours + r".mlp.2.\3"),
        KeyRule(
            r"layers\.(\d)\.downsample\.(norm|reduction)\.(weight|bias)",
            lambda m: f"{target}stages.{int(m[1]) + 1}.merging.{m[2]}.{m[3]}",
            merging_from_swin_release,
        ),
        KeyRule(rf"(norm|head)\.{_WEIGHTS}", None),
    ]


def openmmlab_backbone_rules(target_prefix: str) -> list[KeyRule]:
    """Return the rules for the keys "backbone.*" of an official K-Net with any backbone."""
    return resnet_rules("backbone.", target_prefix) + swin_rules("backbone.", target_prefix)


def openmmlab_neck_rules() -> list[KeyRule]:
    """Return the rules for the keys "neck.*" of an official K-Net: an FPN on res2 .. res5."""
    return [
        KeyRule(
            rf"neck\.(lateral|fpn)_convs\.([0-3])\.conv\.{_WEIGHTS}",
            lambda m: f"backbone.fpn_{'lateral' if m[1] == 'lateral' else 'output'}{int(m[2]) + 2}.{m[3]}",
        )
    ]


def pretrained_backbone_rules(keys: Container[str], target_prefix: str) -> tuple[str, list[KeyRule]] | None:
    """Return the layout's name, for people, and the rules for a pretrained backbone without a K-Net.

    The layout is detected by its keys; None for an unknown one.
    """
    if "patch_embed.proj.weight" in keys:
        return "Swin release", swin_release_rules(target_prefix)
    if "layer1.0.conv1.weight" in keys:
        rules = resnet_rules("", target_prefix) + [KeyRule(rf"fc\.{_WEIGHTS}", None)]
        return "ResNet of torchvision or OpenMMLab", rules  # OpenMMLab's: V1c, without a prefix
    return None
