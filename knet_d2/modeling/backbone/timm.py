"""Any network of timm (pytorch-image-models, an optional dependency) as a Detectron2 backbone.

Feature maps are named by stride, as those of Detectron2's ResNets: "res2" has stride 4, "res3" 8, "res4" 16, "res5" 32.
Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from torch import distributed, nn
from torchvision.ops import FrozenBatchNorm2d

from ...data.timm_names import import_timm, pretrained_statement
from ...errors import ConfigError
from ..layers import AppliedNorm, FoldedConv2d
from ..recomputation import FirstComputation
from .fpn import SimpleFeaturePyramid, add_fpn
from .swin import next_multiple

NORMS = ("BN", "SyncBN", "FrozenBN")
logger = logging.getLogger(__name__)


def feature_stride(name: str, key: str) -> int:
    """The stride that the name of a feature map stands for: "res2" -> 4, "res5" -> 32.

    Raises:
        ConfigError: it is no such name; ``key`` is the option that holds it.
    """
    level = name.removeprefix("res")
    if not name.startswith("res") or level not in map(str, range(1, 8)):
        raise ConfigError(f"{key}: {name!r} is no feature map. Use res2 (stride 4), res3 (8), res4 (16), res5 (32).")
    return 2 ** int(level)


class WholeStrideConv2d(FoldedConv2d):
    """A convolution with TensorFlow's padding for maps whose sides are multiples of its stride.

    There the padding is a constant. timm computes it from the size of each map, and torch.export needs minutes to
    follow a chain of such formulas.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]; less than half of the padding is at the top left."""
        sides = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            sides.append((total // 2, total - total // 2))
        return super().forward(F.pad(x, (*sides[1], *sides[0])))


class TimmBackbone(Backbone):
    """A network of timm that returns the last map of each stride that is asked for.

    The parameters have timm's names below ``network``, so that timm's weights need no renaming. Where the network has a
    last norm, the deepest map is normalised by it, as in timm's forward_features; the others are not.
    """

    # Whether layers are frozen that no pretrained weights are named for
    freezes_random_layers = False

    def __init__(self, network: nn.Module, indices: dict[str, int], window: int = 1, patch: int | None = None):
        """
        Args:
            network: a model of timm without classifier, with ``forward_intermediates``.
            indices: name of each feature map -> its index in ``network.feature_info``.
            window: images are padded to multiples of this. It is above 1 where patches tile the image.
            patch: pixels that the network is to see of each window's side; None: all. A ViT with patches of 14 x 14
                pixels sees the image smaller, so that a patch covers 16 x 16 of its pixels.

        Raises:
            ConfigError: the maps of ``network`` have other channels or strides than it states.
        """
        super().__init__()
        self.network: Any = network
        self.window, self.patch = window, patch or window
        indices = dict(sorted(indices.items(), key=lambda item: item[1]))
        stated = [network.feature_info[i] for i in indices.values()]
        self._indices = list(indices.values())
        self._out_features = list(indices)
        self._out_feature_strides = {name: feature_stride(name, "MODEL.TIMM.OUT_FEATURES") for name in indices}
        self._out_feature_channels = {name: info["num_chs"] for name, info in zip(indices, stated)}
        self._first_computation: AbstractContextManager = contextlib.nullcontext()
        self._check_maps()

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this; 0: to none."""
        return self.window if self.window > 1 else 0

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {name: [B, C, ceil(H / stride), ceil(W / stride)]}."""
        height, width = image.shape[-2:]
        if height % self.window or width % self.window:
            size = [next_multiple(length, self.window) for length in (height, width)]
            image = F.pad(image, (0, size[1] - width, 0, size[0] - height))
        if self.patch != self.window:
            size = [length // self.window * self.patch for length in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        with self._first_computation:
            maps = self.network.forward_intermediates(
                image, indices=self._indices, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        features = dict(zip(self._out_features, maps, strict=True))
        if self.window == 1:
            return features
        strides = self._out_feature_strides
        return {
            name: x[..., : -(-height // strides[name]), : -(-width // strides[name])] for name, x in features.items()
        }

    def checkpoint_activations(self) -> None:
        """Let the network keep no activations within its blocks in training, which the backward pass computes again."""
        self.network.set_grad_checkpointing(True)
        self._first_computation = FirstComputation(self.network)

    def _check_maps(self) -> None:
        """Compare channels and strides of all maps with those that timm states, by a forward pass of a small image.

        Parameters that no map depends on are not trained.
        """
        parameters = list(self.network.parameters())
        image = self._small_image()
        height, width = image.shape[-2:]
        was_training = self.training
        with torch.enable_grad():
            maps = self.eval()(image)
            total = sum(x.float().sum() for x in maps.values())
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        self.train(was_training)
        for name, x in maps.items():
            stride = self._out_feature_strides[name]
            stated = (self._out_feature_channels[name], height // stride, width // stride)
            if tuple(x.shape[1:]) != stated:
                raise ConfigError(
                    f"MODEL.TIMM.NAME: {name} of this network has {tuple(x.shape[1:])} channels, rows and columns for "
                    f"an image of {height} x {width}, but timm states {stated}. Use another network."
                )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    def _small_image(self) -> torch.Tensor:
        """Zeros of [1, C, H, W], two by three of the largest stride."""
        unit = 2 * max(*self._out_feature_strides.values(), 16)
        return next(self.network.parameters()).new_zeros(1, self.in_channels, 2 * unit, 3 * unit)

    def fold_frozen_norms(self) -> None:
        """Fold each frozen batch norm into the convolution before it, as far as nothing else reads its result.

        That saves two passes over each map in evaluation, and more in training. The names of all tensors stay.
        """
        parents = {child: (parent, name) for parent in self.modules() for name, child in parent.named_children()}
        for conv, norm in _pairs_to_fold(self, self._small_image()):
            folded = conv if isinstance(conv, FoldedConv2d) else FoldedConv2d.share(conv)
            applied = AppliedNorm(norm)
            folded.include(applied)
            for old, new in ((conv, folded), (norm, applied)):
                parent, name = parents[old]
                parent.add_module(name, new)

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return next(x for x in self.network.parameters() if x.dim() == 4).shape[1]

    @property
    def has_windows(self) -> bool:
        """Whether the network cuts its maps into windows, as Swin transformers do."""
        return any(hasattr(module, "window_size") for module in self.network.modules())

    def parameter_layers(self) -> dict[str, int]:
        """The layer of each parameter, by its name in this module: 0 the stem, then the blocks from 1 on."""
        return {f"network.{name}": layer for name, layer in _layers(self.network, stages=False).items()}

    def undecayed_parameters(self) -> set[str]:
        """Names of the parameters that timm trains without weight decay: tokens, position embeddings, vectors."""
        listed = set(getattr(self.network, "no_weight_decay", set)())
        return {
            f"network.{name}"
            for name, x in self.network.named_parameters()
            if name in listed or (x.dim() <= 1 and not name.endswith(".bias"))
        }

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode; warns once if a training run would keep random layers as they are."""
        if mode and self.freezes_random_layers:
            logger.warning(
                "MODEL.WEIGHTS is empty, so random layers of the backbone are frozen. Name its pretrained weights, or "
                "set MODEL.BACKBONE.FREEZE_AT 0 and MODEL.TIMM.NORM BN."
            )
            self.freezes_random_layers = False
        return super().train(mode)

    def freeze(self, count: int) -> None:
        """Freeze the stem (1), the stem and the first stage (2), and so on; a ViT has a stage in each block.

        Their batch norms keep their statistics, too. The conversion is timm's: others lose activations in its norms.
        """
        from timm.utils import freeze

        frozen = [name for name, stage in _layers(self.network, stages=True).items() if stage < count]
        modules = {name.rpartition(".")[0] for name in frozen}
        for name in frozen:
            self.network.get_parameter(name).requires_grad_(False)
        if modules - {""}:
            freeze(self.network, sorted(modules - {""}))


