"""ResNets in torchvision style: plain, dilated with the V1c stem, deformable.

The modules and parameter names are those of Detectron2. This builder adds batch norm in eval mode, the V1c stem,
contracted dilation, and deformable convolution without a compiled extension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from fvcore.nn import weight_init
from torch import nn

from ...errors import ConfigError
from ..layers import EvalBatchNorm2d, resolve_norm
from .deform_conv import DeformConv2d

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class DeepStem(CNNBlockBase):
    """The stem of ResNet-V1c: three 3x3 convolutions, the first with stride 2, then max-pooling."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm="BN"):
        super().__init__(in_channels, out_channels, 4)
        widths = [in_channels, out_channels // 2, out_channels // 2, out_channels]
        for i, stride in enumerate((2, 1, 1)):
            conv = Conv2d(
                widths[i],
                widths[i + 1],
                kernel_size=3,
                stride=stride,
                padding=1,
                bias=False,
                norm=get_norm(norm, widths[i + 1]),
                activation=F.relu_,
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{i + 1}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, C, ceil(H / 4), ceil(W / 4)]."""
        x = self.conv3(self.conv2(self.conv1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


STEMS = {"basic": BasicStem, "deeplab": DeepStem}


class DeformBottleneck(BottleneckBlock):
    """A bottleneck block whose 3x3 convolution is deformable."""

    def __init__(self, *args, deform_modulated: bool = False, deform_num_groups: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        plain = self.conv2
        self.conv2 = DeformConv2d(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,
            stride=plain.stride,
            padding=plain.padding,
            dilation=plain.dilation,
            groups=plain.groups,
            bias=False,
            norm=plain.norm,
            modulated=deform_modulated,
            offset_groups=deform_num_groups,
        )
        self.conv2.weight = plain.weight


def contracted_dilations(num_blocks: int, dilation: int) -> list[int]:
    """Return the dilation of each block of a stage: half of ``dilation`` in the first block, as in MMSegmentation."""
    return [max(dilation // 2, 1)] + [dilation] * (num_blocks - 1)


def _init_last_norm(block: nn.Module) -> None:
    """Set the weight of a block's last norm to 0 if its norms are in eval mode.

    The block is then initially its shortcut. Without this, the activations of a random ResNet grow with each block,
    because norms in eval mode do not normalise. Norms in training mode keep the usual weight 1: with 0 the branches
    would need thousands of iterations to have an effect.
    """
    norm = (block.conv2 if isinstance(block, BasicBlock) else block.conv3).norm
    if isinstance(norm, (EvalBatchNorm2d, FrozenBatchNorm2d)):
        nn.init.zeros_(norm.weight)


def _check_config(cfg: CfgNode) -> None:
    """Raise a ConfigError if MODEL.RESNETS has a value that is not supported."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in BLOCKS_PER_STAGE:
        raise ConfigError(f"MODEL.RESNETS.DEPTH = {resnets.DEPTH}: use one of {sorted(BLOCKS_PER_STAGE)}.")
    if resnets.STEM_TYPE not in STEMS:
        raise ConfigError(f"MODEL.RESNETS.STEM_TYPE = {resnets.STEM_TYPE!r}: use one of {sorted(STEMS)}.")
    for key in ("RES4_DILATION", "RES5_DILATION"):
        if resnets[key] < 1:
            raise ConfigError(f"MODEL.RESNETS.{key} = {resnets[key]}: use at least 1.")
    if len(resnets.DEFORM_ON_PER_STAGE) != 4:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE = {resnets.DEFORM_ON_PER_STAGE}: give four values, for res2 to res5."
        )
    unknown = set(resnets.OUT_FEATURES) - {"stem", "res2", "res3", "res4", "res5"}
    if unknown or not resnets.OUT_FEATURES:
        raise ConfigError(f"MODEL.RESNETS.OUT_FEATURES = {resnets.OUT_FEATURES}: use stem and res2 to res5.")
    if resnets.DEPTH < 50:
        _check_basic_blocks(resnets)


def _check_basic_blocks(resnets: CfgNode) -> None:
    """Raise a ConfigError for options that the basic blocks of ResNet-18 and 34 do not support."""
    if resnets.RES2_OUT_CHANNELS > 64:
        raise ConfigError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS = {resnets.RES2_OUT_CHANNELS} with DEPTH = {resnets.DEPTH}: set 64, or "
            "less for a narrower network."
        )
    required: dict[str, Any] = {"NUM_GROUPS": 1, "RES4_DILATION": 1, "RES5_DILATION": 1}
    required["DEFORM_ON_PER_STAGE"] = [False] * 4
    for key, value in required.items():
        given = list(resnets[key]) if isinstance(value, list) else resnets[key]
        if given != value:
            raise ConfigError(f"MODEL.RESNETS.{key} = {given} with DEPTH = {resnets.DEPTH}: set {value}.")


@BACKBONE_REGISTRY.register()
def build_knet_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet from MODEL.RESNETS; it returns the features MODEL.RESNETS.OUT_FEATURES."""
    _check_config(cfg)
    resnets, norm = cfg.MODEL.RESNETS, resolve_norm(cfg.MODEL.RESNETS.NORM)
    stages, channels = [], resnets.STEM_OUT_CHANNELS
    for i, num_blocks in enumerate(BLOCKS_PER_STAGE[resnets.DEPTH]):
        dilation = (1, 1, resnets.RES4_DILATION, resnets.RES5_DILATION)[i]
        block_class, arguments = BasicBlock, {}
        if resnets.DEPTH >= 50:
            block_class = BottleneckBlock
            arguments = {
                "bottleneck_channels": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**i,
                "num_groups": resnets.NUM_GROUPS,
                "stride_in_1x1": resnets.STRIDE_IN_1X1,
                "dilation_per_block": contracted_dilations(num_blocks, dilation),
            }
        if resnets.DEFORM_ON_PER_STAGE[i]:
            block_class = DeformBottleneck
            arguments |= {
                "deform_modulated": resnets.DEFORM_MODULATED,
                "deform_num_groups": resnets.DEFORM_NUM_GROUPS,
            }
        # A dilated stage has stride 1
        stride_per_block = [1 if i == 0 or dilation > 1 else 2] + [1] * (num_blocks - 1)
        widths = {"in_channels": channels, "out_channels": resnets.RES2_OUT_CHANNELS * 2**i}
        stages.append(
            ResNet.make_stage(
                block_class, num_blocks, stride_per_block=stride_per_block, norm=norm, **widths, **arguments
            )
        )
        channels = widths["out_channels"]
    for block in (block for stage in stages for block in stage):
        _init_last_norm(block)
    stem = STEMS[resnets.STEM_TYPE](input_shape.channels, resnets.STEM_OUT_CHANNELS, norm)
    resnet = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if norm is EvalBatchNorm2d:
        # ResNet.freeze would replace the norms, but norms in eval mode change only through their parameters.
        for module in [resnet.stem, *resnet.stages][:freeze_at]:
            module.requires_grad_(False)
    else:
        resnet.freeze(freeze_at)
    return resnet
