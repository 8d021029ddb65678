"""Predict many small images on Ray, kill its processes by SIGKILL at random moments, and compare with one calm run.

    python -m checks.bulk_kills --images 5000 --kills 20

The model is tiny and has random weights, the images are noise, and every 500th one is broken. Every second process is
killed when it has a temporary file open. The exit code is 1 if a file differs from that of the calm run, which one
process makes without Ray, or if not all kills took place.
"""

import argparse
import functools
import hashlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from detectron2.modeling import build_model
from PIL import Image

from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.config.merging import load_config
from knet_d2.data.shapes.writer import write_shapes
from knet_d2.inference.bulk import Share
from knet_d2.inference.ray_bulk import run_on_ray
from knet_d2.programs import predict_bulk, run

from .runs import write_config

BROKEN = 500
# Seconds in which a process is killed after the last one, at most
SECONDS = 4.0
# Seconds that a process may take until it writes; it may have to start first
PATIENCE = 40.0
NAME = b"ray::MapWorker(MapBatches(_Shards))"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--actors", type=int, default=2, help="processes that predict")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    return parser


def write_inputs(folder: Path, count: int) -> list[str]:
    """Write a model and the images; returns the first arguments of predict_bulk."""
    write_shapes(str(folder / "shapes"), 2, seed=5, size=64)
    cfg = load_config(write_config(folder, folder / "shapes", "panoptic"))
    save_weights(str(folder / "model.pth"), build_model(cfg).state_dict(), describe_model(cfg))
    (folder / "images").mkdir()
    rng = np.random.RandomState(0)
    for i in range(count):
        path = folder / "images" / f"{i:05d}.png"
        if i % BROKEN == BROKEN - 1:
            path.write_bytes(b"broken")
        else:
            Image.fromarray(rng.randint(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), Image.BICUBIC).save(path)
    sizes = ["--shard-size", "20", "--batch-size", "4", "--confidence-threshold", "0"]
    return [str(folder / "model.pth"), "--input", str(folder / "images"), "--device", "cpu", *sizes]


def descendants(parent: int) -> set[int]:
    """The processes that one has started, and that these have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            pass
    found, new = set(), {parent}
    while new:
        new = {process for process, its_parent in parents.items() if its_parent in new}
        found |= new
    return found


def predicting() -> list[int]:
    """The processes of this run's actors."""
    found = []
    for process in descendants(os.getpid()):
        try:
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(NAME):
                found.append(process)
        except OSError:
            pass
    return sorted(found)


def is_writing(process: int) -> bool:
    """Whether a process has a temporary file open."""
    try:
        return any(os.readlink(x).endswith(".tmp") for x in os.scandir(f"/proc/{process}/fd"))
    except OSError:  # it has ended, or has just closed a file
        return False


def kill_some(count: int, draw: random.Random, ended: threading.Event, killed: list[int]) -> None:
    """Kill processes until the end; notes their numbers."""
    while len(killed) < count and not ended.wait(draw.uniform(0, SECONDS)):
        processes = predicting()
        if not processes:
            continue
        process, deadline = draw.choice(processes), time.monotonic() + PATIENCE
        try:
            if len(killed) % 2:
                os.kill(process, signal.SIGSTOP)
                while not is_writing(process) and time.monotonic() < deadline and not ended.is_set():
                    os.kill(process, signal.SIGCONT)
                    time.sleep(draw.uniform(0, 0.005))
                    os.kill(process, signal.SIGSTOP)
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed.append(process)


def hashes(folder: Path) -> dict[str, str]:
    """Hash of each file of results; what a killed process was writing is left out, as no row names it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = write_inputs(folder, args.images)
        calm, disturbed = (
            predict_bulk.get_parser().parse_args([*words, "--output", str(folder / x)]) for x in ("calm", "disturbed")
        )
        start = time.monotonic()
        job = predict_bulk.open_job(calm)
        *_, last = job.run(Share())
        print(f"calm, 1 process: {last.predicted} rows, {last.broken} of them errors; {time.monotonic() - start:.0f} s")
        start, ended, killed = time.monotonic(), threading.Event(), list[int]()
        killer = threading.Thread(target=kill_some, args=(args.kills, random.Random(args.seed), ended, killed))
        killer.start()
        try:
            *_, last = run_on_ray(functools.partial(predict_bulk.open_job, disturbed), job.num_shards, args.actors)
        finally:
            ended.set()
            killer.join()
        rows = last.predicted + last.found
        print(f"Ray, {args.actors} processes: {rows} rows; {time.monotonic() - start:.0f} s")
        writing = {path.name.split(".")[-2] for path in (folder / "disturbed").rglob("*.tmp")}
        print(f"killed: {len(killed)}, of these while writing: {len(writing)}")
        expected, found = hashes(folder / "calm"), hashes(folder / "disturbed")
        different = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
        print(f"files: {len(expected)}, different: {len(different)} {sorted(different)[:5]}")
    return 1 if different or len(killed) < args.kills else 0


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
