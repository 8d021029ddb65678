"""Training steps that P processes share, for tests/test_processes.py; importable by the processes that it starts."""

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from helpers import make_example, tiny_model

# Instances of the images of every step's batch: none on the second half of the processes, none at all, all over
COUNTS = ([2, 3, 0, 0], [0, 0, 0, 0], [1, 0, 2, 4], [0, 0, 1, 0], [3, 1, 1, 2])
SIZE = (64, 64)
OPTIONS = {
    "instance": {"MODEL.RESNETS.NORM": "EvalBN"},
    "panoptic": {"MODEL.RESNETS.NORM": "EvalBN"},
    "semantic": {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.SEM_SEG_HEAD.NORM": "SyncBN", "MODEL.KNET.DROPOUT": 0.0},
}


def make_model(task, is_global):
    """A model in float64, in training mode, that DistributedDataParallel wraps where there are other processes."""
    options = {**OPTIONS[task], "MODEL.KNET.LOSS.GLOBAL_NORMALIZERS": is_global}
    model = tiny_model(task, options).double().train()
    return model, create_ddp_model(model, broadcast_buffers=False, device_ids=None)


def share_of_batch(step, rank, world_size):
    """What one of the processes gets of a step's batch."""
    batch = [make_example(SIZE, count, seed=10 * step + i) for i, count in enumerate(COUNTS[step])]
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


def train(task):
    """Five steps of SGD with global normalisers on this process's share of every batch.

    Returns:
        per step {"losses": name -> mean over the processes, "gradients": parameter -> tensor}.
    """
    model, ddp = make_model(task, is_global=True)
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


def train_and_save(path):
    """All tasks, and the losses of every process with local normalisers; the main process saves them."""
    results = {task: train(task) for task in OPTIONS}
    _, ddp = make_model("instance", is_global=False)
    losses = ddp(share_of_batch(0, comm.get_rank(), comm.get_world_size()))
    results["local"] = comm.all_gather(numbers(losses))
    if comm.is_main_process():
        torch.save(results, path)
