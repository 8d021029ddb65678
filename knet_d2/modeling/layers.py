"""Layers and tensor helpers that all parts of the network share: precision, masks, batch norm, fast convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.utils import comm
from torch import distributed, nn

from ..setup.compat import tensor_version

HALF_TYPES = (torch.float16, torch.bfloat16)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# The masks of losses and results have twice the resolution of the head (stride 4 for a head at stride 8)
MASK_SCALE = 2

# ---- precision: sums over thousands of pixels overflow float16, and round too much in bfloat16 -----------------


def full_precision(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32 if it is of a half type; float64 stays float64, None stays None."""
    if x is None or x.dtype not in HALF_TYPES:
        return x
    return x.float()


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A context without autocast on x's device: operations keep the type of their inputs."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a small CPU tensor on a device, for which the CPU does not wait."""
    if device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, norm: str, *, stride: int = 1, dilation: int = 1
) -> Conv2d:
    """A convolution of odd kernel size with normalisation and ReLU; with stride 1 it keeps the size of the map."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(resolve_norm(norm), out_channels),
        activation=F.relu,
    )


def mask_convolution(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution whose result are mask logits: [B, C, H, W] -> [B, N, H, W].

    The signs of mask logits are hard gates, which amplify rounding. On CUDA the convolution is a matrix product, since
    PyTorch computes convolutions in TF32 by default, but matrix products only if the user allows it
    (torch.set_float32_matmul_precision).
    """
    if x.device.type != "cuda":
        return conv(x)
    masks = conv.weight.flatten(1) @ x.flatten(2)
    if conv.bias is not None:
        masks = masks + conv.bias[:, None]
    return masks.unflatten(2, x.shape[-2:])


def upsample_masks(mask_logits: torch.Tensor) -> torch.Tensor:
    """Mask logits at the resolution of losses and results: [B, N, H, W] -> [B, N, 2H, 2W], bilinear."""
    return F.interpolate(mask_logits, scale_factor=MASK_SCALE, mode="bilinear", align_corners=False)


def upsampled_size(mask_logits: torch.Tensor) -> tuple[int, int]:
    """Height and width of :func:`upsample_masks`'s result."""
    return MASK_SCALE * mask_logits.shape[-2], MASK_SCALE * mask_logits.shape[-1]


def sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values at points; outside of the outermost pixel centres those at the border.

    That is F.grid_sample with the padding mode "border", which MPS lacks.

    Args:
        maps: [B, C, H, W].
        points: [B, h, w, 2], (x, y) from 0 to 1.

    Returns:
        [B, C, h, w].
    """
    height, width = maps.shape[-2:]
    x = points[..., 0].clamp(0.5 / width, 1 - 0.5 / width)
    y = points[..., 1].clamp(0.5 / height, 1 - 0.5 / height)
    return F.grid_sample(maps, 2 * torch.stack([x, y], dim=-1) - 1, mode="bilinear", align_corners=False)


# ---- batch norm ------------------------------------------------------------------------------------------------


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always normalises with its running statistics and never changes them.

    Unlike Detectron2's FrozenBatchNorm2d its affine weights are parameters, so they train.
    """

    def __init__(self, num_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.eval()

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        """Stays in eval mode, whatever mode the model is in."""
        return super().train(False)


def sync_batch_norm(num_features: int) -> nn.Module:
    """Batch norm over all processes; plain batch norm where there is only one.

    torch.nn.SyncBatchNorm refuses tensors on a CPU, so it is used with NCCL only. All three kinds have the
    same state dict, so a checkpoint of one loads into the others.
    """
    if comm.get_world_size() == 1:
        return nn.BatchNorm2d(num_features)
    if distributed.get_backend() == "nccl":
        return nn.SyncBatchNorm(num_features)
    return NaiveSyncBatchNorm(num_features)


def resolve_norm(name: str) -> str | Callable[[int], nn.Module]:
    """The ``norm`` argument of Detectron2's layers for a name in a config.

    Adds "EvalBN" to Detectron2's names and makes "SyncBN" work on any number of processes and any device.
    """
    return {"EvalBN": EvalBatchNorm2d, "SyncBN": sync_batch_norm}.get(name, name)


# ---- faster convolutions, with the same results up to rounding -------------------------------------------------


def half_type(x: torch.Tensor) -> torch.dtype | None:
    """The half type in which convolutions of x are computed: its own, or that of autocast; None if there is none."""
    if x.dtype in HALF_TYPES:
        return x.dtype
    device = x.device.type
    if x.dtype != torch.float32 or not torch.amp.is_autocast_available(device):  # autocast leaves float64
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] in the channels_last memory format where it is faster; all feature maps inherit it.

    That is on a CPU, and on CUDA in half precision, whose tensor cores read this format.
    """
    device = images.device.type
    if device == "cpu" or device == "cuda" and half_type(images) is not None:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def is_affine(norm: nn.Module | None) -> bool:
    """Whether a norm is one factor and one offset per channel at present: batch norm in eval mode."""
    if isinstance(norm, BATCH_NORMS):
        return not norm.training and norm.track_running_stats and norm.affine
    return isinstance(norm, FrozenBatchNorm2d)


def folded_weights(conv: Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that includes its affine norm."""
    norm = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias - mean * scale


