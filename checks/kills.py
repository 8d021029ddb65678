"""Kill training runs by SIGKILL at random times, resume them, and compare each with an uninterrupted run.

python -m checks.kills --runs 25

Every second run is killed while it writes a checkpoint. All runs train a tiny panoptic model on the CPU, with 2 worker
processes of the data loader. The exit code is 1 if a run does not end with exactly the same weights, optimiser state
and metrics file.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from knet_d2.data.shapes.writer import write_shapes
from knet_d2.programs import run

from .runs import Training, compare_runs, write_config

ITERATIONS, PERIOD, EVALUATIONS = 48, 6, 16


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    return parser


def count_lines(path: Path) -> int:
    """Count the iterations in a metrics file; an incomplete line is not counted."""
    return sum(line.endswith("\n") for line in open(path)) if path.exists() else 0


def kill(training: Training, folder: Path, iterations: int, seconds: float, while_writing: bool) -> None:
    """Kill a training run some seconds after an iteration, or when it writes the next checkpoint after that."""
    training.wait_until(lambda: count_lines(folder / "metrics.json") >= iterations)
    time.sleep(seconds)
    if while_writing:
        training.wait_until(lambda: bool(list(folder.glob(".model_*.tmp"))))
    assert training.process.is_alive(), training.output()
    training.process.kill()
    training.process.join()


def main(args: argparse.Namespace) -> int:
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shapes(str(folder / "shapes"), 4, seed=5, size=64)
        solver = {"MAX_ITER": ITERATIONS, "CHECKPOINT_PERIOD": PERIOD, "LOG_PERIOD": 1, "WARMUP_ITERS": 0}
        config = write_config(folder, folder / "shapes", "panoptic", **solver)
        opts = ["DATALOADER.NUM_WORKERS", "2", "TEST.EVAL_PERIOD", str(EVALUATIONS)]

        def train(output: Path) -> Training:
            return Training(config, opts, output, f"{output}.txt")

        whole = folder / "whole"
        train(whole).finish()
        writing = different = 0
        for number in range(args.runs):
            run, while_writing = folder / f"run{number}", number % 2 == 1
            kill(train(run), run, draw.randint(PERIOD, ITERATIONS - PERIOD - 1), draw.uniform(0, 0.5), while_writing)
            unfinished = bool(list(run.glob(".*.tmp")))
            writing += unfinished
            done = count_lines(run / "metrics.json")
            resumed = int(re.findall(r"Training from iteration (\d+)", train(run).finish())[-1])
            difference = compare_runs(whole, run)
            # -1: killed between the checkpoint of an iteration and its line in metrics.json, which is written after it
            if difference is None and not (resumed > 0 and -1 <= done - resumed <= PERIOD):
                difference = f"{done - resumed} iterations were lost"
            different += difference is not None
            moment = f"{done}, while it wrote a file" if unfinished else done
            result = difference or "identical"
            print(f"run {number}: killed after iteration {moment}, resumed at {resumed}: {result}", flush=True)
    print(json.dumps({"runs": args.runs, "killed_while_writing": writing, "different": different}))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
