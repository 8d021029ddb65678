"""The cascade of kernel update heads (paper, Sec. 3.2 and Fig. 3): gather, update, interact, classify, segment.

A stage f_i takes the kernels K_{i-1}, their masks M_{i-1} and the feature F to K_i, M_i and class logits (Eq. 2).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import nn

from ..errors import ConfigError
from ..tasks import get_task
from .layers import full_precision, no_autocast
from .mask_network import MaskNetwork
from .structures import KernelState, MaskInputs, NetworkOutput, Places, StageOutput

# The paper tries up to 7; a typing error must not fill the memory
MOST_STAGES = 100
# Prior probability of a class at initialisation, as in the focal loss paper
PRIOR_PROBABILITY = 0.01


def gather_group_features(mask_weights: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """Sum the feature over every kernel's pixels: group feature assembling (paper, Eq. 3).

    Args:
        mask_weights: weight of every pixel in every group, [B, N, H, W], same floating type as the feature.
        feature: [B, C, H, W].

    Returns:
        F^K, [B, N, C]: sums, not means (the area is information that the update uses).
    """
    return mask_weights.flatten(2) @ feature.flatten(2).transpose(1, 2)


def mean_under_masks(mask_logits: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """Mean of a feature [B, C, H, W] over the pixels of each mask, [B, N, H, W] -> [B, N, C]; 0 for an empty mask."""
    with no_autocast(mask_logits):
        masks = (mask_logits > 0).to(mask_logits.dtype)
        sums = gather_group_features(masks, full_precision(feature))
        return sums / masks.sum(dim=(2, 3)).clamp(min=1).unsqueeze(-1)


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

    def forward(
        self, kernels: torch.Tensor, others: torch.Tensor | None = None, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """kernels: [B, N, C] -> [B, N, C]; equivariant to permutations of the kernels.

        Args:
            others: [B, N, C], the kernels that are attended to instead of ``kernels``.
            visible: bool [B, N, N], which of them (last axis) each kernel sees, one at least; None: all.
        """
        B, N, C = kernels.shape
        qkv = self.in_proj(kernels)
        if others is not None:
            qkv = torch.cat([qkv[..., :C], self.in_proj(others)[..., C:]], dim=-1)
        qkv = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mask = None if visible is None else visible[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        attended = self.out_proj(attended.transpose(1, 2).reshape(B, N, C))
        kernels = self.attention_norm(kernels + attended)
        return self.ffn_norm(kernels + self.ffn(kernels))


class NoInteraction(nn.Module):
    """The ablation without interaction: kernels do not see each other."""

    def forward(
        self, kernels: torch.Tensor, others: torch.Tensor | None = None, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :meth:`KernelInteraction.forward`."""
        return kernels


def _linear_norm_relu(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())


