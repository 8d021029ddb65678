"""Show what the kernels of a trained K-Net have learned, as in Figure 4 of the paper.

This writes two pictures: the average mask of every instance kernel over a folder of images, and, for one image, the
masks and scores of the best kernels before the first update and after each stage. See knet docs DEPLOYMENT.
"""

import argparse
import os

import numpy as np
from PIL import Image

from ..data import build_mapper
from ..data.files import find_images, read_picture, refuse_to_replace
from ..inference.from_file import load
from ..inference.insight import average_masks, draw_average_masks, draw_stages, stage_masks
from .arguments import MODEL_HELP, add_config_arguments


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help=MODEL_HELP)
    parser.add_argument("--images", nargs="+", required=True, help="image files, folders, or quoted patterns")
    parser.add_argument("--average", default="kernels.jpg", metavar="FILE", help="picture of the average masks")
    parser.add_argument("--stages", default="stages.jpg", metavar="FILE", help="picture of one image's stages")
    parser.add_argument("--image", metavar="FILE", help="image for the stages; default: first one of --images")
    parser.add_argument("--kernels", type=int, default=6, help="number of kernels in the picture of the stages")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="lowest score of an object")
    add_config_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    predictor = load(args.weights, config_file=args.config_file, opts=args.opts)
    mapper = build_mapper(predictor.cfg, False)
    files = find_images(args.images)
    shown = args.image or files[0]
    refuse_to_replace([*files, shown], [args.average, args.stages], "--average or --stages")
    average = average_masks(predictor.model, (mapper({"file_name": x}) for x in files), args.confidence_threshold)
    write(draw_average_masks(average), args.average)
    image = read_picture(shown, predictor.pixel_format)
    stages = stage_masks(predictor.model, mapper({"file_name": shown}), image.shape[:2])
    write(draw_stages(image, stages, predictor.classes, args.kernels), args.stages)


def write(picture: np.ndarray, path: str) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    Image.fromarray(picture).save(path)
    print(f"Wrote {path}")
