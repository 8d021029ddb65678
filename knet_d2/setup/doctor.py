"""Say what is installed, what is missing and which command mends it: ``python -m knet_d2.doctor``.

Standard library only, so that it runs where torch or Detectron2 is missing or broken: packages are imported in another
process.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from .dependencies import DEPENDENCIES, PYTHON, Dependency

OK, MISSING, TOO_OLD, BROKEN = "ok", "missing", "too old", "broken"

# Where these are is worth a line; the others are where Python is.
_LOCATED = ("detectron2", "knet_d2")

# Runs in the other process: imports the groups of modules given as JSON and prints one JSON line for each, so that a
# crash of the interpreter costs only the group that caused it.
_PROBE = """
import importlib, importlib.metadata, json, os, sys
real_stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the packages print must not get between the lines
for name, distribution, probes in json.loads(sys.argv[1]):
    row = {"module": name}
    try:
        module = importlib.import_module(name)
        row["location"] = os.path.dirname(getattr(module, "__file__", None) or "") or None
        version = getattr(module, "__version__", None)
        try:
            row["version"] = str(version or importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            pass
        for probe in probes:
            importlib.import_module(probe)
        if name == "torch":
            if module.cuda.is_available():
                row["device"] = ", ".join(module.cuda.get_device_name(i) for i in range(module.cuda.device_count()))
                row["device"] = "CUDA: " + row["device"]
            else:
                row["device"] = "MPS" if module.backends.mps.is_available() else "CPU only"
        if name == "detectron2":
            try:
                importlib.import_module("detectron2._C")
                row["extension"] = "with compiled extension"
            except ImportError:
                row["extension"] = "without compiled extension"
    except BaseException as error:
        row["error"] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
        row["missing"] = error.name if isinstance(error, ModuleNotFoundError) else None
    print(json.dumps(row), file=real_stdout, flush=True)
"""


class Row(NamedTuple):
    """One line of the table."""

    part: str
    found: str
    status: str
    command: str = ""


def probe(dependencies: Sequence[Dependency]) -> list[dict]:
    """Import each dependency in another process.

    Returns:
        One dict for each: module, and as far as known location, version, error, missing (name of the module that
        an import did not find), device (torch), extension (detectron2).
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
    """The leading numbers of a version: "2.14.1+cu130" -> (2, 14, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


def judge(dependency: Dependency, result: dict) -> Row:
    """Make a line of the table from what :func:`probe` found."""
    version = result.get("version")
    location = f"in {result.get('location')}" if dependency.module in _LOCATED else None
    found = " ".join(filter(None, [version, result.get("extension"), location]))
    command = dependency.command or f"python -m pip install --upgrade {dependency.distribution}"
    if "error" in result:
        missing = result.get("missing") == dependency.module
        if missing:
            return Row(dependency.module, "", MISSING, command)
        return Row(dependency.module, result["error"], BROKEN, _mend_broken(dependency, result, command))
    if dependency.minimum and version and version_tuple(version) < version_tuple(dependency.minimum):
        return Row(dependency.module, f"{version}, at least {dependency.minimum} is needed", TOO_OLD, command)
    return Row(dependency.module, found, OK)


def _mend_broken(dependency: Dependency, result: dict, command: str) -> str:
    """The command for a package that is there but can't be imported."""
    culprit = (result.get("missing") or "").partition(".")[0]
    if culprit and culprit != dependency.module:
        return f"install {culprit} first (see its line, or: python -m pip install {culprit})"
    if dependency.module == "detectron2":
        return f"python -m pip uninstall detectron2; {command}"
    if dependency.command:
        return command
    return f"python -m pip install --force-reinstall --no-deps {dependency.distribution}"


def examine() -> list[Row]:
    """Examine this installation; the table's lines from Python to knet_d2."""
    ourselves = Dependency("knet_d2", "knet_d2", command="mend the lines above first")
    dependencies = [*DEPENDENCIES, ourselves]
    results = probe(dependencies)
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= PYTHON:
        rows = [Row("Python", f"{python} in {sys.prefix}", OK)]
    else:
        needed = ".".join(map(str, PYTHON))
        rows = [Row("Python", f"{python}, at least {needed} is needed", TOO_OLD, "use a newer Python")]
    for dependency, result in zip(dependencies, results):
        rows.append(judge(dependency, result))
        if "device" in result:
            rows.append(Row("device", result["device"], OK))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Lay out rows as a table of text; long cells are wrapped."""
    widths = {"part": 12, "status": 8, "found": 50}
    header = Row("part", "found", "status", "what mends it")
    lines = []
    for row in (header, *rows):
        found = textwrap.wrap(row.found, widths["found"]) or [""]
        start = f"{row.part:{widths['part']}} {row.status:{widths['status']}} "
        lines.append(f"{start}{found[0]:{widths['found']}} {row.command}".rstrip())
        lines += [" " * len(start) + more for more in found[1:]]
        if row is header:
            lines.append("-" * 110)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when something that is required is missing, too old or broken."""
    if argv if argv is not None else sys.argv[1:]:
        print("usage: python -m knet_d2.doctor", file=sys.stderr)
        return 2
    rows = examine()
    print(format_table(rows))
    bad = [row for row in rows if row.status != OK]
    print(f"\n{len(bad)} of {len(rows)} need attention." if bad else "\nAll is well.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
