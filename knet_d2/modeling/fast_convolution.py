"""What makes convolutions faster and changes no result beyond rounding."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] with the channels next to each other in memory on a CPU, where that is faster; all maps follow."""
    if images.device.type != "cpu":
        return images
    return images.contiguous(memory_format=torch.channels_last)


def is_affine(norm: nn.Module | None) -> bool:
    """Whether a norm now is one factor and one offset per channel: batch norm in eval mode."""
    if isinstance(norm, _BatchNorm):
        return not norm.training and norm.track_running_stats and norm.affine
    return isinstance(norm, FrozenBatchNorm2d)


def folded_weights(conv: Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that includes its affine norm."""
    norm = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias - mean * scale


class FoldedConv2d(Conv2d):
    """A convolution that in evaluation applies its batch norm through its weights, so that no map goes through it.

    Parameters and their names are those of the convolution and its norm, and nothing is kept that could go stale. In
    training it is the convolution as before: its gradients are the official ones to the last bits.
    """

    @classmethod
    def share(cls, conv: Conv2d) -> "FoldedConv2d":
        """One with the parameters, the norm and all settings of an existing convolution."""
        with torch.device("meta"):
            folded = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                bias=conv.bias is not None,
                norm=conv.norm,
                activation=conv.activation,
            )
        folded.weight, folded.bias = conv.weight, conv.bias
        return folded.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        if self.training or not is_affine(self.norm):
            return super().forward(x)
        x = F.conv2d(x, *folded_weights(self), self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_norms(module: nn.Module) -> None:
    """Put a :class:`FoldedConv2d` in place of each of Detectron2's convolutions with batch norm; parameters stay."""
    folded = {
        conv: FoldedConv2d.share(conv)
        for conv in module.modules()
        if type(conv) is Conv2d and isinstance(conv.norm, (_BatchNorm, FrozenBatchNorm2d))
    }
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in folded:
                parent.add_module(name, folded[child])
        for values in vars(parent).values():
            if isinstance(values, list):  # Detectron2's FPN calls its convolutions through lists
                values[:] = [folded.get(x, x) if isinstance(x, nn.Module) else x for x in values]
