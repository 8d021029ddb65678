#!/usr/bin/env python
"""Train or evaluate K-Net; the command line is Detectron2's.

python train_net.py --config-file configs/... [--num-gpus N] [--resume | --eval-only] [KEY VALUE ...]

torchrun and srun start it as well, see docs/CLUSTERS.md.
"""

import argparse
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from knet_d2.checkpoint import Checkpointer
from knet_d2.engine import Trainer, setup
from knet_d2.engine.launch import add_launch_arguments, run


def evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS (with ``resume``: the last checkpoint in OUTPUT_DIR) on DATASETS.TEST."""
    model = Trainer.build_model(cfg)
    Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    sys.exit(run(main, add_launch_arguments(default_argument_parser()).parse_args()))
