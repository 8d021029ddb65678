"""Masks by a small network of each kernel's own (CondInst, arXiv:2003.05664, Sec. 3.1), beside its 1x1 convolution.

A 1x1 convolution can only weigh the channels of the feature. A network with a hidden layer can also tell apart where,
seen from the object, a channel counts. It is so small that it costs less than the convolution.
"""

import torch
from torch import nn

from .structures import MaskInputs

# Standard deviation of the initial weights that are the same for all kernels, and of those that depend on the kernel
SHARED_STD, KERNEL_STD = 0.3, 0.01
# On a CPU, numbers of hidden channels that are computed at once: they stay in the cache (2 MB in float32)
CHUNK_ELEMENTS = 1 << 19
# Positions, in units of an object's extent, are limited smoothly to this
FARTHEST = 4.0


def limited(positions: torch.Tensor) -> torch.Tensor:
    """Positions relative to an object, near it as they are, far from it about :data:`FARTHEST`; any shape."""
    return FARTHEST * (positions / FARTHEST).tanh()


class MaskNetwork(nn.Module):
    """Two 1x1 convolutions with a ReLU between them, whose weights are a linear function of the kernel.

    It begins to learn from masks of 0, so that masks to which it is added are what they would be without it.
    """

    def __init__(self, dim: int, width: int):
        """
        Args:
            dim: C of the kernels.
            width: number of channels that it reads, beside two for the position, and of its hidden channels.
        """
        super().__init__()
        self.width = width
        # Hidden layer: local channels, horizontal and vertical position, offsets; then the last layer, with one offset
        self.sizes = [width * width, width, width, width, width, 1]
        self.weights = nn.Linear(dim, sum(self.sizes))

    def init_weights(self) -> None:
        """Initial values, whatever a module that contains it does with its matrices."""
        last = self.width + 1
        nn.init.normal_(self.weights.weight, std=KERNEL_STD)
        nn.init.normal_(self.weights.bias, std=SHARED_STD)
        nn.init.zeros_(self.weights.weight[-last:])
        nn.init.zeros_(self.weights.bias[-last:])

    def forward(self, kernels: torch.Tensor, inputs: MaskInputs) -> torch.Tensor:
        """[B, N, C] -> masks of the kernels, [B, N, H, W]."""
        weights = self.weights(kernels)
        if kernels.device.type != "cpu" or torch.compiler.is_compiling():
            return self._masks(weights, inputs.local, inputs.across, inputs.down)
        of_a_kernel = inputs.local.numel()  # as many hidden channels as it reads
        parts = (weights, inputs.across, inputs.down)
        chunks = zip(*(x.split(max(1, CHUNK_ELEMENTS // of_a_kernel), dim=1) for x in parts))
        return torch.cat([self._masks(some, inputs.local, *positions) for some, *positions in chunks], dim=1)

    def _masks(
        self, weights: torch.Tensor, local: torch.Tensor, across: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """Masks of some kernels, [B, n, H, W], by their networks' weights, [B, n, sum of sizes]."""
        of_local, of_across, of_down, offsets, of_hidden, offset = weights.split(self.sizes, dim=-1)
        batch, count, _ = weights.shape
        across = of_across[..., None] * across[:, :, None] + offsets[..., None]
        down = of_down[..., None] * down[:, :, None]
        positions = (across[..., None, :] + down[..., None]).flatten(1, 2).flatten(2)
        of_local = of_local.reshape(batch, count * self.width, self.width)
        hidden = torch.baddbmm(positions, of_local, local.flatten(2)).relu_()
        masks = of_hidden[:, :, None] @ hidden.unflatten(1, (count, self.width))
        return (masks[:, :, 0] + offset).unflatten(2, local.shape[-2:])
