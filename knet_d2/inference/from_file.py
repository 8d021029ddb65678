"""Makes a predictor from one weights file."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint import load_file, read_description
from ..checkpoint.address import weights_file
from ..checkpoint.download import PREFIX
from ..checkpoint.zoo import zoo_entry
from ..config.files import get_config_file
from ..config.merging import choose_device, load_config, merge_config
from ..config.unread import warn_of_unread_options
from ..data.classes import ClassTable, class_table
from ..errors import ConfigError
from ..evaluation.report import recommended_threshold
from .detectron2_predictor import Predictor
from .image_predictor import ImagePredictor
from .onnx_engine import OnnxPredictor, exported_file
from .runtimes import RUNTIMES

ENGINES = ("pytorch", *RUNTIMES)
THRESHOLD_HELP = "lowest score of an instance or thing (default: what the training run's report recommends, else 0.3)"
_USUAL_THRESHOLD = 0.3


def load(
    path: "str | os.PathLike[str]",
    *,
    confidence_threshold: float | None = None,
    device: str | None = None,
    config_file: str | None = None,
    opts: Sequence[str] = (),
    engine: str | None = None,
) -> ImagePredictor:
    """Make a predictor from a training run's folder or a weights file, which contains its config and class names.

    Args:
        path: a training run's folder, whose best weights are taken, or its ``.pth`` file; a file of
            tools/convert_checkpoint.py; ``knet://<name>`` for an official model, ``hf://user/name`` for one on Hugging
            Face's hub, ``lite0_fruits`` for the one that comes with the package; or an ``.onnx`` file of
            tools/export_model.py.
        confidence_threshold: instances and thing segments with a lower score are left out; None: what the report
            beside the weights recommends, else 0.3; or what an exported file was exported with.
        device: "cpu", "cuda", ...; None takes a GPU if there is one (engines other than PyTorch: "cpu").
        config_file: config file of weights that contain none.
        opts: further config options, KEY VALUE ...
        engine: "pytorch"; or "onnxruntime" or "openvino", which compute a weights file after exporting it to a cache;
            None: onnxruntime for ``.onnx`` files, else PyTorch.

    Raises:
        CheckpointError: the file is missing or damaged, or holds weights alone and config_file is not given.
        ConfigError: the engine can't do what is asked for.
    """
    if confidence_threshold is not None:
        check_threshold(confidence_threshold)
    path = os.fspath(path)
    is_exported = path.endswith(".onnx")
    engine = engine or ("onnxruntime" if is_exported else "pytorch")
    choices = tuple(RUNTIMES) if is_exported else ENGINES
    if engine not in choices:
        raise ConfigError(f"engine = {engine!r}: {path} is computed by {' or '.join(map(repr, choices))}.")
    if is_exported:
        if opts or config_file:
            raise ConfigError(f"{path}: opts and config_file are fixed in an exported file. Export it again with them.")
        return _load_exported(path, confidence_threshold, device, engine)
    device_options = ("MODEL.DEVICE", device) if device else ()
    given = [*device_options, *opts, "MODEL.WEIGHTS", path]
    options = [*threshold_options(confidence_threshold, given), *given]
    cfg, classes, content = resolve_model(config_file, options)
    if engine in RUNTIMES:
        return _load_exported(exported_file(cfg, classes), None, device, engine)
    return ImagePredictor(cfg, classes, Predictor(cfg, content))


def _load_exported(path: str, confidence_threshold: float | None, device: str | None, engine: str) -> ImagePredictor:
    exported = OnnxPredictor(path, device or "cpu", engine)
    cfg, test = exported.cfg, exported.cfg.MODEL.KNET.TEST
    if confidence_threshold is not None:
        if exported.outputs == ("panoptic_seg",) and confidence_threshold != test.THING_SCORE_THRESHOLD:
            raise ConfigError(
                f"confidence_threshold = {confidence_threshold}: {path} was exported with "
                f"{test.THING_SCORE_THRESHOLD}. Leave it out, or export it again with --confidence-threshold."
            )
        test.SCORE_THRESHOLD = confidence_threshold
    return ImagePredictor(cfg, exported.classes, exported)


def check_threshold(confidence_threshold: float) -> None:
    """Raise a ConfigError for a threshold that is no score."""
    if not 0 <= confidence_threshold <= 1:
        raise ConfigError(f"confidence_threshold = {confidence_threshold}: use a score from 0 to 1.")


def threshold_options(confidence_threshold: float | None, opts: Sequence[str]) -> list[str]:
    """Return the options, KEY VALUE ..., that drop instances and thing segments with a lower score.

    Args:
        confidence_threshold: None: what the report of a training run recommends for its weights, else 0.3.
        opts: KEY VALUE ..., of which MODEL.WEIGHTS may be a file in the folder of a training run, or the folder.
    """
    if confidence_threshold is None:
        weights = dict(zip(opts[0::2], opts[1::2])).get("MODEL.WEIGHTS", "")
        is_local = os.path.exists(weights)  # the report in the working folder is not that of a model with a name
        folder = weights if os.path.isdir(weights) else os.path.dirname(weights)
        recommended = recommended_threshold(folder) if is_local else None
        confidence_threshold = _USUAL_THRESHOLD if recommended is None else recommended
    check_threshold(confidence_threshold)
    threshold = str(confidence_threshold)
    return ["MODEL.KNET.TEST.SCORE_THRESHOLD", threshold, "MODEL.KNET.TEST.THING_SCORE_THRESHOLD", threshold]


def resolve_model(config_file: str | None, opts: Sequence[str]) -> tuple[CfgNode, ClassTable, Any]:
    """Return the config and the classes of a model.

    Args:
        config_file: None: read both from the weights file, or from the model zoo for an official model.
        opts: KEY VALUE ...; without a config file, MODEL.WEIGHTS is one of the keys.

    Returns:
        config, classes, and the content of the weights file if it was read for them, else None.

    Raises:
        ConfigError: there are no weights; or see :func:`load_config`.
        CheckpointError: the weights file contains no config, or a folder no weights file.
    """
    weights = dict(zip(opts[0::2], opts[1::2])).get("MODEL.WEIGHTS", "")
    if weights:
        weights = weights_file(weights)
        opts = [*opts, "MODEL.WEIGHTS", weights]
    if not config_file and weights.startswith(PREFIX):
        config_file = get_config_file(zoo_entry(weights.removeprefix(PREFIX)).name + ".yaml")
    content = None
    if config_file:
        cfg = load_config(config_file, opts)
        classes = class_table(cfg)
    elif weights:
        content = load_file(weights)
        cfg, classes = read_description(content, weights)
        merge_config(cfg, "", opts)
        cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, explicit="MODEL.DEVICE" in opts[0::2])
    if not (weights or (config_file and cfg.MODEL.WEIGHTS)):
        raise ConfigError("MODEL.WEIGHTS is empty; name the weights, as MODEL.WEIGHTS path/to/model_final.pth.")
    warn_of_unread_options(cfg)
    return cfg, classes, content
