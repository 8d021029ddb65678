"""The HTML of the report: one page without scripts and without anything from elsewhere. All text is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from .charts import NUM_COLORS, line_chart
from .section import ClassRow, Curve, Metric, Section, Thresholds

# The confusion matrix has at most this number of classes; the last one then stands for all others.
_MOST_CLASSES = 30
# At most this number of classes have a precision-recall curve of their own.
_MOST_CLASS_CURVES = 48

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #57606a; --back: #ffffff; --line: #d0d7de;
  --right: 26, 127, 55; --wrong: 207, 34, 46; --mark: #fff3c4;
  --c0: #0757c2; --c1: #c2410c; --c2: #1a7f37; --c3: #8250df; --c4: #b0157a; --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --dim: #9aa4af; --back: #0d1117; --line: #30363d;
  --right: 63, 185, 80; --wrong: 248, 81, 73; --mark: #4a3c0a;
  --c0: #6cb0ff; --c1: #ff9a57; --c2: #56d364; --c3: #c8a6ff; --c4: #ff8fcf; --c5: #9aa4af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } h3 { font-size: 1.05rem; margin-top: 1.8rem; }
.dim, figcaption { color: var(--dim); font-size: 0.9rem; }
.metrics { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; padding: 0; list-style: none; }
.metrics b { display: block; font-size: 1.6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.small { grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 12px; } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { margin: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: 0.85rem; }
.legend i { display: inline-block; width: 1em; height: 0.25em; margin-right: 0.4em; vertical-align: middle; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; } th[scope=row] { text-align: left; min-width: 7rem; max-width: 16rem;
  white-space: normal; } tr.mark { background: var(--mark); }
.matrix th[scope=col] { writing-mode: vertical-rl; text-align: left; max-height: 12rem; }
.matrix td { text-align: center; padding: 0.2rem 0.4rem; } .zero { color: var(--dim); }
img { width: 100%; height: auto; display: block; }
"""
_COLORS = "\n".join(
    f"svg .c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }} i.c{i} {{ background: var(--c{i}); }}"
    for i in range(NUM_COLORS)
)


# In the head of the page: the threshold for the main output on the first data set
RECOMMENDED = '<meta name="recommended-score-threshold" content="{}">'


class Picture(NamedTuple):
    """A validation image, as JPEG, with its quality (0 to 1)."""

    name: str
    quality: float
    jpeg: bytes


class DatasetReport(NamedTuple):
    """What the page shows of one data set."""

    name: str
    sections: Sequence[Section]
    pictures: Sequence[Picture]


