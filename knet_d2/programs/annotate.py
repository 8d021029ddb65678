"""Segment images and write the results as annotation files of a label tool, to correct them by hand.

    %(prog)s output/my_photos new_photos --format labelme --output to_correct
    %(prog)s output/my_photos new_photos --format png --output to_correct

The folder has a copy of the images, and order.csv lists the most doubtful ones first. When they are corrected, train on
them: knet train --data to_correct (CVAT: on its export "COCO 1.0"). A class "background" is no annotation, as it is no
object. --format png writes masks/NAME.png, with the values of the masks that the model was trained on, such as 0 and
255.
"""

import argparse

from ..inference.from_file import THRESHOLD_HELP
from ..results.annotations import WRITERS, check_destination, write_annotations
from .arguments import MODEL_HELP, add_config_arguments, load_predictor


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("inputs", nargs="+", help="image files, folders, or quoted patterns such as 'a/*.jpg'")
    parser.add_argument("--format", required=True, choices=WRITERS, help="of the files")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the files")
    parser.add_argument("--confidence-threshold", type=float, help=THRESHOLD_HELP)
    parser.add_argument("--tolerance", type=float, default=1.0, help="distance of polygons to masks, in pixels")
    add_config_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    check_destination(args.format, args.output)
    predictor = load_predictor(args.model, args)
    images = predictor.images(args.inputs)
    number = write_annotations(args.format, images, args.output, predictor.classes, args.tolerance)
    print(f"Wrote annotations of {number} images to {args.output}; order.csv lists the most doubtful ones first.")
