"""Segment images or videos with a model: pictures, masks as PNG files, JSON, a table.

    %(prog)s output/my_photos photo.jpg --output picture.png
    %(prog)s output/my_photos new_photos --output output/pictures --csv output/objects.csv
    %(prog)s output/my_photos 'new_photos/*.jpg' --masks output/masks --json output/results.json

Of a folder, all images are taken, also earlier results in it; a quoted pattern chooses.
"""

import argparse

from . import demo
from .arguments import MODEL_HELP, refuse_weights


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("inputs", nargs="*", help=demo.IMAGES_HELP)
    demo.add_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the demo on the same arguments."""
    refuse_weights(args.opts)
    args.input, args.opts = args.inputs, [*args.opts, "MODEL.WEIGHTS", args.model]
    return demo.main(args)
