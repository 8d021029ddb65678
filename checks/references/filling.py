"""Weights that are computed from the names and shapes of the official state dicts, so that no weights are stored.

The outputs of the official implementation were recorded with these weights.
"""

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

# (pattern, factor, addend): all adjustments whose pattern occurs in the name are applied, in this order.
ADJUSTMENTS = [
    (r"\.bn3\.weight$", 0.5, 0.0),
    (r"^rpn_head\.(loc|seg)_convs\.0\.gn\.", 0.05, 0.0),
    (r"^rpn_head\.(init_kernels|conv_seg)\.weight$", 16.0, -0.12),
    (r"^roi_head\..*\.feat_transform\.conv\.weight$", 16.0, 0.0),
    (r"^roi_head\..*\.feat_transform\.conv\.bias$", 1.0, 0.5),
    (r"^roi_head\..*\.fc_mask\.bias$", 1.0, -0.05),
    (r"^roi_head\.mask_head\.2\.fc_mask\.weight$", 0.2, 0.0),
    (r"^roi_head\.mask_head\.2\.fc_mask\.bias$", 0.2, -0.002),
    (r"^decode_head\.kernel_update_head\..*\.fc_mask\.", 0.2, 0.0),
    (r"^decode_head\.kernel_generate_head\.conv_seg\.weight$", 3.0, 0.0),
    (r"\.attention\.attn\.out_proj\.weight$", 0.3, 0.0),
    (r"\.fc_cls\.weight$", 2.0, 0.0),
    (r"\.fc_cls\.bias$", 1.0, -3.0),
]
FIRST_STUFF_CLASS = 80  # of COCO panoptic, in the official class order


def _base_value(name: str, noise: np.ndarray) -> np.ndarray:
    if name.endswith("running_var"):
        return np.exp(0.1 * noise)
    if noise.ndim == 1:
        is_norm_weight = name.endswith("weight")
        return 0.1 * noise + is_norm_weight
    if name.endswith("relative_position_bias_table"):
        return 0.5 * noise
    noise = noise - noise.mean(axis=tuple(range(1, noise.ndim)), keepdims=True)
    value = noise / np.sqrt(np.prod(noise.shape[1:]))
    before_relu = noise.ndim == 4 and re.match(r"(backbone|decode_head|auxiliary_head)\.", name)
    return value * 1.4 if before_relu else value


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return the float32 parameter or running statistic for an official name; a batch counter is int64 0."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    value = _base_value(name, np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))
    for pattern, factor, addend in ADJUSTMENTS:
        if re.search(pattern, name):
            value = value * factor + addend
    if name.endswith(".fc_cls.bias"):
        value[FIRST_STUFF_CLASS:] += 2
    return value.astype(np.float32)


def filled_state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return an official state dict, without the constant index of Swin's bias tables."""
    return {
        name: torch.from_numpy(fill(name, shape))
        for name, shape in shapes.items()
        if not name.endswith("relative_position_index")
    }