def _layers(network: Any, stages: bool) -> dict[str, int]:
    """The layer, or the stage, of each parameter.

    Raises:
        ConfigError: timm does not tell it for this network.
    """
    from timm.models import group_parameters

    if not hasattr(network, "group_matcher"):
        raise ConfigError(
            "MODEL.TIMM.NAME: timm does not tell the layers of this network. Set MODEL.BACKBONE.FREEZE_AT 0 and "
            "SOLVER.LAYER_DECAY 1, or use another network."
        )
    return group_parameters(network, network.group_matcher(coarse=stages), reverse=True)


def _pairs_to_fold(network: nn.Module, image: torch.Tensor) -> list[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions whose result only a frozen batch norm reads, each with this norm; found by a forward pass."""
    from timm.layers import FrozenBatchNormAct2d

    frozen = (FrozenBatchNormAct2d, FrozenBatchNorm2d)
    if not any(isinstance(module, frozen) for module in network.modules()):
        return []
    made: list[tuple[nn.Conv2d, torch.Tensor]] = []
    read: list[tuple[nn.Module, torch.Tensor]] = []

    def remember(module: Any, args: tuple[torch.Tensor], result: torch.Tensor) -> None:
        if isinstance(module, frozen):
            read.append((module, args[0]))
        elif type(module) in (nn.Conv2d, WholeStrideConv2d):
            made.append((module, result))

    hooks = [module.register_forward_hook(remember) for module in network.modules()]
    was_training = network.training
    with torch.enable_grad():
        maps = network.eval()(image.requires_grad_())
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    readers = _count_readers(maps.values())
    calls: Counter[nn.Module] = Counter(module for module, _ in (*made, *read))
    return [
        (conv, norm)
        for conv, result in made
        for norm, x in read
        if x is result and readers[result.grad_fn] == 1 and calls[conv] == calls[norm] == 1
    ]


def _count_readers(results: Iterable[torch.Tensor]) -> Counter:
    """How many operations read the result of each operation, by the node of the graph of gradients."""
    nodes = [x.grad_fn for x in results]
    readers = Counter(nodes)
    seen = set(nodes)
    while nodes:
        read = [node for node, _ in nodes.pop().next_functions if node is not None]
        readers.update(read)
        nodes += set(read) - seen
        seen.update(read)
    return readers


def create_network(cfg: CfgNode, channels: int, names: Sequence[str]) -> TimmBackbone:
    """The network of MODEL.TIMM with these feature maps.

    Raises:
        ConfigError: timm is missing, has no such network, or the network can't be a backbone.
    """
    options = cfg.MODEL.TIMM
    timm = import_timm()
    pretrained_statement(options.NAME)
    if options.NORM not in NORMS:
        raise ConfigError(f"MODEL.TIMM.NORM = {options.NORM!r}: use one of {NORMS}.")
    if not 0 <= options.DROP_PATH_RATE < 1:
        raise ConfigError(f"MODEL.TIMM.DROP_PATH_RATE = {options.DROP_PATH_RATE}: use a probability from 0 to below 1.")
    key = f"MODEL.TIMM.NAME = {options.NAME!r}"
    with torch.device("meta"):  # what it is, before memory is taken for it
        outline = timm.create_model(options.NAME, num_classes=0)
    indices = choose_features(outline, names, key)
    try:
        network = timm.create_model(
            options.NAME,
            num_classes=0,
            global_pool="",
            in_chans=channels,
            **_arguments(outline, options.DROP_PATH_RATE),
        )
        last = max(indices.values()) == len(outline.feature_info) - 1
        network.prune_intermediate_layers(list(indices.values()), prune_norm=not (last and hasattr(network, "norm")))
        backbone = TimmBackbone(network, indices, *_window(network, indices))
        _set_norms(backbone, options.NORM)
        backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
        backbone.fold_frozen_norms()
        if options.CHECKPOINT:
            backbone.checkpoint_activations()
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as e:
        if isinstance(e, ConfigError):
            raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ConfigError(f"{key}: it can't be a backbone for images of any size ({reason}). Use another one.") from e
    is_frozen = options.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0
    backbone.freezes_random_layers = is_frozen and not cfg.MODEL.WEIGHTS
    return backbone


def choose_features(network: Any, names: Sequence[str], key: str) -> dict[str, int]:
    """Index in ``network.feature_info`` of each feature map: the last one of its stride.

    Raises:
        ConfigError: the network has no map of a stride; the message begins with ``key``.
    """
    if not names:
        raise ConfigError("MODEL.TIMM.OUT_FEATURES = []: name at least one feature map, as res5 (stride 32).")
    found = {info["reduction"]: i for i, info in enumerate(network.feature_info)}
    if is_plain(network):
        found = {plain_stride(network): len(network.feature_info) - 1}
    chosen = {}
    for name in names:
        stride = feature_stride(name, "MODEL.TIMM.OUT_FEATURES")
        if stride not in found:
            pyramid = "Use build_timm_fpn_backbone, which makes a pyramid of it."
            advice = pyramid if is_plain(network) else "Change MODEL.TIMM.OUT_FEATURES and what reads them."
            raise ConfigError(f"{key}: it has no map of stride {stride} ({name}), but of {sorted(found)}. {advice}")
        chosen[name] = found[stride]
    return chosen


def plain_stride(network: Any) -> int:
    """Stride of a plain ViT's only map: the power of two that is not below the side of a patch."""
    return 2 ** math.ceil(math.log2(network.feature_info[0]["reduction"]))


def _window(network: Any, indices: dict[str, int]) -> tuple[int, int | None]:
    """The arguments ``window`` and ``patch`` of :class:`TimmBackbone`.

    Convolutions with TensorFlow's padding are replaced in ``network``.
    """
    from timm.layers import Conv2dSame

    if is_plain(network):
        return plain_stride(network), network.feature_info[0]["reduction"]
    window = 1
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv2dSame:
                parent.add_module(name, WholeStrideConv2d.share(child))
                window = network.feature_info[max(indices.values())]["reduction"]
    return window, None


def is_plain(network: Any) -> bool:
    """Whether all maps have one stride, as those of a plain ViT."""
    return len({info["reduction"] for info in network.feature_info}) == 1


def _arguments(network: nn.Module, drop_path_rate: float) -> dict[str, Any]:
    """Arguments for images of any size and for drop path, as far as the network's class has them."""
    # Subclasses pass on what they don't name
    known = {name for cls in type(network).__mro__ for name in inspect.signature(cls).parameters}
    arguments: dict[str, Any] = {"strict_img_size": False, "always_partition": True, "drop_path_rate": drop_path_rate}
    if "strict_img_size" not in known:  # where both are there, they exclude each other
        arguments["dynamic_img_size"] = True
    if drop_path_rate and "drop_path_rate" not in known:
        raise ConfigError(f"MODEL.TIMM.DROP_PATH_RATE = {drop_path_rate}: this network has no drop path. Set 0.")
    return {name: value for name, value in arguments.items() if name in known}


def _set_norms(backbone: TimmBackbone, norm: str) -> None:
    """Replace the batch norms by timm's own conversions: Detectron2's and torch's lose the activations in them."""
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "FrozenBN":
        backbone.network = freeze_batch_norm_2d(backbone.network)
    elif norm == "SyncBN" and comm.get_world_size() > 1 and distributed.get_backend() == "nccl":
        backbone.network = convert_sync_batchnorm(backbone.network)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the network of MODEL.TIMM; it returns the features MODEL.TIMM.OUT_FEATURES."""
    return create_network(cfg, input_shape.channels, cfg.MODEL.TIMM.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network of MODEL.TIMM with an FPN (MODEL.FPN); a plain ViT gets a simple feature pyramid."""
    timm = import_timm()
    pretrained_statement(cfg.MODEL.TIMM.NAME)
    with torch.device("meta"):
        outline = timm.create_model(cfg.MODEL.TIMM.NAME, num_classes=0)
    names = cfg.MODEL.FPN.IN_FEATURES
    if not is_plain(outline):
        return add_fpn(cfg, create_network(cfg, input_shape.channels, names))
    strides = [feature_stride(name, "MODEL.FPN.IN_FEATURES") for name in names]
    own = f"res{int(math.log2(plain_stride(outline)))}"
    return SimpleFeaturePyramid(create_network(cfg, input_shape.channels, [own]), strides, cfg.MODEL.FPN.OUT_CHANNELS)
