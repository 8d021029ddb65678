"""Draw the ground truth (left) beside the prediction (right) for some images of a config's first test set."""

import argparse
import os

from PIL import Image

from ..engine import Predictor, load_config
from ..errors import ConfigError
from ..results.comparison import draw_validation_pictures
from ..results.pictures import picture_sheet
from .arguments import add_config_arguments


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="comparison.png", metavar="FILE", help="the picture to write")
    parser.add_argument("--number", type=int, default=8, help="number of images")
    parser.add_argument("--columns", type=int, default=2, help="number of images side by side")
    add_config_arguments(parser, required=True)
    return parser


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name the data set to draw.")
    pictures = list(draw_validation_pictures(cfg, Predictor(cfg).model, args.number).values())
    title = f"{cfg.DATASETS.TEST[0]}: ground truth (left) and prediction (right)"
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    Image.fromarray(picture_sheet(pictures, args.columns, title)).save(args.output)
    print(f"Wrote {args.output}")
