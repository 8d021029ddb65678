"""Train or evaluate K-Net; the command line is Detectron2's, and --data trains on a folder of images without a config.

torchrun and srun start it as well: see the page CLUSTERS.
"""

import argparse
import os
import shlex
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import Checkpointer, describe_model
from ..data.classes import class_table
from ..engine import Trainer, launch, setup
from ..engine.output_dir import save_config
from ..engine.writers import read_metrics
from ..errors import ConfigError
from ..evaluation import best_metric, write_report
from ..evaluation.report import REPORT, report_name
from . import check_dataset
from .own_data import add_data_arguments, use_data

# Evaluations in the line at the end of a run
MOST_LISTED = 10
_EXAMPLES = """
examples:
  %(prog)s --data my_photos --task instance
  %(prog)s --data my_photos --task instance --resume          continue a run that was stopped
  %(prog)s --data my_photos SOLVER.MAX_ITER 200               a shorter run; such pairs are last on the line
  %(prog)s --data my_photos --output longer MODEL.WEIGHTS output/my_photos    a new run from an earlier one's weights
  %(prog)s --config-file config.yaml --num-gpus 8
  %(prog)s --config-file config.yaml --eval-only MODEL.WEIGHTS model.pth

Ctrl-C and SIGTERM write a checkpoint before the run ends; Ctrl-C again ends it at once. Several machines, torchrun and
SLURM: knet docs CLUSTERS.
"""


def evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS (with ``resume``: the last checkpoint in OUTPUT_DIR) on DATASETS.TEST."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name the data sets to evaluate on.")
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, metadata=describe_model(cfg), classes=class_table(cfg))
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        where = f", and OUTPUT_DIR = {cfg.OUTPUT_DIR} has no checkpoint" if resume else ""
        raise ConfigError(
            f"MODEL.WEIGHTS is empty{where}: name the weights to evaluate, as MODEL.WEIGHTS path/to/model_final.pth."
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    evaluators = [Trainer.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
    results = Trainer.test(cfg, model, evaluators)
    history = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
    write_report(cfg, model, evaluators, results, history, report_name(cfg))
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train or evaluate in this process, one of those that :func:`main` starts; returns the last metrics."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    save_config(cfg, cfg.OUTPUT_DIR)
    results = trainer.train()
    if comm.is_main_process():
        of_folder = getattr(args, "data", None) and cfg.DATASETS.TEST
        held_out = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"] if of_folder else ""
        print(f"\n{progress_of(cfg)}{next_steps(cfg.OUTPUT_DIR, held_out)}", flush=True)
    return results


def progress_of(cfg: CfgNode) -> str:
    """A line with the main metric of each evaluation of the run so far; "" if there was none."""
    name = best_metric(cfg)
    found = [x for x in read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) if name in x]
    listed = ", ".join(f"{x[name]:.2f} after {x['iteration'] + 1}" for x in found[-MOST_LISTED:])
    return f"{name}: {listed} iterations\n\n" if listed else ""


def next_steps(folder: str, held_out: str = "") -> str:
    """What a user can do with the model of a training run, as commands.

    Args:
        folder: of the run.
        held_out: path of an image that the model was not trained on, to begin with; "" if none is known.
    """
    name = shlex.quote(folder)
    steps = [
        f"knet predict {name} PHOTOS --output {name}/pictures --csv {name}/objects.csv",
        f"knet export {name} {name}/model.onnx",
    ]
    if os.path.isfile(os.path.join(folder, REPORT)):
        steps.insert(0, f"open {folder}/{REPORT} in a browser")
    if held_out:
        photo = shlex.quote(held_out)
        steps.insert(-2, f"knet predict {name} {photo} --output {name}/picture.png    (not trained on)")
    return "\n  ".join([f"The model is in {folder}. What is next:", *steps]) + "\n"


def get_parser() -> argparse.ArgumentParser:
    parser = launch.add_launch_arguments(default_argument_parser(epilog=_EXAMPLES))
    parser.description = "Train a model, or evaluate one."
    add_data_arguments(parser)
    parser.add_argument("--output", metavar="FOLDER", help="with --data: folder of the run; default: output/NAME")
    parser.add_argument("--no-check", action="store_true", help="with --data: train without checking the data set")
    return parser


def main(args: argparse.Namespace) -> int:
    folder = use_data(args, ("output", "no_check"))
    if folder and not args.no_check:
        check = check_dataset.get_parser().parse_args(["--config-file", args.config_file, "--opts", *args.opts])
        if check_dataset.main(check):
            print("Correct the errors above. With --no-check, training begins, and stops at what it cannot read.")
            return 1
    return launch.run(train, args)
