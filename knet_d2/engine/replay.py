"""Repeat a training step whose losses were not finite, from the folder that the training run has written.

python -m knet_d2.engine.replay OUTPUT_DIR/non_finite_0001234 [KEY VALUE ...]

One process repeats the step of every process of the run, each with its own batch and dropout.
"""

import argparse
import os
import sys

from ..config.merging import load_config
from ..errors import CheckpointError, KNetError, NonFiniteError
from .dump import batch_file, load_batch
from .launch import add_launch_arguments, run
from .trainer import Trainer


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Repeat a training step whose losses were not finite.")
    parser.add_argument("folder", help="folder that the training run has written")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    parser.set_defaults(num_gpus=1, num_machines=1)
    return add_launch_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Repeat the step of every process and print its losses.

    Raises:
        KNetError: all losses are finite, so the failure was not repeated.
    """
    if all([_repeat(args.folder, rank, args.opts) for rank in range(_count_batches(args.folder))]):
        raise KNetError(f"{args.folder}: all losses are finite this time. Check the device on which the run failed.")


def _count_batches(folder: str) -> int:
    number = 0
    while os.path.isfile(batch_file(folder, number)):
        number += 1
    if number == 0:
        raise CheckpointError(
            f"{folder}: does not contain a training step: {batch_file(folder, 0)} is missing. Name a folder "
            "non_finite_<iteration>."
        )
    return number


def _repeat(folder: str, rank: int, opts: list[str]) -> bool:
    """Repeat the step of one process; returns whether its losses are finite."""
    trainer = Trainer(load_config(os.path.join(folder, "config.yaml"), opts))
    trainer.checkpointer.load(os.path.join(folder, "model.pth"))
    try:
        losses = trainer.repeat_step(load_batch(batch_file(folder, rank)), rank)
    except NonFiniteError as error:
        print(f"Process {rank}: {error}")
        return False
    print(f"Process {rank}: finite, " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    return True


if __name__ == "__main__":
    sys.exit(run(main, get_parser().parse_args()))
