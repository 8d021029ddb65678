"""Training steps and evaluations of P processes; the processes of tests/test_processes.py import this module."""

import contextlib
import io
import logging
import math
import os
from pathlib import Path

import torch
from detectron2.engine import create_ddp_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import IMAGE_KERNELS, make_example, tiny_config, tiny_model
from torch import distributed
from torch.nn.functional import one_hot

from knet_d2.data import build_mapper, load_dataset
from knet_d2.engine import Trainer, load_config
from knet_d2.engine.optimizer import build_gradient_clipper
from knet_d2.engine.stop_signals import StopSignals
from knet_d2.engine.train_step import TrainStep
from knet_d2.setup.compat import end_process
from knet_d2.tasks import VIDEO_SWITCHES

# Instances of the images of every step's batch: none on the second half of the processes, none at all, all over
COUNTS = ([2, 3, 0, 0], [0, 0, 0, 0], [1, 0, 2, 4], [0, 0, 1, 0], [3, 1, 1, 2])
PARTS_STEP = 2
SIZE = (64, 64)
GROUPS = {"MODEL.KNET.DENOISING.NUM_KERNELS": 7, "MODEL.KNET.ONE_TO_MANY.NUM_KERNELS": 8}
OPTIONS = {
    "instance": {"MODEL.RESNETS.NORM": "EvalBN", **IMAGE_KERNELS, **GROUPS, "MODEL.KNET.LOSS.NUM_POINTS": 50},
    "panoptic": {"MODEL.RESNETS.NORM": "EvalBN", **GROUPS},
    "semantic": {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.SEM_SEG_HEAD.NORM": "SyncBN", "MODEL.KNET.DROPOUT": 0.0},
}


FOLLOWS = {f"MODEL.KNET.VIDEO.{key}": True for key in VIDEO_SWITCHES}


def make_model(task, is_global, more=None):
    """A model in float64, in training mode, that DistributedDataParallel wraps where there are other processes."""
    options = {**OPTIONS[task], "MODEL.KNET.LOSS.GLOBAL_NORMALIZERS": is_global, **(more or {})}
    model = tiny_model(task, options).double().train()
    return model, create_ddp_model(model, broadcast_buffers=False, device_ids=None)


def num_parts_of(world_size):
    """Return the number of parts into which a process splits its share of a batch."""
    return min(2, len(COUNTS[PARTS_STEP]) // world_size)


def share_of_batch(step, rank, world_size):
    """Return the share of a process in the batch of a step."""
    counts = enumerate(COUNTS[step], 10 * step)
    batch = [{**make_example(SIZE, count, seed=position), "seed": position} for position, count in counts]
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


def train(task):
    """Five steps of SGD with global normalisers on this process's share of every batch.

    Where there are other processes, activations are computed again in the backward pass, which must change nothing.

    Returns:
        per step {"losses": name -> mean over the processes, "gradients": parameter -> tensor}.
    """
    model, ddp = make_model(task, is_global=True, more={"MODEL.KNET.CHECKPOINT": comm.get_world_size() > 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    steps = []
    for step in range(len(COUNTS)):
        losses = ddp(share_of_batch(step, comm.get_rank(), comm.get_world_size()))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gathered = comm.all_gather(numbers(losses))
        means = {name: sum(x[name] for x in gathered) / len(gathered) for name in losses}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        steps.append({"losses": means, "gradients": gradients})
        optimizer.step()
    return steps


def step_of_pairs():
    """The backward pass of a model that learns to follow objects, with global normalisers.

    Returns:
        the losses' means over the processes, and the gradients.
    """
    model, ddp = make_model("panoptic", is_global=True, more=FOLLOWS)
    shares = [share_of_batch(step, comm.get_rank(), comm.get_world_size()) for step in (4, 2)]
    for x in (x for share in shares for x in share):
        x["instances"].gt_track_ids = torch.arange(len(x["instances"]))
    losses = ddp([{**key, "reference": reference} for key, reference in zip(*shares)])
    sum(losses.values()).backward()
    gathered = comm.all_gather(numbers(losses))
    means = {name: sum(x[name] for x in gathered) / len(gathered) for name in losses}
    return means, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_over_costs_that_are_not_finite():
    """Three steps, of which the second fails in the last process, while it matches its images.

    Returns:
        the log of this process, whether its weights changed in each step, and a weight after them.
    """
    model, ddp = make_model("panoptic", is_global=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clip = build_gradient_clipper(tiny_config("panoptic"))
    step = TrainStep(ddp, optimizer, clip_gradients=clip, seed=0, non_finite_limit=2)
    step.data_loader = [share_of_batch(i, comm.get_rank(), comm.get_world_size()) for i in (0, 4, 2)]
    if comm.get_rank() == comm.get_world_size() - 1:
        for example in step.data_loader[1]:
            example.update(image=torch.full((3, *SIZE), math.nan), file_name="bad.jpg")
    log, changed, weight = io.StringIO(), [], model.cascade.stages[0].mask_branch[0].weight
    logging.getLogger("knet_d2").addHandler(logging.StreamHandler(log))
    for step.iter in range(3):
        before = weight.detach().clone()
        with EventStorage(step.iter):
            step.run_step()
        changed.append(not torch.equal(before, weight))
    return log.getvalue(), changed, float(weight.detach().norm())


def step_in_parts(num_parts):
    """A step with global normalisers, whose batch each process computes in parts.

    Returns:
        the losses' means over the processes (on the main one), and the gradients.
    """
    model, ddp = make_model("panoptic", is_global=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = TrainStep(ddp, optimizer, clip_gradients=lambda _: torch.zeros(()), seed=0, num_parts=num_parts)
    step.data_loader = [share_of_batch(PARTS_STEP, comm.get_rank(), comm.get_world_size())]
    step.iter = 0
    with EventStorage(0) as storage:
        step.run_step()
    losses = {name: value for name, (value, _) in storage.latest().items() if name.startswith("loss")}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shifted_truth(cfg):
    """A stand-in for a model: the ground truth, moved by some pixels and with scores that follow from the image."""
    mapper, knet = build_mapper(cfg, is_train=True), cfg.MODEL.KNET
    records = {record["file_name"]: record for record in load_dataset(cfg.DATASETS.TEST[0])}

    def predict(inputs):
        (image,) = inputs
        number = int(Path(image["file_name"]).stem)
        example = mapper(records[image["file_name"]])
        labels = torch.roll(example.get("sem_seg", torch.zeros(SIZE, dtype=torch.int64)), number, dims=1)
        if knet.TASK == "semantic":
            return [{"sem_seg": one_hot(labels, 256)[:, :, : knet.NUM_STUFF_CLASSES].permute(2, 0, 1)}]
        truth = example["instances"]
        masks = torch.roll(truth.gt_masks.tensor, number, dims=2)
        if knet.TASK == "panoptic":
            infos = [
                {"id": i + 1, "isthing": True, "category_id": knet.THING_CATEGORY_IDS[label]}
                for i, label in enumerate(truth.gt_classes.tolist())
            ]
            segments = torch.zeros(SIZE, dtype=torch.int32)
            for info, mask in zip(infos, masks):
                segments[mask] = info["id"]
            return [{"panoptic_seg": (segments, infos)}]
        scores = torch.rand(len(masks), generator=torch.Generator().manual_seed(number))
        found = Instances(SIZE, scores=scores, pred_classes=truth.gt_classes, pred_masks=masks)
        found.pred_boxes = BitMasks(masks).get_bounding_boxes()
        return [{"instances": found}]

    return predict


def evaluate(config):
    """Evaluate :func:`shifted_truth` on all images; returns metrics by kind and name, on the main process."""
    opts = ["INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", "False", "OUTPUT_DIR", os.path.dirname(config)]
    cfg = load_config(config, opts)
    return Trainer.test(cfg, shifted_truth(cfg))


def train_and_save(path, configs):
    """All tasks, and the losses of every process with local normalisers; the main process saves them.

    Args:
        configs: config file by task, for the evaluation.
    """
    results = {task: train(task) for task in OPTIONS}
    results["evaluation"] = {task: evaluate(config) for task, config in configs.items()}
    _, ddp = make_model("instance", is_global=False)
    losses = ddp(share_of_batch(0, comm.get_rank(), comm.get_world_size()))
    results["local"] = comm.all_gather(numbers(losses))
    results["pairs"] = step_of_pairs()
    results["parts"] = step_in_parts(num_parts_of(comm.get_world_size()))
    results["collectives"] = comm.all_gather(collectives_of_steps())
    results["signals"] = comm.all_gather(signals_of_steps())
    results["skipped"] = comm.all_gather(step_over_costs_that_are_not_finite())
    if comm.is_main_process():
        torch.save(results, path)
    if comm.get_world_size() > 1:
        comm.synchronize()
        end_process(0)


@contextlib.contextmanager
def counted_collectives():
    """Count this process's calls of collectives by name, without those of DistributedDataParallel, which are in C++."""
    calls: list[str] = []
    names = [name for name in dir(distributed) if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter"))]
    originals = {name: getattr(distributed, name) for name in [*names, "barrier"]}

    def counting(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        if callable(original):
            setattr(distributed, name, counting(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def collectives_of_steps():
    """Names of the collectives in the second of two steps, by task and kind of normalisers."""
    found = {}
    for task in OPTIONS:
        for is_global in (False, True):
            model, ddp = make_model(task, is_global)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
            step = TrainStep(ddp, optimizer, clip_gradients=build_gradient_clipper(tiny_config(task)), seed=0)
            step.data_loader = [share_of_batch(i, comm.get_rank(), comm.get_world_size()) for i in (0, 2)]
            for step.iter in range(2):
                with EventStorage(step.iter), counted_collectives() as calls:
                    step.run_step()
            found[task, is_global] = list(calls)
    return found


def signals_of_steps():
    """The agreed stop signal after each of two steps; the last process receives SIGTERM before the second."""
    model, ddp = make_model("instance", is_global=False)
    optimizer, signals = torch.optim.SGD(model.parameters(), lr=1e-4), StopSignals()
    clip = build_gradient_clipper(tiny_config("instance"))
    step = TrainStep(ddp, optimizer, clip_gradients=clip, seed=0, signals=signals)
    step.data_loader = [share_of_batch(i, comm.get_rank(), comm.get_world_size()) for i in (0, 2)]
    agreed = []
    for step.iter in range(2):
        if step.iter and comm.get_rank() == comm.get_world_size() - 1:
            signals.received = "SIGTERM"
        with EventStorage(step.iter):
            step.run_step()
        agreed.append(step.stop_signal)
    return agreed
