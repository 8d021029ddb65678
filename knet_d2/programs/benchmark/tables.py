"""Writes the measurements as tables and JSON."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .parts import REST

_PACKAGES = ("torch", "torchvision", "detectron2", "knet_d2", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the hardware, without the name of the machine, and the versions of the packages."""
    found = {
        "machine": f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main_table(rows: list[dict[str, Any]]) -> str:
    """Format one line per model and setting; a speed above 1 means faster than the first model of this setting."""
    lines = []
    for row in rows:
        line = {name: row[name] for name in ("model", "mode", "precision", "batch")}
        line["precision"] += " compiled" * row["compiled"]
        line["size"], line["output"] = _by(row["size"]), _by(row["output"])
        line["ms"] = f"{1000 * row['seconds']:.1f}"
        line["images/s"] = f"{row['batch'] / row['seconds']:.2f}"
        line["speed"] = f"{row['speed']:.2f}"
        memory = row["peak_mib"], row["returned_mib"]
        line["MiB"], line["of it returned"] = ("" if x is None else f"{x:.0f}" for x in memory)
        line["M params"] = f"{row['parameters'] / 1e6:.2f}"
        line["G mult-adds"] = f"{row['giga_multiply_adds']:.1f}"
        line["% of peak"] = f"{100 * row['share_of_matrix_rate']:.0f}"
        line["finds"] = ", ".join(f"{count} {name}" for name, count in row["findings"].items())
        lines.append(line)
    return tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def parts_table(rows: list[dict[str, Any]]) -> str:
    """Format each part's milliseconds, share and peak memory in one column, because models have different parts."""
    lines = []
    for row in rows:
        parts = {name: seconds for name, seconds in row["parts"].items() if not name.startswith("mapper")}
        total = sum(parts.values())
        order = sorted(parts, key=lambda name: name == REST)
        peaks = {name: f", {peak:.0f} MiB" for name, peak in row["parts_peak_mib"].items()}
        text = [
            f"{name} {1000 * parts[name]:.1f} ({100 * parts[name] / total:.1f} %{peaks.get(name, '')})"
            for name in order
        ]
        text += [f"{name} {1000 * s:.1f}" for name, s in row["parts"].items() if name.startswith("mapper")]
        if parts:
            lines.append([row["model"], row["mode"], _by(row["size"]), row["batch"], ", ".join(text)])
    headers = ["model", "mode", "size", "batch", "ms by part, with the most memory held"]
    return tabulate(lines, headers=headers, tablefmt="pipe")


def write_json(path: str, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Write all measurements with the command, the hardware and the versions."""
    command = " ".join(["python", *sys.argv])
    content = {"command": command, "environment": environment(device), "rows": rows}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
