"""Evaluate a training run: its best weights, on the data sets of its DATASETS.TEST.

    %(prog)s output/my_photos
    %(prog)s output/my_photos MODEL.KNET.TEST.SCORE_THRESHOLD 0.5
    %(prog)s output/my_photos DATASETS.TEST "('my_photos_train',)"

The last line of the log names the report, an HTML page; for other data sets than the run's own, it is report_NAME.html.
That of the training images shows wrong annotations: they are among the worst images. For weights without a training
run's folder, and for several machines: knet train --eval-only.
"""

import argparse
import os

from ..checkpoint import best_checkpoint
from ..errors import ConfigError
from . import train
from .arguments import refuse_weights


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="number of GPUs")
    parser.add_argument("folder", help="folder of a training run")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="pairs that change config options")
    return parser


def main(args: argparse.Namespace) -> int | None:
    config = os.path.join(args.folder, "config.yaml")
    if not os.path.isfile(config):
        raise ConfigError(f"{args.folder}: is not the folder of a training run, as it has no config.yaml.")
    refuse_weights(args.opts)
    words = ["--config-file", config, "--eval-only", "--num-gpus", str(args.num_gpus), *args.opts]
    return train.main(train.get_parser().parse_args([*words, "MODEL.WEIGHTS", best_checkpoint(args.folder)]))
