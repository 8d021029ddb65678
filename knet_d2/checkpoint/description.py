"""What a weights file says about its model, so that the file alone is enough to use it.

The description is a mapping of strings, as safetensors has room for: "config" (YAML: what differs from the defaults),
"classes" (JSON: COCO's categories, in the order of the model's classes) and "knet_d2_version".
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode, get_cfg

from ..config.options import add_knet_config
from ..data.classes import ClassTable, categories, class_table, from_categories
from ..errors import CheckpointError

# Places on the machine that wrote the file, and data that the reader need not have.
_LEFT_OUT = ("OUTPUT_DIR", "DATASETS", "MODEL.WEIGHTS", "MODEL.DEVICE")
# What a reader takes over; the rest tells how the model was trained.
_MODEL_SECTIONS = ("MODEL", "INPUT", "TEST")


class ModelDescription(NamedTuple):
    """A model's config, without data sets, weights and device, and its classes."""

    cfg: CfgNode
    classes: ClassTable


def describe_model(cfg: CfgNode, classes: ClassTable | None = None) -> dict[str, str]:
    """The description of a model of ``cfg``, with its classes resolved; None: as the data sets of ``cfg`` name them."""
    from .. import __version__  # the package imports this module first

    return {
        "config": yaml.safe_dump(_differences(cfg, _default_config())),
        "classes": json.dumps(categories(class_table(cfg) if classes is None else classes)),
        "knet_d2_version": __version__,
    }


def has_description(content: Any) -> bool:
    """Whether what :func:`load_file` gave describes its model."""
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and {"config", "classes"} <= set(metadata)


def read_description(content: Any, path: str) -> ModelDescription:
    """The model that a weights file describes.

    Args:
        content: what :func:`load_file` gave.
        path: the file's name, for messages.

    Raises:
        CheckpointError: there is no description, or one that this version does not understand.
    """
    if not has_description(content):
        raise CheckpointError(
            f"{path}: holds weights only, no config and classes. Name the config that they were trained with "
            "(config_file; --config-file on the command line)."
        )
    metadata, cfg = content["metadata"], _default_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    try:
        config = yaml.safe_load(metadata["config"])
        cfg.merge_from_other_cfg(CfgNode({key: config[key] for key in _MODEL_SECTIONS if key in config}))
        classes = from_categories(json.loads(metadata["classes"]))
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, yaml.YAMLError) as e:
        from .. import __version__

        raise CheckpointError(
            f"{path}: its config and classes, written by knet_d2 {metadata.get('knet_d2_version', '(unknown)')}, can't "
            f"be read by knet_d2 {__version__} ({' '.join(str(e).split())}). Install the version that wrote it."
        ) from e
    return ModelDescription(cfg, classes)


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_knet_config(cfg)
    return cfg


def _differences(cfg: CfgNode, defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values of ``cfg`` that are not the default's."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        if prefix + key in _LEFT_OUT:
            continue
        if isinstance(value, CfgNode):
            value = _differences(value, defaults.get(key, {}), f"{prefix}{key}.")
            if value:
                found[key] = value
        elif key not in defaults or value != defaults[key]:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found
