"""One stage of the cascade: gather, update, interact, classify, segment (paper, Sec. 3.2 and Fig. 3)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .kernel_update import AdaptiveKernelUpdate, LinearKernelUpdate, gather_group_features
from .structures import StageOutput

# Prior probability of a class at initialisation, as in the focal loss paper
PRIOR_PROBABILITY = 0.01


class KernelInteraction(nn.Module):
    """Self-attention between the kernels of an image, then a feed-forward network, each with a residual and LN."""

    def __init__(self, dim: int, *, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, kernels: torch.Tensor) -> torch.Tensor:
        """kernels: [B, N, C] -> [B, N, C]; equivariant to permutations of the kernels."""
        B, N, C = kernels.shape
        qkv = self.in_proj(kernels).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = self.out_proj(attended.transpose(1, 2).reshape(B, N, C))
        kernels = self.attention_norm(kernels + attended)
        return self.ffn_norm(kernels + self.ffn(kernels))


def _linear_norm_relu(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())


class KernelUpdateHead(nn.Module):
    """f_i: (K_{i-1}, M_{i-1}, F) -> (K_i, M_i, class logits).

    The stage's 1x1 transform of the feature, F' = W F + b, is never computed on the map: a sum over F' is
    W (sum over F) + b * area, and a kernel k convolved with F' is (W^T k) convolved with F plus k . b.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int | None,
        soft_gather: bool,
        update_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        kernel_update: bool = True,
        kernel_interaction: bool = True,
        xavier_init: bool = True,
    ):
        """
        Args:
            dim: C.
            num_classes: K; None leaves the class branch out (semantic segmentation).
            soft_gather: assemble group features by a softmax over kernels instead of hard masks.
            update_dim: channels that the adaptive update works on; divides ``dim``.
            num_heads, ffn_dim: attention heads and hidden width of the feed-forward network.
            kernel_update, kernel_interaction: False for the paper's ablations (Tab. 4a).
            xavier_init: initialise all matrices as the detection release does; else PyTorch's default.
        """
        super().__init__()
        self.soft_gather = soft_gather
        self.feature_transform = nn.Linear(dim, dim)
        self.kernel_update = AdaptiveKernelUpdate(update_dim) if kernel_update else LinearKernelUpdate(update_dim)
        self.interaction = (
            KernelInteraction(dim, num_heads=num_heads, ffn_dim=ffn_dim) if kernel_interaction else nn.Identity()
        )
        self.class_branch = None
        if num_classes is not None:
            self.class_branch = nn.Sequential(*_linear_norm_relu(dim), nn.Linear(dim, num_classes))
        self.mask_branch = nn.Sequential(*_linear_norm_relu(dim), nn.Linear(dim, dim))
        self._init_weights(xavier_init)

    def _init_weights(self, xavier_init: bool) -> None:
        if xavier_init:
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        else:
            nn.init.kaiming_normal_(self.feature_transform.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(self.interaction, KernelInteraction):
                nn.init.xavier_uniform_(self.interaction.in_proj.weight)
        nn.init.zeros_(self.feature_transform.bias)
        if isinstance(self.interaction, KernelInteraction):
            nn.init.zeros_(self.interaction.in_proj.bias)
            nn.init.zeros_(self.interaction.out_proj.bias)
        if self.class_branch is not None:
            nn.init.constant_(self.class_branch[-1].bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(self, feature: torch.Tensor, kernels: torch.Tensor, mask_logits: torch.Tensor) -> StageOutput:
        """
        Args:
            feature: F, [B, C, H, W].
            kernels: K_{i-1}, [B, N, C].
            mask_logits: M_{i-1}, [B, N, h, w]; resized bilinearly to H x W where the sizes differ.
        """
        group_features = self._assemble(feature, mask_logits)
        kernels = self.interaction(self.kernel_update(group_features, kernels))
        class_logits = None if self.class_branch is None else self.class_branch(kernels)
        return StageOutput(kernels, self._segment(feature, kernels), class_logits)

    def _assemble(self, feature: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        """Group features of the transformed feature F': [B, N, C]."""
        if mask_logits.shape[-2:] != feature.shape[-2:]:
            mask_logits = F.interpolate(mask_logits, feature.shape[-2:], mode="bilinear", align_corners=False)
        if self.soft_gather:
            weights = mask_logits.softmax(dim=1)
        else:
            # sigmoid(x) > 0.5, as a constant: no gradient passes through the hard masks
            weights = (mask_logits > 0).to(feature.dtype)
        sums = gather_group_features(weights, feature)
        areas = weights.sum(dim=(2, 3)).unsqueeze(-1)
        return F.linear(sums, self.feature_transform.weight) + self.feature_transform.bias * areas

    def _segment(self, feature: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Masks of the dynamic kernels on the transformed feature: [B, N, H, W]."""
        dynamic_kernels = self.mask_branch(kernels)
        folded = dynamic_kernels @ self.feature_transform.weight
        offset = dynamic_kernels @ self.feature_transform.bias
        masks = torch.baddbmm(offset.unsqueeze(-1), folded, feature.flatten(2))
        return masks.unflatten(2, feature.shape[-2:])
