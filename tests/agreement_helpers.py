"""Tiny training runs of P processes; the processes of tests/test_agreement.py import this module."""

import math
import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from toys import Interrupted, ToyNet, ToyTrainer, reset_toys, toy_cfg

from knet_d2.errors import KNetError
from knet_d2.modeling.layers import EvalBatchNorm2d, sync_batch_norm

CASES = {
    "BN": (nn.BatchNorm2d, {}),
    "BN and EMA": (nn.BatchNorm2d, {"SOLVER__EMA_DECAY": 0.5}),
    "SyncBN and EMA": (sync_batch_norm, {"SOLVER__EMA_DECAY": 0.5}),
    "frozen BN": (EvalBatchNorm2d, {"SOLVER__EMA_DECAY": 0.5}),
    "accumulation": (nn.BatchNorm2d, {"SOLVER__ACCUMULATE_GRADIENTS": 2, "SOLVER__EMA_DECAY": 0.5}),
    "skipped step": (nn.BatchNorm2d, {"SOLVER__NON_FINITE_STEPS": 2, "SOLVER__EMA_DECAY": 0.5}),
    "resume": (nn.BatchNorm2d, {"SOLVER__EMA_DECAY": 0.5}),
    "resume of BN": (nn.BatchNorm2d, {}),
}


class OwnImages:
    """Images that differ between the processes."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        i = self.start
        while True:
            generator = torch.Generator().manual_seed(10 * i + comm.get_rank())
            images = torch.rand(2, 3, 8, 8, generator=generator)
            yield [{"image": image, "file_name": f"image{i}.png"} for image in images]
            i += 1


class NormTrainer(ToyTrainer):
    """Trains a toy with batch norm, whose initial weights differ between the processes."""

    norm = nn.BatchNorm2d

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(100 + comm.get_rank())
        model = ToyNet(cfg)
        model.norm = cls.norm(4)
        return model

    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return OwnImages(start_iter)

    def evaluate(self):
        results = super().evaluate()
        self.evaluated.append(contents(self))
        return results


def contents(trainer):
    """All parameters, buffers and averages of this process."""
    states = {"trained": trainer.model.state_dict(), "evaluated": trainer.evaluated_model.state_dict()}
    return {
        f"{kind} {name.removeprefix('module.')}": value.clone()
        for kind, state in states.items()
        for name, value in state.items()
    }


class Disturbance(HookBase):
    """A fault of one process's memory."""

    def before_step(self):
        if self.trainer.iter == 1 and comm.get_rank() == comm.get_world_size() - 1:
            with torch.no_grad():
                next(self.trainer.model.parameters()).flatten()[0] += 0.5


def train(folder, case, resume=False):
    """A training of 6 steps with an evaluation after the third and the last; returns the trainer."""
    NormTrainer.norm, options = CASES[case]
    cfg = toy_cfg(folder, **options, SOLVER__MAX_ITER=6, SOLVER__IMS_PER_BATCH=4, SOLVER__CHECKPOINT_PERIOD=2)
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR = 3, (), 0.1
    trainer = NormTrainer(cfg)
    trainer.evaluated = []
    trainer.resume_or_load(resume=resume)
    return trainer


def run_case(folder, case):
    """Train one case; returns the contents of this process's model at every evaluation."""
    os.makedirs(folder, exist_ok=True)
    if case == "skipped step" and comm.get_rank() == comm.get_world_size() - 1:
        ToyNet.fail_at = ("image1.png", math.nan)
    resume = case.startswith("resume")
    if resume:
        ToyNet.fail_at = ("image5.png", Interrupted())
        first = train(folder, case)
        try:
            first.train()
        except Interrupted:
            comm.synchronize()
        reset_toys()
    trainer = train(folder, case, resume)
    trainer.train()
    reset_toys()
    return [*(first.evaluated if resume else []), *trainer.evaluated]


def find_disturbance(folder):
    """Change the weights of the last process; returns the message of the check."""
    os.makedirs(folder, exist_ok=True)
    trainer = train(folder, "BN")
    trainer.register_hooks([Disturbance()])
    try:
        trainer.train()
    except KNetError as error:
        return str(error)
    return None


def run_all(folder):
    """Run all cases; the main process saves the contents of all processes, by case."""
    found = {case: comm.all_gather(run_case(os.path.join(folder, case), case)) for case in CASES}
    found["disturbance"] = comm.all_gather(find_disturbance(os.path.join(folder, "disturbance")))
    if comm.is_main_process():
        torch.save(found, os.path.join(folder, "found.pth"))
