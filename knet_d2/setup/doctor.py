"""Report what is installed, what is missing, and which command repairs it: ``python -m knet_d2.doctor``.

The doctor imports only the standard library, and imports the packages in another process. It therefore also runs if
torch or Detectron2 is missing or broken.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from .dependencies import DEPENDENCIES, OPTIONAL, PYTHON, Dependency

OK, NOT_THERE, MISSING, TOO_OLD, BROKEN = "ok", "optional", "missing", "too old", "broken"

# The table shows the location of these; all other packages are usually in the folder of Python.
_LOCATED = ("Python", "detectron2", "knet_d2")

# Program of the other process: imports the packages given as JSON, and prints one JSON line for each. After a crash of
# the interpreter, the lines show which package caused it.
_PROBE = """
import contextlib, importlib, importlib.metadata, json, os, sys
real_stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # send the packages' own output to stderr, so that stdout has only our lines
for name, distribution, probes in json.loads(sys.argv[1]):
    row = {"module": name}
    try:
        module = importlib.import_module(name)
        row["location"] = os.path.dirname(getattr(module, "__file__", None) or "") or None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            row["version"] = getattr(module, "__version__", None) or importlib.metadata.version(distribution)
        for probe in probes:
            importlib.import_module(probe)
        if name == "torch":
            cuda, devices = module.cuda, "MPS" if module.backends.mps.is_available() else "CPU only"
            names = ", ".join(cuda.get_device_name(i) for i in range(cuda.device_count()))
            row["device"] = f"CUDA: {names}" if cuda.is_available() else devices
        if name == "detectron2":
            row["extension"] = "without compiled extension"
            with contextlib.suppress(ImportError):
                importlib.import_module("detectron2._C")
                row["extension"] = "with compiled extension"
    except BaseException as error:
        row["error"] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
        row["missing"] = error.name if isinstance(error, ModuleNotFoundError) else None
    print(json.dumps(row), file=real_stdout, flush=True)
"""


class Row(NamedTuple):
    """One line of the doctor's table."""

    part: str
    found: str
    status: str
    command: str = ""


def probe(dependencies: Sequence[Dependency]) -> list[dict]:
    """Import each dependency in another process.

    Returns:
        One dict for each dependency, with module and, as far as they are known, location, version, error, missing
        (name of the module that an import did not find), device (torch) and extension (detectron2).
    """
    rows: list[dict] = []
    while len(rows) < len(dependencies):
        rest = [(d.module, d.distribution, d.probes) for d in dependencies[len(rows) :]]
        done = subprocess.run([sys.executable, "-c", _PROBE, json.dumps(rest)], capture_output=True, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
        if len(rows) < len(dependencies):
            error = f"importing it ended the process with status {done.returncode}"
            rows.append({"module": dependencies[len(rows)].module, "error": error})
    return rows


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "2.14.1+cu130" -> (2, 14, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


def judge(dependency: Dependency, result: dict) -> Row:
    """Make a line of the table from the result of :func:`probe`."""
    module, minimum, version = dependency.module, dependency.minimum, result.get("version")
    command = dependency.command or f"python -m pip install --upgrade {dependency.distribution}"
    if "error" in result:
        if dependency in OPTIONAL and result.get("missing") == module:
            return Row(module, f"not installed, for {OPTIONAL[dependency]}", NOT_THERE, command)
        missing = (result.get("missing") or "").partition(".")[0]
        if result.get("missing") == module:
            return Row(module, "", MISSING, command)
        if missing and missing != module:
            command = f"install {missing} first (see its line, or: python -m pip install {missing})"
        elif module == "detectron2":
            command = f"python -m pip uninstall detectron2; {command}"
        elif not dependency.command:
            command = f"python -m pip install --force-reinstall --no-deps {dependency.distribution}"
        return Row(module, result["error"], BROKEN, command)
    if minimum and version and version_tuple(version) < version_tuple(minimum):
        return Row(module, f"{version}, at least {minimum} is needed", TOO_OLD, command)
    location = f"in {result['location']}" if module in _LOCATED else None
    return Row(module, " ".join(filter(None, [version, result.get("extension"), location])), OK)


def examine() -> list[Row]:
    """Examine this installation; returns the lines of the table: Python, requirements, knet_d2, optional packages."""
    python = Dependency("Python", "Python", PYTHON, "use a newer Python")
    rows = [judge(python, {"version": platform.python_version(), "location": sys.prefix})]
    ourselves = Dependency("knet_d2", "knet_d2", command="repair the lines above first", probes=("knet_d2.engine",))
    dependencies = [*DEPENDENCIES, ourselves, *OPTIONAL]
    for dependency, result in zip(dependencies, probe(dependencies)):
        rows.append(judge(dependency, result))
        if "device" in result:
            rows.append(Row("device", result["device"], OK))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Format rows as a text table; long cells are wrapped."""
    lines = []
    for part, found, status, command in (Row("part", "found", "status", "how to repair it"), *rows):
        first, *more = textwrap.wrap(found, 50) or [""]
        lines.append(f"{part:12} {status:8} {first:50} {command}".rstrip())
        lines += [" " * 22 + line for line in more]
    lines.insert(1, "-" * 110)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns exit code 1 if a requirement is missing, too old or broken, else 0."""
    argparse.ArgumentParser(prog="python -m knet_d2.doctor", description="Report what is installed.").parse_args(argv)
    rows = examine()
    print(format_table(rows))
    bad = sum(row.status not in (OK, NOT_THERE) for row in rows)
    print(f"\n{bad} of {len(rows)} need attention." if bad else "\nEverything that is required is installed.")
    return 1 if bad else 0
