"""Makes a predictor from one weights file."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode

from ..checkpoint import load_file, read_description
from ..checkpoint.download import PREFIX
from ..checkpoint.zoo import zoo_entry
from ..config.files import get_config_file
from ..config.merging import choose_device, load_config, merge_config
from ..config.unread import warn_of_unread_options
from ..data.classes import ClassTable, class_table
from ..errors import ConfigError
from .image_predictor import ImagePredictor


def load(
    path: "str | os.PathLike[str]",
    *,
    confidence_threshold: float = 0.3,
    device: str | None = None,
    config_file: str | None = None,
    opts: Sequence[str] = (),
) -> ImagePredictor:
    """Make a predictor from a weights file, which contains its config and class names.

    Args:
        path: the ``.pth`` file of a training run, a file of tools/convert_checkpoint.py, or ``knet://<name>`` for an
            official model.
        confidence_threshold: instances and thing segments with a lower score are left out.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        config_file: config file of weights that contain none.
        opts: further config options, KEY VALUE ...

    Raises:
        CheckpointError: the file is missing or damaged, or holds weights alone and config_file is not given.
    """
    device_options = ("MODEL.DEVICE", device) if device else ()
    opts = [*threshold_options(confidence_threshold), *device_options, *opts, "MODEL.WEIGHTS", os.fspath(path)]
    return ImagePredictor(*resolve_model(config_file, opts))


def threshold_options(confidence_threshold: float) -> list[str]:
    """Return the options, KEY VALUE ..., that drop instances and thing segments with a lower score."""
    threshold = str(confidence_threshold)
    return ["MODEL.KNET.TEST.SCORE_THRESHOLD", threshold, "MODEL.KNET.TEST.THING_SCORE_THRESHOLD", threshold]


def resolve_model(config_file: str | None, opts: Sequence[str]) -> tuple[CfgNode, ClassTable]:
    """Return the config and the classes of a model.

    Args:
        config_file: None: read both from the weights file, or from the model zoo for an official model.
        opts: KEY VALUE ...; without a config file, MODEL.WEIGHTS is one of the keys.

    Raises:
        ConfigError: there are no weights; or see :func:`load_config`.
        CheckpointError: the weights file contains no config.
    """
    weights = dict(zip(opts[0::2], opts[1::2])).get("MODEL.WEIGHTS", "")
    if not config_file and weights.startswith(PREFIX):
        config_file = get_config_file(zoo_entry(weights.removeprefix(PREFIX)).name + ".yaml")
    if config_file:
        cfg = load_config(config_file, opts)
        classes = class_table(cfg)
    elif weights:
        # Like Detectron2's DefaultPredictor, the predictor is built from a config alone, so it reads the file again
        cfg, classes = read_description(load_file(weights), weights)
        merge_config(cfg, "", opts)
        cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, explicit="MODEL.DEVICE" in opts[0::2])
    if not (weights or (config_file and cfg.MODEL.WEIGHTS)):
        raise ConfigError("MODEL.WEIGHTS is empty; name the weights, as MODEL.WEIGHTS path/to/model_final.pth.")
    warn_of_unread_options(cfg)
    return cfg, classes
