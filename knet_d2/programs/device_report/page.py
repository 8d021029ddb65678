"""The page of the report in Markdown; it is made from the JSON alone."""

from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate

from .plan import Row

Part = dict[str, Any]
INTRODUCTION = {
    "equality": (
        "Results on this device in float32 without TF32, and in float64, against those of the CPU in float64, and "
        "against the tensors that were recorded from the official release (rows that begin with ref_ or train_). "
        "A difference is relative to the largest value, or the share of pixels or entries that differ. "
        "Gradients are compared as one vector."
    ),
    "training": (
        "Each run trains a small model on generated images from scratch, and evaluates it on other images. So few "
        "iterations do not train it fully: what counts is that losses and metrics of all precisions are alike."
    ),
    "speed": (
        'Random weights with which a model does as much work as with trained ones. "% of matrix rate" is the rate of '
        "multiply-adds relative to that of one large matrix product on the same device, in the same precision."
    ),
    "profile": (
        "What one training step and one inference of K-Net R50 panoptic launch and copy. A wait is an operator whose "
        "result the processor needs before it continues; on a CPU, where nothing waits, an operator that would wait."
    ),
}


def markdown(report: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> str:
    """Write a report as Markdown.

    Args:
        report: content of the JSON file.
        other: another report, whose values of the same training runs and speeds stand beside those of this one.
    """
    lines = [f"# Device report: {report['device_name']}", "", _verdict(report), ""]
    lines += [
        "```bash",
        *dict.fromkeys(part["command"] for part in report["parts"].values()),
        "```",
        "",
        _table([{"what": name, "found": x} for name, x in report["environment"].items() if x is not None]),
        "",
    ]
    lines += [_table([_summary(name, part) for name, part in report["parts"].items()]), ""]
    for name, part in report["parts"].items():
        lines += [f"## {name.capitalize()}", "", INTRODUCTION[name], ""]
        others = other["parts"].get(name, {}).get("rows", []) if other else []
        beside = other["device_name"] if other else ""
        for table in TABLES[name](part["rows"], others, beside):
            lines += [table, ""]
        if part["not_run"]:
            lines += [f"The time limit of this part ended before: {', '.join(part['not_run'])}.", ""]
        for failure in part["failures"]:
            lines += [f"**Failed: {failure['step']}**", "", "```", failure["traceback"].rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(report: Mapping[str, Any]) -> str:
    parts = report["parts"].values()
    failures = sum(len(part["failures"]) for part in parts)
    rows = [row for part in parts for row in part["rows"] if "passed" in row]
    wrong = sum(not row["passed"] for row in rows)
    not_run = sum(len(part["not_run"]) for part in parts)
    sentences = [f"{len(rows) - wrong} of {len(rows)} equalities are within their tolerance."]
    sentences.append(f"{failures} steps failed." if failures else "No step failed.")
    if not_run:
        sentences.append(f"Steps that the time limit left out: {not_run}.")
    return " ".join(sentences)


def _summary(name: str, part: Part) -> Row:
    return {
        "part": name,
        "rows": len(part["rows"]),
        "out of tolerance": sum(not row.get("passed", True) for row in part["rows"]),
        "failed steps": len(part["failures"]),
        "not run": len(part["not_run"]),
        "seconds": f"{part['seconds']:.0f}",
        "limit": f"{part['limit']:.0f}",
    }


def _table(rows: list[Row]) -> str:
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def _equality(rows: list[Row], others: list[Row], beside: str) -> list[str]:
    lines = [
        {
            "": "" if row["passed"] else "**out of tolerance**",
            "comparison": row["check"],
            "type": row["type"],
            "difference": f"{row['difference']:.1e}",
            "allowed": f"{row['tolerance']:.1e}",
            "of what": row["detail"],
        }
        for row in sorted(rows, key=lambda row: row["passed"])
    ]
    return [_table(lines)]


def _training(rows: list[Row], others: list[Row], beside: str) -> list[str]:
    keys = ("run", "iterations", "batch", "images")
    values = {tuple(row.get(key) for key in keys): row for row in others if "value" in row}
    lines = []
    for row in rows:
        line = {"run": row["run"], "iterations x batch": "", "loss": "", "result": "", beside: "", "seconds": ""}
        if "value" in row:
            same = values.get(tuple(row[key] for key in keys))
            line["iterations x batch"] = f"{row['iterations']} x {row['batch']}"
            line["loss"], line["seconds"] = f"{row['loss']:.3f}", f"{row['seconds']:.1f}"
            line["result"] = f"{row['metric']} {row['value']:.2f}"
            line[beside] = f"loss {same['loss']:.3f}, {same['metric']} {same['value']:.2f}" if same else ""
        if not beside:
            del line[beside]
        lines.append({**line, "note": row.get("note", "")})
    return [_table(lines)]


_SETTING = ("model", "mode", "batch", "precision", "channels_last", "compiled", "image")


def _speed(rows: list[Row], others: list[Row], beside: str) -> list[str]:
    values = {str([row[key] for key in _SETTING]): row for row in others}
    lines = []
    for row in rows:
        same = values.get(str([row[key] for key in _SETTING]))
        memory = {None: "", False: "contiguous", True: "channels_last"}[row["channels_last"]]
        line = {
            "model": row["model"].removesuffix(".yaml"),
            "mode": row["mode"],
            "batch": row["batch"],
            "precision": row["precision"],
            "format": memory,
            "compiled": "yes" if row["compiled"] else "",
            "images/s": f"{row['images_per_second']:.2f}",
            beside: f"{same['images_per_second']:.2f}" if same else "",
            "MiB": "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            "% of matrix rate": f"{100 * row['share_of_matrix_rate']:.0f}",
        }
        if not beside:
            del line[beside]
        lines.append(line)
    sizes = sorted({" x ".join(map(str, row["image"])) for row in rows})
    return [_table(lines), *([f"Images: {', '.join(sizes)}."] if sizes else [])]


def _profile(rows: list[Row], others: list[Row], beside: str) -> list[str]:
    counts = [row for row in rows if "line" not in row]
    waits = [{**row, "milliseconds": f"{row['milliseconds']:.2f}"} for row in rows if "line" in row]
    tables = [_table(counts)]
    return [*tables, "The longest waits, summed by source line:", _table(waits)] if waits else tables


TABLES: dict[str, Callable[[list[Row], list[Row], str], list[str]]] = {
    "equality": _equality,
    "training": _training,
    "speed": _speed,
    "profile": _profile,
}
