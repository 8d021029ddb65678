"""Check that memory, open files and threads do not grow in long runs: train a tiny model, then predict with it.

python -m checks.growth --iterations 2000

This prints the resident memory of all processes after the first tenth and at the end, and the slope of a line fitted to
the memory in between. The exit code is 1 if the line rises by 2 % or more, or if the number of files or threads grows.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.engine import HookBase

from knet_d2.data.shapes.writer import write_shapes
from knet_d2.engine import Predictor, Trainer, load_config
from knet_d2.programs import run

from .runs import write_config

MOST_GROWTH = 0.02
TASKS = ("instance", "panoptic", "semantic")


class Sample(NamedTuple):
    """Resources of this process and its child processes."""

    memory: float
    """Resident memory in MiB."""
    files: int
    threads: int


def processes() -> list[int]:
    """Return the ids of this process and its child processes."""
    pid = os.getpid()
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def take_sample() -> Sample:
    folders = [Path(f"/proc/{pid}") for pid in processes()]
    pages = sum(int((folder / "statm").read_text().split()[1]) for folder in folders)
    files = sum(len(os.listdir(folder / "fd")) for folder in folders)
    return Sample(pages * os.sysconf("SC_PAGESIZE") / 2**20, files, sum(len(os.listdir(x / "task")) for x in folders))


class SampleHook(HookBase):
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def after_step(self) -> None:
        self.samples.append(take_sample())


def judge(name: str, samples: list[Sample]) -> bool:
    """Print how much the resources grow; returns whether the growth is within the limits."""
    late = samples[len(samples) // 10 :]
    memory = np.array([sample.memory for sample in late])
    slope, start = np.polyfit(np.arange(len(late)), memory, 1)
    growth = slope * len(late) / start
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    first, second = ([max(sample[i] for sample in half) for i in (1, 2)] for half in halves)
    result = {
        "iterations": len(samples),
        "memory_mib": [round(memory[0], 1), round(memory[-1], 1)],
        "slope_mib_per_1000": round(1000 * slope, 3),
        "growth_percent": round(100 * growth, 2),
        "most_files_of_each_half": [first[0], second[0]],
        "most_threads_of_each_half": [first[1], second[1]],
    }
    print(name, json.dumps(result), flush=True)
    return growth < MOST_GROWTH and second[0] <= first[0] and second[1] <= first[1]


def train(config: str, iterations: int, folder: str) -> bool:
    """Check a training run with one worker process and 20 evaluations, pictures and checkpoints."""
    period = max(iterations // 20, 1)
    opts = ["OUTPUT_DIR", folder, "DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", iterations, "TEST.NUM_PICTURES", 1]
    trainer = Trainer(load_config(config, [*opts, "SOLVER.CHECKPOINT_PERIOD", period, "TEST.EVAL_PERIOD", period]))
    trainer.resume_or_load(resume=False)
    hook = SampleHook()
    trainer.register_hooks([hook])
    trainer.train()
    return judge("training", hook.samples)


def predict(config: str, iterations: int, folder: str) -> bool:
    """Check predictions on images of changing sizes."""
    predictor = Predictor(load_config(config, ["MODEL.WEIGHTS", os.path.join(folder, "model_final.pth")]))
    draw, samples = np.random.default_rng(0), []
    for _ in range(iterations):
        predictor(draw.integers(0, 256, (*draw.integers(24, 65, 2), 3), np.uint8))
        samples.append(take_sample())
    return judge("inference", samples)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--task", choices=TASKS, default="panoptic")
    return parser


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(os.path.join(folder, "shapes"), 4, seed=5, size=64)
        config = write_config(folder, os.path.join(folder, "shapes"), args.task)
        output = os.path.join(folder, "output")
        os.makedirs(output)
        return int(not all([part(config, args.iterations, output) for part in (train, predict)]))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
