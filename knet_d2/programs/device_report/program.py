"""Report what works on a device and how fast it is: equality, training, speed, profile.

    %(prog)s --minutes 5                      # all parts, on the GPU if there is one
    %(prog)s --parts equality --device cpu    # one of them

Writes device_report.json and device_report.md into --output, after each step, so that a run that is cut off is not
lost. Parts that an earlier run on the same device wrote there stay until they are run again. A part that fails does not
end the others. The exit code is 1 if a step failed or an equality is out of tolerance.
A checkout also compares with the tensors recorded from the official release; an installed wheel does not have them.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...config.merging import choose_device
from ...errors import ConfigError
from ..benchmark.tables import environment
from . import equality, profile, speed, training
from .page import markdown
from .plan import SIZES, Setup, Step, Steps


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        share: its share of the time; the parts after it also get the time that it does not need.
        steps: yields its steps.
    """

    share: float
    steps: Steps


PARTS = {
    "equality": Part(0.25, equality.steps),
    "training": Part(0.35, training.steps),
    "profile": Part(0.1, profile.steps),
    "speed": Part(0.3, speed.steps),
}


class TimeLimit(BaseException):
    """The time of a part has ended. Not an Exception, so that no step takes it for an error of its own."""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="time for all parts (default: 5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best that there is")
    parser.add_argument("--size", choices=SIZES, help='amount of work; default: "small" on a CPU, else "full"')
    parser.add_argument("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    parser.add_argument("--output", type=Path, default=Path("output/device_report"), help="folder for JSON and page")
    parser.add_argument(
        "--beside", type=Path, metavar="JSON", help="another report, whose metrics and speeds the page shows as well"
    )
    return parser


def main(args: argparse.Namespace, recordings: Steps = lambda setup: ()) -> int:
    """Write the report.

    Args:
        recordings: yields further steps of the part "equality": comparisons with recorded tensors.

    Returns:
        The exit code.
    """
    device = torch.device(args.device or choose_device("cuda", explicit=False))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: PyTorch finds no CUDA GPU here. Use --device cpu.")
    if args.threads:
        torch.set_num_threads(args.threads)
    size = args.size or ("small" if device.type == "cpu" else "full")
    other = json.loads(args.beside.read_text()) if args.beside else None
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device_name": _device_name(device), "size": size, "environment": environment(device)}
    report["parts"] = _earlier_parts(args.output / "device_report.json", report)

    def write() -> None:
        (args.output / "device_report.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.output / "device_report.md").write_text(markdown(report, other))

    end = time.monotonic() + 60 * args.minutes
    shares = {name: PARTS[name].share for name in args.parts}
    with tempfile.TemporaryDirectory(prefix="device_report_") as folder, _quiet():
        setup = Setup(device, SIZES[size], Path(folder))
        for name in args.parts:
            limit = max(0.0, end - time.monotonic()) * shares[name] / sum(shares.values())
            del shares[name]
            part = {"command": shlex.join(["python", *sys.argv]), "limit": limit, "seconds": 0.0}
            report["parts"][name] = part = {**part, "rows": [], "failures": [], "not_run": []}
            further = recordings if name == "equality" else None
            run_part(PARTS[name].steps, further, setup, part, write)
    print(f"Wrote {args.output / 'device_report.md'} and .json")
    return int(not is_good(report))


def _earlier_parts(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of an earlier report in the same file; none if it is of another device, size or version."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(key) == json.loads(json.dumps(value)) for key, value in report.items())
    return earlier["parts"] if same else {}


def run_part(steps: Steps, further: Steps | None, setup: Setup, part: dict[str, Any], write: Any) -> None:
    """Run the steps of a part until its time ends; ``write`` is called after each of them.

    Args:
        part: has its "limit" in seconds; "rows", "failures", "not_run" and "seconds" are filled in.
    """
    start = time.monotonic()
    for step in _collected(steps, further, setup, part):
        left = part["limit"] - (time.monotonic() - start)
        if left <= 0:
            part["not_run"].append(step.name)
            continue
        print(f"  {step.name}", file=sys.stderr, flush=True)
        try:
            with time_limit(left), contextlib.redirect_stdout(io.StringIO()):  # evaluators print
                part["rows"] += step.run()
        except TimeLimit:
            part["not_run"].append(step.name)
        except Exception:
            part["failures"].append({"step": step.name, "traceback": traceback.format_exc()})
        part["seconds"] = time.monotonic() - start
        write()
    write()


def _collected(steps: Steps, further: Steps | None, setup: Setup, part: dict[str, Any]) -> list[Step]:
    """List all steps; an error while they are listed is a failure of the part."""
    found: list[Step] = []
    for source in filter(None, (further, steps)):
        try:
            found += source(setup)
        except Exception:
            part["failures"].append({"step": "list of steps", "traceback": traceback.format_exc()})
    return found


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in a ``with`` block after some seconds, where the system has such alarms (not on Windows)."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of training and evaluation in a ``with`` block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"MPS, {platform.machine()}" if device.type == "mps" else environment(device)["machine"]


def is_good(report: dict[str, Any]) -> bool:
    """Return whether no step failed and every equality is within its tolerance."""
    parts = report["parts"].values()
    return not any(part["failures"] for part in parts) and all(
        row.get("passed", True) for part in parts for row in part["rows"]
    )
