"""Tiny training runs of P processes; the processes of tests/test_agreement.py import this module."""

import itertools
import math
import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from toys import Interrupted, ToyNet, ToyTrainer, reset_toys, toy_cfg

from knet_d2.errors import KNetError
from knet_d2.modeling.layers import EvalBatchNorm2d, sync_batch_norm
from knet_d2.setup.compat import end_process

NORMS = {"BN": nn.BatchNorm2d, "SyncBN": sync_batch_norm, "frozen BN": EvalBatchNorm2d}
DECAYS = {"no EMA": 0.0, "EMA": 0.5}
EVENTS = {
    "no event": {},
    "accumulation": {"SOLVER__ACCUMULATE_GRADIENTS": 2},
    "skipped step": {"SOLVER__NON_FINITE_STEPS": 2},
    "resume": {},
}
# Norm, average, event; the events with the average, which is one more state that they can spoil
CASES = [x for x in itertools.product(NORMS, DECAYS, EVENTS) if x[1] == "EMA" or x[2] == "no event"]


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
        model.norm.running_mean.normal_()
        return model

    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return OwnImages(start_iter)

    def build_writers(self):
        return super().build_writers()[1:2]  # only metrics.json

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


def folder_of(folder, case):
    return os.path.join(folder, "_".join(case).replace(" ", "_"))


def train(folder, case, resume=False):
    """A training of 4 steps with an evaluation after the second and the last; returns the trainer."""
    norm, decay, event = case
    NormTrainer.norm = NORMS[norm]
    os.makedirs(folder, exist_ok=True)
    cfg = toy_cfg(folder, **EVENTS[event], SOLVER__EMA_DECAY=DECAYS[decay], SOLVER__WARMUP_ITERS=0)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.BASE_LR = 2 * comm.get_world_size(), 2, 0.1
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD = 4, (), 2
    trainer = NormTrainer(cfg)
    trainer.evaluated = []
    trainer.resume_or_load(resume=resume)
    return trainer


def run_case(folder, case):
    """Train one case; returns the contents of this process's model at every evaluation."""
    event = case[-1]
    if event == "skipped step" and comm.get_rank() == comm.get_world_size() - 1:
        ToyNet.fail_at = ("image0.png", math.nan)
    evaluated = []
    if event == "resume":
        ToyNet.fail_at = ("image3.png", Interrupted())
        trainer = train(folder, case)
        try:
            trainer.train()
        except Interrupted:
            comm.synchronize()
        evaluated += trainer.evaluated
        reset_toys()
    trainer = train(folder, case, resume=event == "resume")
    trainer.train()
    reset_toys()
    return [*evaluated, *trainer.evaluated]


def find_disturbance(folder):
    """Change the weights of the last process; returns the message of the check."""
    trainer = train(folder, ("BN", "no EMA", "no event"))
    trainer.register_hooks([Disturbance()])
    try:
        trainer.train()
    except KNetError as error:
        return str(error)
    return None


def run_all(folder):
    """Run all cases; the main process saves the contents of all processes, by case."""
    found = {case: comm.all_gather(run_case(folder_of(folder, case), case)) for case in CASES}
    found["disturbance"] = comm.all_gather(find_disturbance(os.path.join(folder, "disturbance")))
    if comm.is_main_process():
        torch.save(found, os.path.join(folder, "found.pth"))
    if comm.get_world_size() > 1:
        comm.synchronize()
        end_process(0)
