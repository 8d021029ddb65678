"""Group feature assembling and the adaptive kernel update (paper, Sec. 3.2)."""

import torch
from torch import nn


def gather_group_features(mask_weights: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """Sum the feature over every kernel's pixels.

    Args:
        mask_weights: weight of every pixel in every group, [B, N, H, W], same floating type as the feature.
        feature: [B, C, H, W].

    Returns:
        F^K, [B, N, C]: sums, not means (the area is information that the update uses).
    """
    return mask_weights.flatten(2) @ feature.flatten(2).transpose(1, 2)


class AdaptiveKernelUpdate(nn.Module):
    """Mix kernels with their group features through two learned gates (paper, Eq. 4 to 6)."""

    def __init__(self, dim: int):
        """
        Args:
            dim: channels that are updated together. Wider kernels are viewed as consecutive groups of
                this size, which share the weights.
        """
        super().__init__()
        self.dim = dim
        self.feature_proj = nn.Linear(dim, 2 * dim)
        self.kernel_proj = nn.Linear(dim, 2 * dim)
        self.feature_gate = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.kernel_gate = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.feature_norm = nn.LayerNorm(dim)
        self.kernel_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU())

    def forward(self, group_features: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            group_features: F^K, [B, N, C], C a multiple of ``dim``.
            kernels: K_{i-1}, [B, N, C].

        Returns:
            K~, [B, N, C].
        """
        grouped = (*kernels.shape[:-1], kernels.shape[-1] // self.dim, self.dim)
        feature_in, feature_out = self.feature_proj(group_features.reshape(grouped)).chunk(2, dim=-1)
        kernel_in, kernel_out = self.kernel_proj(kernels.reshape(grouped)).chunk(2, dim=-1)
        gate = feature_in * kernel_in
        feature_gate = self.feature_gate(gate).sigmoid()
        kernel_gate = self.kernel_gate(gate).sigmoid()
        mixed = feature_gate * self.feature_norm(feature_out) + kernel_gate * self.kernel_norm(kernel_out)
        return self.out_proj(mixed).reshape(kernels.shape)


class LinearKernelUpdate(nn.Module):
    """The ablation without adaptive update: new kernels are a linear projection of the group features."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.proj = nn.Linear(dim, dim)

    def forward(self, group_features: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Same arguments and result as :meth:`AdaptiveKernelUpdate.forward`; the old kernels are not used."""
        grouped = (*kernels.shape[:-1], kernels.shape[-1] // self.dim, self.dim)
        return self.proj(group_features.reshape(grouped)).reshape(kernels.shape)