def page(title: str, charts: Sequence[str], datasets: Sequence[DatasetReport], results: dict[str, float]) -> bytes:
    """Make the page.

    Args:
        title: the heading.
        charts: charts of the training run.
        datasets: the evaluated data sets.
        results: all metrics by name.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if charts:
        body.append(f'<h2>Training run</h2><div class="charts">{"".join(charts)}</div>')
    for dataset in datasets:
        body += [_section(section, dataset.name) for section in dataset.sections]
        body.append(_pictures(dataset))
    main = next((x.sections[0].thresholds for x in datasets if x.sections), None)
    recommended = "" if main is None else RECOMMENDED.format(f"{main.scores[main.best]:.2f}")
    rows = [f'<tr><th scope="row">{escape(key)}</th><td>{_value(x)}</td></tr>' for key, x in results.items()]
    body.append("<h2>All metrics</h2>" + _table("<thead></thead>", rows))
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        "'unsafe-inline'\">"
        f"{recommended}<title>{escape(title)}</title><style>{_STYLE}{_COLORS}</style></head><body>{''.join(body)}</body></html>\n"
    )
    return text.encode("utf-8", errors="replace")  # JSON may hold lone surrogates, which UTF-8 can't encode


def _section(section: Section, dataset: str) -> str:
    parts = [f"<h2>{escape(section.title)} of {escape(dataset)}</h2>", _metrics(section.metrics)]
    parts += [f'<p class="dim">{escape(" ".join(section.notes))}</p>']
    parts.append(f"<h3>Classes</h3>{_classes(section)}")
    limits = (0, 1, 0, 1)
    if section.curves:
        chart = line_chart(section.curves, "recall", "precision", limits)
        parts.append(f'<h3>Precision and recall</h3><div class="charts">{chart}</div>')
    if len(section.class_curves) > 1:
        charts = [line_chart([x], "recall", "precision", limits) for x in section.class_curves[:_MOST_CLASS_CURVES]]
        left_out = max(0, len(section.class_curves) - _MOST_CLASS_CURVES)
        more = f'<p class="dim">{left_out} more classes are not shown.</p>' if left_out else ""
        parts.append(
            f"<details><summary>Curves of the classes</summary>"
            f'<div class="charts small">{"".join(charts)}</div>{more}</details>'
        )
    if section.thresholds is not None:
        parts.append(f"<h3>Thresholds</h3>{_thresholds(section.thresholds, section.threshold_option)}")
    parts.append(f"<h3>Confusion matrix</h3>{_matrix(*merge_rare(section.confusion, section.names))}")
    return "".join(parts)


def _metrics(metrics: Sequence[Metric]) -> str:
    items = (
        f"<li>{escape(x.name)}<b>{_value(x.value)}</b>"
        f'<span class="dim">{"95% interval " + _interval(x.interval) if x.interval else "no interval"}</span></li>'
        for x in metrics
    )
    return f'<ul class="metrics">{"".join(items)}</ul>'


def _classes(section: Section) -> str:
    """The table of classes, sorted by the first column; classes without a value come last."""
    head = "".join(f'<th scope="col">{escape(x)}</th>' for x in (section.columns[0], "95%", *section.columns[1:]))

    def order(row: ClassRow) -> tuple[bool, float]:
        return math.isnan(row.values[0]), -row.values[0]

    rows = []
    for row in sorted(section.rows, key=order):
        cells = [_value(row.values[0]), _interval(row.interval), *map(_value, row.values[1:])]
        rows.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(f"<td>{x}</td>" for x in cells)}</tr>')
    return _table(f"<thead><tr><td></td>{head}</tr></thead>", rows)


def _thresholds(thresholds: Thresholds, option: str) -> str:
    best = thresholds.best
    rows = []
    for i, score in enumerate(thresholds.scores):
        if i == best or round(100 * score) % 5 == 0:
            cells = (100 * thresholds.precision[i], 100 * thresholds.recall[i], 100 * thresholds.f1[i])
            mark = ' class="mark"' if i == best else ""
            text = "".join(f"<td>{_value(x)}</td>" for x in cells)
            rows.append(f'<tr{mark}><th scope="row">{score:.2f}</th>{text}</tr>')
    head = "".join(f'<th scope="col">{x}</th>' for x in ("precision", "recall", "F1"))
    sentence = (
        f"Recommended: {thresholds.scores[best]:.2f} ({option}), which has the highest F1 on these images at an IoU of "
        "0.5. A higher threshold gives fewer false predictions, a lower one fewer missed objects. This threshold and "
        "the best weights of the run are chosen on these images, so that the metrics of others are a little lower; a "
        "test part, which takes no part in training, shows by how much."
    )
    return f"<p>{escape(sentence)}</p>" + _table(f"<thead><tr><td></td>{head}</tr></thead>", rows)


def merge_rare(confusion: np.ndarray, names: Sequence[str], most: int = _MOST_CLASSES) -> tuple[np.ndarray, list[str]]:
    """Merge the classes with the fewest errors into one, so that at most ``most`` classes are left.

    Args:
        confusion: see :class:`Section`.

    Returns:
        the merged matrix, whose sum is the same, and the names of its classes.
    """
    if len(names) <= most:
        return confusion, list(names)
    errors = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    kept = np.sort(np.argsort(-errors[:-1], kind="stable")[: most - 1])
    group = np.full(len(names) + 1, most - 1)
    group[kept], group[-1] = np.arange(most - 1), most
    merged = np.zeros((most + 1, most + 1), np.int64)
    np.add.at(merged, (group[:, None], group[None, :]), confusion)
    return merged, [names[i] for i in kept] + [f"{len(names) - len(kept)} other classes"]


def _matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    of_true = np.maximum(confusion.sum(axis=0), 1)
    columns = [*names, "false", "predictions"]
    head = "".join(f'<th scope="col">{escape(x)}</th>' for x in columns)
    rows = []
    for i, (name, counts) in enumerate(zip([*names, "missed"], confusion.tolist(), strict=True)):
        cells = []
        for j, count in enumerate(counts):
            if i == j == len(names):
                cells.append("<td></td>")
                continue
            color, share = ("right" if i == j else "wrong"), min(1.0, count / of_true[j])
            style = f' style="background: rgba(var(--{color}), {0.7 * share:.2f})"' if count else ' class="zero"'
            cells.append(f"<td{style}>{count:,}</td>")
        total = f"<td>{sum(counts):,}</td>" if i < len(names) else "<td></td>"
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}{total}</tr>')
    sums = "".join(f"<td>{x:,}</td>" for x in confusion.sum(axis=0)[:-1].tolist())
    rows.append(f'<tr><th scope="row">objects</th>{sums}<td></td><td></td></tr>')
    text = '<p class="dim">Rows: predicted class. Columns: true class; the colour shows the share of the column.</p>'
    return text + _table(f"<thead><tr><td></td>{head}</tr></thead>", rows, "matrix")


def _pictures(dataset: DatasetReport) -> str:
    if not dataset.pictures:
        return ""
    figures = (
        '<figure><img alt="ground truth and prediction" '
        f'src="data:image/jpeg;base64,{base64.b64encode(x.jpeg).decode()}">'
        f"<figcaption>{escape(x.name)}: quality {x.quality:.3f}</figcaption></figure>"
        for x in dataset.pictures
    )
    text = (
        "The worst images first, then the best. Left: ground truth; right: prediction. The quality of an image with "
        "label maps is the mean IoU of its classes; with objects, sum of IoUs of the right / (TP + FP / 2 + FN / 2)."
    )
    return f'<h2>Images of {escape(dataset.name)}</h2><p>{text}</p><div class="charts">{"".join(figures)}</div>'


def _table(head: str, rows: Sequence[str], kind: str = "") -> str:
    return f'<div class="table {kind}"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _value(x: Any) -> str:
    if math.isnan(x):
        return "none"
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "none"


def training_charts(history: Sequence[dict[str, float]]) -> list[str]:
    """Draw the curves of a training run.

    Args:
        history: records of metrics.json.
    """
    keys = {key for record in history for key in record}

    def chart(names: Sequence[str], title: str) -> str:
        curves = []
        for name in names:
            points = [(x["iteration"] + 1, x[name]) for x in history if name in x and "iteration" in x]
            if points:
                curves.append(Curve(name, *zip(*points, strict=True)))
        return line_chart(curves, "iteration", title)

    groups = (
        (["total_loss", "validation/total_loss"], "loss"),
        (sorted(key for key in keys if key.rsplit("/", 1)[-1] in ("AP", "PQ", "mIoU")), "metrics"),
        (["lr"], "learning rate"),
    )
    return [text for names, title in groups if (text := chart(names, title))]