class PooledClasses(nn.Module):
    """Class logits from the mean of the pyramid's feature under each kernel's mask: mask pooling (arXiv:2303.04803).

    The layers between the pyramid and F begin at random, and F tells the classes of objects only after many iterations.
    The features of a pretrained backbone tell them from the first.
    """

    def __init__(self, channels: int, num_classes: int):
        """
        Args:
            channels: C' of the pyramid's feature.
            num_classes: K.
        """
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def init_weights(self) -> None:
        """Begin with logits of 0, so that the prior of the class branch stands."""
        nn.init.zeros_(self.classifier.weight)

    def forward(self, mask_logits: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """[B, N, H, W] and [B, C', H, W] -> [B, N, K]."""
        return self.classifier(self.norm(mean_under_masks(mask_logits, feature)))


def pooled_level(cfg, input_shape: dict[str, ShapeSpec]) -> str | None:
    """Name of the feature that :class:`PooledClasses` read: that of the stride of F; None if the config has none.

    Raises:
        ConfigError: the static kernels read no such feature, or the task has no class branch.
    """
    if not cfg.MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES:
        return None
    task, head = get_task(cfg), cfg.MODEL.SEM_SEG_HEAD
    if not task.has_class_branch:
        raise ConfigError(f"MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES: use False for {task.name} segmentation.")
    for name in head.IN_FEATURES:
        if input_shape[name].stride == head.COMMON_STRIDE:
            return name
    raise ConfigError(
        f"MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES needs a feature of stride {head.COMMON_STRIDE} "
        "(MODEL.SEM_SEG_HEAD.COMMON_STRIDE) in MODEL.SEM_SEG_HEAD.IN_FEATURES."
    )


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
        residual_masks: bool = False,
        network_width: int = 0,
        pooled_channels: int = 0,
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
            residual_masks: M_i = M_{i-1} + K_i * F instead of K_i * F. The stage begins to learn from M_i = M_{i-1}.
            network_width: see :class:`.mask_network.MaskNetwork`; 0: masks are those of the 1x1 convolution alone.
            pooled_channels: see :class:`PooledClasses`; 0: the class branch alone predicts classes.
            xavier_init: initialise all matrices as the detection release does; else PyTorch's default.
        """
        super().__init__()
        self.soft_gather = soft_gather
        self.residual_masks = residual_masks
        self.feature_transform = nn.Linear(dim, dim)
        self.kernel_update = AdaptiveKernelUpdate(update_dim) if kernel_update else LinearKernelUpdate(update_dim)
        self.interaction = (
            KernelInteraction(dim, num_heads=num_heads, ffn_dim=ffn_dim) if kernel_interaction else NoInteraction()
        )
        self.class_branch = self.pooled_classes = None
        if num_classes is not None:
            self.class_branch = nn.Sequential(*_linear_norm_relu(dim), nn.Linear(dim, num_classes))
        self.mask_branch = nn.Sequential(*_linear_norm_relu(dim), nn.Linear(dim, dim))
        self.mask_network = MaskNetwork(dim, network_width) if network_width else None
        if num_classes is not None and pooled_channels:
            self.pooled_classes = PooledClasses(pooled_channels, num_classes)
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
        if self.residual_masks:
            nn.init.zeros_(self.mask_branch[-1].weight)
            nn.init.zeros_(self.mask_branch[-1].bias)
        if self.mask_network is not None:
            self.mask_network.init_weights()
        if self.pooled_classes is not None:
            self.pooled_classes.init_weights()
        if self.class_branch is not None:
            nn.init.constant_(self.class_branch[-1].bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(
        self,
        feature: torch.Tensor,
        kernels: torch.Tensor,
        mask_logits: torch.Tensor,
        visible: torch.Tensor | None = None,
        mask_inputs: MaskInputs | None = None,
        pyramid_feature: torch.Tensor | None = None,
    ) -> StageOutput:
        """
        Args:
            feature: F, [B, C, H, W].
            kernels: K_{i-1}, [B, N, C].
            mask_logits: M_{i-1}, [B, N, H, W].
            visible: see :meth:`KernelInteraction.forward`.
            mask_inputs: of the first kernels' own networks.
            pyramid_feature: [B, C', H, W], see :class:`PooledClasses`.
        """
        group_features = self.gather(feature, mask_logits)
        kernels = self.interaction(self.kernel_update(group_features, kernels), visible=visible)
        class_logits = None if self.class_branch is None else self.class_branch(kernels)
        masks = self._segment(feature, kernels)
        if self.mask_network is not None and mask_inputs is not None:
            count = mask_inputs.across.shape[1]
            more = self.mask_network(kernels[:, :count], mask_inputs)
            masks = masks + F.pad(more, (0, 0, 0, 0, 0, masks.shape[1] - count))
        masks = mask_logits + masks if self.residual_masks else masks
        if self.pooled_classes is not None:
            class_logits = class_logits + self.pooled_classes(masks, pyramid_feature)
        return StageOutput(kernels, masks, class_logits)

    def gather(self, feature: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        """Group features of the transformed feature F': [B, N, C]."""
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


class KernelUpdateCascade(nn.Module):
    """S kernel update heads, each refining the kernels and masks of the one before.

    It runs in float32 (or float64) also under autocast: it sums over pixels, and costs little.
    """

    @configurable
    def __init__(self, *, num_stages: int, **head_arguments):
        """
        Args:
            num_stages: S.
            head_arguments: arguments of every :class:`KernelUpdateHead`.
        """
        super().__init__()
        self.stages = nn.ModuleList(KernelUpdateHead(**head_arguments) for _ in range(num_stages))

    @property
    def corrects_masks(self) -> bool:
        """Whether the last kernels only correct the masks of the stage before; those of all objects are then alike."""
        return any(stage.residual_masks for stage in self.stages)

    @classmethod
    def from_config(cls, cfg, num_classes: int, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        knet, head = cfg.MODEL.KNET, cfg.MODEL.KNET.UPDATE_HEAD
        dim = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        for key, value in (("FEATURE_DIM", head.FEATURE_DIM), ("NUM_HEADS", head.NUM_HEADS)):
            if value < 1 or dim % value:
                raise ConfigError(
                    f"MODEL.KNET.UPDATE_HEAD.{key} = {value} does not divide MODEL.SEM_SEG_HEAD.CONVS_DIM = {dim}."
                )
        if head.INIT not in ("xavier", "default"):
            raise ConfigError(f"MODEL.KNET.UPDATE_HEAD.INIT = {head.INIT!r}: use 'xavier' or 'default'.")
        task = get_task(cfg)
        if not task.min_stages <= knet.NUM_STAGES <= MOST_STAGES:
            raise ConfigError(
                f"MODEL.KNET.NUM_STAGES = {knet.NUM_STAGES}: use {task.min_stages} to {MOST_STAGES} for {task.name} "
                "segmentation."
            )
        level = pooled_level(cfg, input_shape)
        return {
            "num_stages": knet.NUM_STAGES,
            "dim": dim,
            "num_classes": num_classes if task.has_class_branch else None,
            "soft_gather": task.soft_gather,
            "update_dim": head.FEATURE_DIM,
            "num_heads": head.NUM_HEADS,
            "ffn_dim": head.FFN_DIM,
            "kernel_update": head.KERNEL_UPDATE,
            "kernel_interaction": head.KERNEL_INTERACTION,
            "residual_masks": head.RESIDUAL_MASKS,
            "network_width": knet.MASK_NETWORK_WIDTH,
            "pooled_channels": input_shape[level].channels if level else 0,
            "xavier_init": head.INIT == "xavier",
        }

    def forward(
        self,
        state: KernelState,
        fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        visible: torch.Tensor | None = None,
    ) -> list[StageOutput]:
        """The predictions of all stages, in order.

        Args:
            fuse: (group features of the last stage, its kernels), [B, N, C] each -> the kernels to use instead; see
                :mod:`.association`.
            visible: bool [B, N, N], which kernels (last axis) each kernel sees in the interaction; None: all.
        """
        with no_autocast(state.feature):
            feature, pyramid_feature = full_precision(state.feature), full_precision(state.pyramid_feature)
            kernels, mask_logits = full_precision(state.kernels), full_precision(state.mask_logits)
            outputs = []
            for stage in self.stages:
                if fuse is not None and stage is self.stages[-1]:
                    kernels = fuse(stage.gather(feature, mask_logits), kernels)  # type: ignore[operator]
                output = stage(
                    feature,
                    kernels,
                    mask_logits,
                    visible=visible,
                    mask_inputs=state.mask_inputs,
                    pyramid_feature=pyramid_feature,
                )
                outputs.append(with_class_offsets(output, state.places))
                kernels, mask_logits = outputs[-1].kernels, outputs[-1].mask_logits
        return outputs


def with_class_offsets(output: StageOutput, places: Places | None) -> StageOutput:
    """A stage's output with the offsets of the first kernels' classes, where these kernels have places."""
    if places is None or output.class_logits is None:
        return output
    others = output.class_logits.shape[1] - places.class_offsets.shape[1]
    offsets = F.pad(places.class_offsets, (0, others)).unsqueeze(-1)
    return output._replace(class_logits=output.class_logits + offsets)


def select_stage(output: NetworkOutput, stage: int) -> StageOutput:
    """Predictions of one stage: 0 are the static kernels, 1 to S the update stages, -1 is the last one."""
    number = stage % (len(output.stages) + 1)  # -1 becomes S
    return output.stages[number - 1] if number else static_predictions(output.state)


def static_predictions(state: KernelState) -> StageOutput:
    """The static kernels as if they were a stage's output, to look at results from before the first update.

    Static kernels have no class branch. The class probability of a kernel is the mean of the dense semantic
    probabilities over its mask. Kernels that each stand for a class need no score.
    """
    kernels, mask_logits = full_precision(state.kernels), full_precision(state.mask_logits)
    if state.semantic_logits is None:
        return StageOutput(kernels, mask_logits)
    probs = mean_under_masks(mask_logits, full_precision(state.semantic_logits).sigmoid())
    return StageOutput(kernels, mask_logits, torch.logit(probs, eps=1e-6))
