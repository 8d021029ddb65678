"""Deformable convolution without a compiled extension."""

import torch
from detectron2.layers import Conv2d
from torch import nn
from torchvision.ops import deform_conv2d

from ..layers import full_precision, no_autocast


class DeformConv2d(Conv2d):
    """A deformable convolution (v1, or v2 if modulated) that predicts its own offsets.

    It can replace a :class:`detectron2.layers.Conv2d`: it maps one tensor to one tensor, and applies ``norm`` and
    ``activation``. The offsets are initialised with 0, so it is initially an ordinary convolution (times 1/2 if
    modulated).
    """

    def __init__(self, *args, modulated: bool = False, offset_groups: int = 1, **kwargs):
        """
        Args:
            modulated: also predict a factor in (0, 1) for every sampled value.
            offset_groups: number of groups of input channels; each group has its own offsets.
            args, kwargs: arguments of :class:`detectron2.layers.Conv2d`.
        """
        super().__init__(*args, **kwargs)
        self.modulated = modulated
        values_per_point = 3 if modulated else 2
        self.conv_offset = nn.Conv2d(
            self.in_channels,
            offset_groups * values_per_point * self.kernel_size[0] * self.kernel_size[1],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            num_masks = offset.shape[1] // 3
            offset, mask = offset.split([2 * num_masks, num_masks], dim=1)
            mask = mask.sigmoid()
        x = self._sample(x, offset, mask).to(offset.dtype)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _sample(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute the deformable convolution in float32 or float64, because some devices lack half precision for it."""
        x, offset, weight, bias, mask = map(full_precision, (x, offset, self.weight, self.bias, mask))
        with no_autocast(x):
            return deform_conv2d(x, offset, weight, bias, self.stride, self.padding, self.dilation, mask=mask)
