"""The published K-Nets, used as ``detectron2.model_zoo``: configs, official checkpoints, ready models.

A model is named by the path of its config below ``configs``, as "coco/panoptic/knet_r50_fpn_3x" (".yaml" may follow).
In MODEL.WEIGHTS, ``knet://<name>`` is its official checkpoint.
"""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import Checkpointer
from .checkpoint.download import PREFIX
from .checkpoint.zoo import zoo_entries, zoo_entry
from .config import files as paths
from .config.merging import load_config

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "names"]


def names() -> list[str]:
    """The names of all models."""
    return list(zoo_entries())


def get_config_file(name: str) -> str:
    """Full path of a model's config file."""
    return paths.get_config_file(zoo_entry(name).name + ".yaml")


def get_config(name: str, trained: bool = False) -> CfgNode:
    """A model's config, on a device that is there.

    Args:
        trained: MODEL.WEIGHTS is the official checkpoint, instead of the pretrained backbone to train from.
    """
    opts = ["MODEL.WEIGHTS", PREFIX + zoo_entry(name).name] if trained else []
    return load_config(get_config_file(name), opts)


def get_checkpoint_url(name: str) -> str | None:
    """Address of a model's official checkpoint; None where none was published."""
    return zoo_entry(name).url


def get(name: str, trained: bool = True, device: str | None = None) -> nn.Module:
    """A model in evaluation mode.

    Args:
        trained: load the official checkpoint (downloaded on first use); else the weights are random.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg).eval()
    if trained:
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