class FoldedWeights(NamedTuple):
    """Folded weights, and by what it is seen that they are still right.

    Attributes:
        sources: the tensors that they were made of. A reference to each, so that no new tensor gets its id.
        state: of each source when it was read: version, type and device; and the type of the folded weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    sources: list[torch.Tensor]
    state: list[tuple]


class AppliedNorm(FrozenBatchNorm2d):
    """The place of a frozen batch norm that the convolution before it includes: its tensors, and what follows it."""

    def __init__(self, norm: Any):
        """
        Args:
            norm: a frozen batch norm of timm or torchvision, whose tensors are shared.
        """
        super().__init__(len(norm.weight), norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]: the activation alone."""
        return self.act(self.drop(x))


class FoldedConv2d(Conv2d):
    """A convolution that folds its batch norm into its weights in evaluation, which saves a pass over the map.

    The parameters and their names are those of the convolution and its norm; the folded weights are in no state dict.
    They are kept as long as the tensors they were made of stay unchanged; each call of train() or eval() discards them.
    In training it is an ordinary convolution, so that gradients equal the official ones to the last bit. The exception
    is a norm that was given by :meth:`include`: it is folded in training, too.
    """

    _kept: FoldedWeights | None = None

    @classmethod
    def share(cls, conv: nn.Conv2d) -> Self:
        """A folded convolution that shares the parameters and the norm of an existing one, of Detectron2 or PyTorch."""
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
                norm=getattr(conv, "norm", None),
                activation=getattr(conv, "activation", None),
            )
        folded.weight, folded.bias = conv.weight, conv.bias
        return folded.train(conv.training)

    def include(self, norm: AppliedNorm) -> None:
        """Fold a norm that is another module, the one that reads the result of this one."""
        vars(self)["norm"] = norm  # as no submodule: its tensors keep the names of their place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        if not isinstance(self.norm, AppliedNorm) and (self.training or not is_affine(self.norm)):
            return super().forward(x)
        x = F.conv2d(x, *self._folded(x), self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and fold anew when the weights are needed again."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: without the folded weights."""
        return {**self.__dict__, "_kept": None}

    def _folded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The folded weights in the type in which x is convolved, from the last call where nothing has changed."""
        norm, dtype = self.norm, half_type(x)
        tensors = (self.weight, self.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        sources = [t for t in tensors if t is not None]
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or is_traced or any(t.is_inference() for t in sources):
            return folded_weights(self)
        state = [(tensor_version(t), t.dtype, t.device, dtype) for t in sources]
        kept = self._kept
        if kept is None or kept.state != state or any(a is not b for a, b in zip(kept.sources, sources)):
            weight, bias = (t if dtype is None else t.to(dtype) for t in folded_weights(self))
            if x.device.type == "cuda" and dtype is not None:
                weight = weight.contiguous(memory_format=torch.channels_last)
            kept = self._kept = FoldedWeights(weight, bias, sources, state)
        return kept.weight, kept.bias


def use_folded_convolutions(module: nn.Module) -> None:
    """Replace Detectron2's convolutions with batch norm by :class:`FoldedConv2d` layers that share their parameters."""
    folded = {
        conv: FoldedConv2d.share(conv)
        for conv in module.modules()
        if type(conv) is Conv2d and isinstance(conv.norm, (*BATCH_NORMS, FrozenBatchNorm2d))
    }
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in folded:
                parent.add_module(name, folded[child])
        for values in vars(parent).values():
            if isinstance(values, list):  # Detectron2's FPN calls its convolutions through lists
                values[:] = [folded.get(x, x) if isinstance(x, nn.Module) else x for x in values]
