"""Command line arguments that several programs share."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..inference.from_file import ENGINES, THRESHOLD_HELP, load
from ..inference.image_predictor import ImagePredictor

MODEL_HELP = "folder of a training run, weights file, or a name as knet://NAME or lite0_fruits"
_PREDICTOR_OPTIONS = ("confidence_threshold", "device", "config_file", "opts", "engine")


def positive(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: use a number above 0")
    return number


def size(text: str) -> tuple[int, int]:
    """The type of an argument that is a height and a width, as "800x1216"."""
    height, width = map(int, text.split("x"))
    return height, width


def add_opts(parser: argparse.ArgumentParser) -> None:
    """Add --opts, which takes the rest of the command line."""
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add --config-file, which only weights without a config need unless it is required, and --opts."""
    description = "path to config file" if required else "config for weights that contain none"
    parser.add_argument("--config-file", required=required, metavar="FILE", help=description)
    add_opts(parser)


def add_predictor_arguments(parser: argparse.ArgumentParser, *, default_device: str) -> None:
    """Add the arguments that :func:`load_predictor` reads; what the default device is appears in the help."""
    parser.add_argument("--confidence-threshold", type=float, help=THRESHOLD_HELP)
    parser.add_argument("--engine", choices=ENGINES, help="what computes the model; see knet docs DEPLOYMENT")
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1, ...; default: {default_device}")
    add_config_arguments(parser)


def refuse_weights(opts: Sequence[str]) -> None:
    """Raise a ConfigError if KEY VALUE pairs name the model, which another argument names."""
    if "MODEL.WEIGHTS" in opts:
        raise ConfigError("MODEL.WEIGHTS: the model is the first argument. Name the weights file there.")


def load_predictor(weights: str, args: argparse.Namespace, **options: Any) -> ImagePredictor:
    """The predictor of a weights file, see :func:`load`: its options are those that ``args`` has, and ``options``."""
    found = {name: getattr(args, name) for name in _PREDICTOR_OPTIONS if hasattr(args, name)}
    return load(weights, **{**found, **options})
