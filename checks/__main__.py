"""Run the checks one after another, and write date, commit and result of each to LAST_RUN.json.

python -m checks                  # all checks, some hours; `make check` first trains the model for the check exports
python -m checks kills growth     # these checks
python -m checks references --references FOLDER
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from knet_d2.programs import run

ROOT = Path(__file__).resolve().parents[1]
LAST_RUN = ROOT / "checks" / "LAST_RUN.json"
FUZZED = {"annotations": 15000, "panoptic": 15000, "images": 15000, "weights": 15000, "configs": 1000}

# Name -> commands without "python"; {references}, {weights} and {folder} (a temporary folder) are replaced.
CHECKS = {
    "house": ["-m checks.house"],
    "references": ["-m checks.references --references {references}"],
    "mutations": ["-m checks.references --references {references} --mutate all"],
    "configs": ["-m checks.configs"],
    "exports": [
        "tools/export_model.py {weights} {folder}/model.onnx {folder}/model.pt2",
        "-m checks.exports {weights} {folder}/model.onnx {folder}/model.pt2 --images datasets/shapes/v1/val/images",
        # Models of 16 bits and floats, of one channel and of five
        "-m pytest -q tests/test_pixels.py -k from_training_to_onnxruntime",
    ],
    "kills": ["-m checks.kills --runs 25"],
    "faults": ["-m checks.faults"],
    "growth": ["-m checks.growth --iterations 2000"],
    "fuzzing": [f"-m checks.fuzzing {kind} --count {count}" for kind, count in FUZZED.items()],
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"checks to run: {', '.join(CHECKS)}; default: all")
    parser.add_argument("--references", default="tests/data/references", help="folder with the recorded tensors")
    parser.add_argument(
        "--weights", default="output/shapes_panoptic/model_final.pth", help="weights of the exported model"
    )
    return parser


def run_check(name: str, args: argparse.Namespace) -> dict[str, str | int]:
    """Run the commands of a check until one fails; returns its entry in LAST_RUN.json."""
    entry: dict[str, str | int] = {"date": f"{datetime.date.today()}", "commit": commit(), "result": "passed"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for command in CHECKS[name]:
            words = command.format(folder=folder, references=args.references, weights=args.weights).split()
            print(f"\n$ python {shlex.join(words)}", flush=True)
            code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
            if code:
                entry["result"] = f"failed with exit code {code}: python {command}"
                break
    return {**entry, "seconds": round(time.monotonic() - start)}


def commit() -> str:
    """Return the current commit, with "-dirty" appended if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main(args: argparse.Namespace) -> int:
    entries = json.loads(LAST_RUN.read_text()) if LAST_RUN.exists() else {}
    names = args.names or list(CHECKS)
    for name in names:
        entries[name] = run_check(name, args)
        LAST_RUN.write_text(json.dumps({x: entries[x] for x in CHECKS if x in entries}, indent=2) + "\n")
    for name in names:
        print(f"{name:12s} {entries[name]['seconds']:6d} s  {entries[name]['result']}")
    return int(any(entries[name]["result"] != "passed" for name in names))


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
