"""Cause a fault during a training run, remove the fault, resume, and compare with an uninterrupted run.

python -m checks.faults

The faults are: the disk is full, the disk becomes read-only, a worker process of the data loader is killed. This needs
Linux and the right to mount a file system in memory (root). The exit code is 1 if a run does not end with exactly one
error message, or if the resumed run ends differently from the uninterrupted one.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from knet_d2.data.shapes.writer import write_shapes
from knet_d2.programs import run

from .runs import Training, compare_runs, errors_in, write_config

ITERATIONS, PERIOD = 24, 4


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(folder: Path, training: Training) -> Iterator[None]:
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only_disk(folder: Path, training: Training) -> Iterator[None]:
    # Mount a second, read-only file system on top: the first one can't become read-only while files are open.
    mount(folder, "ro")
    yield
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def killed_loader(folder: Path, training: Training) -> Iterator[None]:
    pid = training.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    yield


FAULTS = {"full disk": full_disk, "read-only disk": read_only_disk, "killed loader": killed_loader}


def get_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def try_fault(name: str, whole: Path, run: Path, arguments: tuple) -> bool:
    """Return whether a run with a fault ends with one message, and equals the uninterrupted run after it is resumed."""
    run.mkdir()
    mount(run, "size=256m")
    try:
        log = run.parent / f"{run.name}.txt"
        training = Training(*arguments, run, log)
        training.wait_until((run / "last_checkpoint").exists)
        with FAULTS[name](run, training):
            training.process.join(120)
        text, code = training.output(), training.process.exitcode
        messages = errors_in(text)
        difference = "it did not end" if code is None else None
        if difference is None:
            Training(*arguments, run, log).finish()
            difference = compare_runs(whole, run)
        result = {"exit_code": code, "messages": messages, "tracebacks": text.count("Traceback")}
        print(name, json.dumps({**result, "resumed": difference or "identical"}, indent=1), flush=True)
        return code == 1 and len(messages) == 1 and difference is None
    finally:
        subprocess.run(["umount", str(run)], check=True)


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shapes(str(folder / "shapes"), 4, seed=5, size=64)
        solver = {"MAX_ITER": ITERATIONS, "CHECKPOINT_PERIOD": PERIOD, "LOG_PERIOD": 1, "CHECKPOINTS_TO_KEEP": 0}
        arguments = (write_config(folder, folder / "shapes", "panoptic", **solver), ["DATALOADER.NUM_WORKERS", "2"])
        whole = folder / "whole"
        whole.mkdir()
        Training(*arguments, whole, folder / "whole.txt").finish()
        good = [try_fault(fault, whole, folder / f"run{i}", arguments) for i, fault in enumerate(FAULTS)]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
