"""Part "training": the generated shapes, in all tasks and precisions, one run stopped and resumed, and evaluated."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from ...config.files import get_config_file
from ...data.shapes import shapes_entries, write_shapes
from ...engine import Trainer, load_config
from ...engine.stop_signals import Preempted
from ...engine.train_step import amp_dtype
from ...errors import ConfigError
from ...evaluation import best_metric
from .plan import Row, Setup, Step

TASKS = ("panoptic", "instance", "semantic")
# Name in the table -> SOLVER.AMP.DTYPE; "" is full precision
PRECISIONS = {"fp32": "", "bf16": "bfloat16", "fp16": "float16"}
# The run that is also stopped and resumed
RESUMED = ("panoptic", "fp32")


def steps(setup: Setup) -> Iterator[Step]:
    """Yield the training runs; the first one writes the images."""
    for precision in PRECISIONS:
        for task in TASKS:
            name = f"{task}, {precision}"
            yield Step(name, partial(train, setup, task, precision))
            if (task, precision) == RESUMED:
                yield Step(f"{name}, resumed", partial(resume, setup, task, precision))


def config(setup: Setup, task: str, precision: str, name: str) -> CfgNode:
    """Return the config of a run; its data sets are written and registered if they are not yet."""
    size, data = setup.size, {}
    for split, count in (("train", size.num_train), ("val", size.num_val)):
        folder = setup.folder / f"shapes_{split}"
        if not folder.exists():
            write_shapes(str(folder), count, seed=1 if split == "train" else 2, size=size.train_side)
        data[split] = {"name": f"{setup.folder.name}_{task}_{split}", **shapes_entries(str(folder))[task]}
    output = setup.folder / name
    output.mkdir(exist_ok=True)
    values = {
        "MODEL.DEVICE": str(setup.device),
        "DATASETS.CUSTOM": list(data.values()),
        "DATASETS.TRAIN": [data["train"]["name"]],
        "DATASETS.TEST": [data["val"]["name"]],
        "DATALOADER.NUM_WORKERS": 0 if setup.device.type == "cpu" else 4,
        "INPUT.MIN_SIZE_TRAIN": [size.train_side],
        "INPUT.MIN_SIZE_TEST": size.train_side,
        "SOLVER.IMS_PER_BATCH": size.train_batch,
        "SOLVER.MAX_ITER": size.iterations,
        "SOLVER.WARMUP_ITERS": size.iterations // 10,
        "SOLVER.STEPS": [],
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "SOLVER.LOG_PERIOD": 0,
        "SOLVER.AMP.ENABLED": bool(PRECISIONS[precision]),
        "SOLVER.AMP.DTYPE": PRECISIONS[precision] or "float16",
        "TEST.EVAL_PERIOD": 0,
        "TEST.NUM_PICTURES": 0,
        "OUTPUT_DIR": str(output),
    }
    options = dict(option.split("=", 1) for option in size.options)
    opts = [str(item) for pair in {**options, **values}.items() for item in pair]
    return load_config(get_config_file(f"shapes/{task}.yaml"), opts)


class _FinalLoss(HookBase):
    """Keeps the mean loss of the last ``steps`` of a run."""

    def __init__(self, steps: int):
        self.losses: deque[float] = deque(maxlen=steps)

    def after_step(self) -> None:
        self.losses.append(self.trainer.storage.history("total_loss").latest())

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


def _final_loss(setup: Setup) -> _FinalLoss:
    return _FinalLoss(max(1, setup.size.iterations // 10))


class _StopAfter(HookBase):
    """Sends this process a SIGTERM after a number of steps, as a scheduler does before it ends a job."""

    def __init__(self, steps: int):
        self.steps = steps

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.steps:
            os.kill(os.getpid(), signal.SIGTERM)


def _trainer(cfg: CfgNode, hook: HookBase, *, resume: bool) -> Trainer:
    """Build a trainer whose initial weights depend on the seed of the config alone."""
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.register_hooks([hook])
    trainer.resume_or_load(resume=resume)
    return trainer


def train(setup: Setup, task: str, precision: str) -> list[Row]:
    """Train and evaluate once; a precision that the device does not support gives a line that says so."""
    try:
        amp_dtype(precision != "fp32", PRECISIONS[precision], setup.device)
    except ConfigError as error:
        return [{"run": f"{task}, {precision}", "note": str(error)}]
    loss = _final_loss(setup)
    trainer = _trainer(config(setup, task, precision, f"{task}_{precision}"), loss, resume=False)
    start = time.perf_counter()
    results = trainer.train()
    return [_row(setup, f"{task}, {precision}", trainer.cfg, loss, results, time.perf_counter() - start)]


def resume(setup: Setup, task: str, precision: str) -> list[Row]:
    """Repeat a run, stop it by SIGTERM in its middle, resume it, and compare its weights with those of the first."""
    name = f"{task}_{precision}_resumed"
    cfg, loss = config(setup, task, precision, name), _final_loss(setup)
    start = time.perf_counter()
    stopped = _trainer(cfg, _StopAfter(max(1, setup.size.iterations // 2)), resume=False)
    try:
        stopped.train()
        raise RuntimeError("SIGTERM did not stop the training run")
    except Preempted:
        pass
    trainer = _trainer(cfg, loss, resume=True)
    if trainer.start_iter != stopped.iter + 1:
        raise RuntimeError(f"resumed at iteration {trainer.start_iter}, stopped after {stopped.iter}")
    results = trainer.train()
    row = _row(setup, f"{task}, {precision}, resumed", cfg, loss, results, time.perf_counter() - start)
    row["note"] = f"weights differ from those of the run without a stop by {_weight_difference(setup, name):.1e}"
    return [row]


def _weight_difference(setup: Setup, name: str) -> float:
    """Return the largest difference of a weight, relative to the largest weight of its tensor; 0 on a CPU."""
    folders = setup.folder / name.removesuffix("_resumed"), setup.folder / name
    models = [
        torch.load(folder / "model_final.pth", weights_only=True, map_location="cpu")["model"] for folder in folders
    ]
    pairs = [(x.double(), models[1][key].double()) for key, x in models[0].items() if x.is_floating_point()]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)) for x, y in pairs)


def _row(setup: Setup, run: str, cfg: CfgNode, loss: _FinalLoss, results: Any, seconds: float) -> Row:
    group, metric = best_metric(cfg).split("/")
    return {
        "run": run,
        "iterations": setup.size.iterations,
        "batch": setup.size.train_batch,
        "images": setup.size.num_val,
        "loss": loss.mean,
        "metric": metric,
        "value": float(results[group][metric]),
        "seconds": seconds,
    }
