"""Key tables for weights of a backbone of timm: timm's own names, and the EfficientNet-Lite files of the registry.

``target_prefix`` is what the names of timm's network begin with in the model, as "backbone.bottom_up.network.".
"""

import re
from collections.abc import Container

from .key_table import KeyRule

# Number of blocks in a file -> number of blocks of each of timm's stages
_LITE_STAGES = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}
_LITE_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_rules(target_prefix: str) -> list[KeyRule]:
    """Return the rules for a file with timm's own names; frozen batch norms have no batch counter."""
    return [
        KeyRule(r".+\.num_batches_tracked", lambda m: target_prefix + m[0], optional=True),
        KeyRule(r".+", lambda m: target_prefix + m[0]),
    ]


def efficientnet_lite_rules(keys: Container[str], target_prefix: str) -> list[KeyRule]:
    """Return the rules for an EfficientNet-Lite whose blocks are numbered through; timm groups them by stages."""
    count = next(i for i in range(100) if f"_blocks.{i}._depthwise_conv.weight" not in keys)
    stages = _LITE_STAGES.get(count, ())
    places = [(stage, i) for stage, length in enumerate(stages) for i in range(length)]

    def name(match: re.Match) -> str:
        if match["block"] is None:
            return f"{target_prefix}{_LITE_STEM[match['layer']]}.{match['entry']}"
        number = int(match["block"])
        layers = _OTHER_BLOCKS if number else _FIRST_BLOCK
        stage, i = places[number]
        return f"{target_prefix}blocks.{stage}.{i}.{layers[match['layer']]}.{match['entry']}"

    if not places:
        return []
    layer = r"(?:_blocks\.(?P<block>\d+)\.)?(?P<layer>_[a-z]+(?:_[a-z]+)?\d?)\.(?P<entry>{})"
    return [
        KeyRule(r"_(?:fc|conv_head|bn1)\..+", None),
        KeyRule(layer.format("num_batches_tracked"), name, optional=True),
        KeyRule(layer.format("weight|bias|running_mean|running_var"), name),
    ]
