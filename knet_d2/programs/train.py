"""Train or evaluate K-Net; the command line is Detectron2's.

python train_net.py --config-file configs/... [--num-gpus N] [--resume | --eval-only] [KEY VALUE ...]

torchrun and srun start it as well, see docs/CLUSTERS.md.
"""

import argparse
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import Checkpointer, describe_model
from ..data.classes import class_table
from ..engine import Trainer, launch, setup
from ..engine.output_dir import save_config
from ..engine.writers import read_metrics
from ..errors import ConfigError
from ..evaluation import write_report


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
    write_report(cfg, model, evaluators, results, read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json")))
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
    return trainer.train()


def get_parser() -> argparse.ArgumentParser:
    return launch.add_launch_arguments(default_argument_parser())


def main(args: argparse.Namespace) -> int:
    return launch.run(train, args)
