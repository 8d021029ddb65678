"""The models that are compared: K-Nets of any config, and Detectron2's own models (peers)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer as build_peer_optimizer
from detectron2.structures import ImageList
from torch import nn

from ... import KNet
from ...config.files import get_config_file
from ...engine import load_config
from ...engine.optimizer import build_gradient_clipper, build_optimizer
from ...errors import ConfigError
from .workload import make_batch

# Name on the command line -> config of Detectron2's model
PEERS = {
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade_mask_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "panoptic_fpn": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
}
# Name of the backbone of Mask R-CNN without its heads
BACKBONE = "backbone_fpn"


class BackboneOnly(nn.Module):
    """The preprocessing of Detectron2's models and a backbone; returns the feature maps."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.register_buffer("pixel_mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), persistent=False)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [(x["image"].to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return self.backbone(ImageList.from_tensors(images, self.backbone.size_divisibility).tensor)


class Subject(NamedTuple):
    """A model that is measured.

    Attributes:
        name: name on the command line.
        cfg: its config.
        model: a Detectron2 model or BackboneOnly.
    """

    name: str
    cfg: CfgNode
    model: Any  # a Detectron2 model, or BackboneOnly

    @property
    def is_knet(self) -> bool:
        return isinstance(self.model, KNet)

    def inputs(self, size: tuple[int, int], batch: int, output_size: tuple[int, int]) -> list[dict[str, Any]]:
        """Make a batch in the format of this model; see :func:`make_batch`."""
        if self.is_knet:
            num_things = self.model.bank.num_things
            return make_batch(size, batch, output_size, first_stuff_label=num_things, merge_things=False)
        return make_batch(size, batch, output_size, first_stuff_label=1, merge_things=True)

    def optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[Sequence[torch.Tensor]], Any]]:
        """Build the optimiser of the config, and a function that clips the gradients before its steps."""
        if self.is_knet:
            return build_optimizer(self.cfg, self.model), build_gradient_clipper(self.cfg)
        return build_peer_optimizer(self.cfg, self.model), lambda parameters: None

    def compile(self) -> None:
        """Compile the modules whose operations do not depend on values of tensors."""
        for name in ("backbone", "sem_seg_head", "cascade"):
            if hasattr(self.model, name):
                getattr(self.model, name).compile(dynamic=False)


def build_subject(spec: str, device: str) -> Subject:
    """Build a model with random weights.

    Args:
        spec: one of PEERS, BACKBONE, or a config below configs/, then any number of ",KEY=VALUE".

    Raises:
        ConfigError: there is no such model, or an option is wrong.
    """
    name, *options = spec.split(",")
    wrong = [option for option in options if "=" not in option]
    if wrong:
        raise ConfigError(f"--models {spec}: write {wrong[0]!r} as KEY=VALUE.")
    options = [item for option in options for item in option.split("=", 1)]
    torch.manual_seed(0)
    if name in PEERS or name == BACKBONE:
        # Imported here, because Detectron2's main branch imports pkg_resources, which new setuptools lack.
        from detectron2 import model_zoo

        cfg = model_zoo.get_config(PEERS.get(name, PEERS["mask_rcnn"]))
        cfg.merge_from_list([*options, "MODEL.DEVICE", device])
        model = BackboneOnly(cfg).to(device) if name == BACKBONE else build_model(cfg)
    elif name.endswith(".yaml"):
        cfg = load_config(get_config_file(name), ["MODEL.WEIGHTS", "", *options, "MODEL.DEVICE", device])
        model = build_model(cfg)
    else:
        raise ConfigError(f"--models {name}: use {[*PEERS, BACKBONE]} or a config such as coco/instance/<name>.yaml.")
    return Subject(spec, cfg, model)
