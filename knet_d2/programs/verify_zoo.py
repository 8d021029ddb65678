"""Evaluate official checkpoints on COCO or ADE20K, and print our metrics beside the official ones.

Checkpoints are downloaded on first use. The data sets must be below DETECTRON2_DATASETS, see knet docs DATASETS.

    %(prog)s                                          # every published checkpoint
    %(prog)s coco/panoptic/knet_r50_fpn_1x --num-gpus 8
"""

import argparse
import logging
import math
import os
from typing import Any, NamedTuple

from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from ..checkpoint import Checkpointer
from ..checkpoint.download import PREFIX
from ..checkpoint.zoo import zoo_entry
from ..engine import Trainer, load_config
from ..errors import CheckpointError, KNetError
from ..model_zoo import get_checkpoint_url, get_config_file, names
from .arguments import add_opts

# Metric in the zoo's table -> (task, key) in Detectron2's results
METRICS = {"PQ": ("panoptic_seg", "PQ"), "AP": ("segm", "AP"), "mIoU": ("sem_seg", "mIoU")}

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """The comparison of one metric; if the evaluation failed, ``ours`` is NaN and ``error`` is the reason."""

    name: str
    metric: str
    official: float
    ours: float
    error: str = ""

    @property
    def difference(self) -> float:
        return self.ours - self.official


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models of the zoo; default: all with a checkpoint")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--output", default="output/verify_zoo", metavar="FOLDER", help="folder for the predictions")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest allowed difference in percentage points")
    add_opts(parser)
    return parser


def selected_names(args: argparse.Namespace) -> list[str]:
    """Return the models to evaluate; all of them have a checkpoint."""
    chosen = [zoo_entry(name).name for name in args.names]
    for name in chosen:
        if get_checkpoint_url(name) is None:
            raise CheckpointError(f"{name}: no checkpoint was published. Leave this model out.")
    return chosen or [name for name in names() if get_checkpoint_url(name) is not None]


def evaluate(name: str, output: str, opts: list[str]) -> dict[str, Any]:
    """Evaluate an official checkpoint on the validation set of its config, as ``train_net.py --eval-only`` does."""
    weights = ["MODEL.WEIGHTS", PREFIX + name, "OUTPUT_DIR", os.path.join(output, name)]
    cfg = load_config(get_config_file(name), [*weights, *opts])
    cfg.freeze()
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return Trainer.test(cfg, model)


def verify(name: str, output: str, opts: list[str]) -> Row:
    """Evaluate one checkpoint; an error of the data, weights or options is returned as a row, too."""
    metric, official = next(item for item in zoo_entry(name).metrics.items() if item[0] in METRICS)
    task, key = METRICS[metric]
    try:
        results = evaluate(name, output, opts)
        ours = results[task][key] if comm.is_main_process() else math.nan
        return Row(name, metric, official, ours)
    except KNetError as error:
        logger.error("%s: %s", name, error)
        return Row(name, metric, official, math.nan, str(error))


def table(rows: list[Row]) -> str:
    """Format the rows as a table, with the reasons of failures below it."""
    lines = [[row.name, row.metric, row.official, row.ours, row.difference] for row in rows]
    headers = ["model", "metric", "official", "ours", "difference"]
    text = tabulate(lines, headers, tablefmt="pipe", floatfmt=("", "", ".2f", ".2f", "+.2f"))
    return "\n".join([text, *(f"{row.name}: {row.error}" for row in rows if row.error)])


def verify_all(args: argparse.Namespace, chosen: list[str]) -> list[Row] | None:
    """Evaluate the models; the main process prints the table after each.

    Returns:
        The rows on the main process, None on other processes.

    Raises:
        KNetError: a metric differs by more than the tolerance.
    """
    setup_logger(distributed_rank=comm.get_rank(), name="knet_d2", abbrev_name="knet")
    rows = []
    for name in chosen:
        rows.append(verify(name, args.output, args.opts))
        if comm.is_main_process():
            print(table(rows), flush=True)
    if not comm.is_main_process():
        return None
    different = [row.name for row in rows if not abs(row.difference) <= args.tolerance]
    if different:
        differing = ", ".join(different)
        raise KNetError(f"{len(different)} of {len(rows)} differ by more than {args.tolerance}: {differing}.")
    return rows


def main(args: argparse.Namespace) -> None:
    launch(verify_all, args.num_gpus, dist_url="auto", args=(args, selected_names(args)))
