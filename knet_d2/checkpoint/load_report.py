"""What became of every parameter of a weights file and of a model."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

from .layouts import Layout

Shape = tuple[int, ...]


class ShapePair(NamedTuple):
    """A parameter whose shape in the file is not that in the model."""

    name: str
    file_shape: Shape
    model_shape: Shape


class LoadReport(NamedTuple):
    """Every name of the file and of the model is in exactly one of the lists (``reshaped`` is a part of ``loaded``)."""

    layout: str
    """Whose names the file has."""
    loaded: list[str]
    """Our names of what the model takes over."""
    reshaped: list[ShapePair]
    """Those of them that the layout stores in another shape."""
    other_shape: list[ShapePair]
    """Not loaded: the model has another number of classes or kernels, say; they keep their initialisation."""
    missing: list[str]
    """In the model only; they keep their initialisation. Counters of batch norms, which nothing uses, are left out."""
    unexpected: list[str]
    """In the file only; the file's names where we have none."""
    ignored: list[str]
    """In the file only, and known to carry nothing that the model needs (a classifier of ImageNet, counters)."""

    def as_text(self) -> str:
        """A table with a line for each kind; names that differ in numbers only stand together."""
        rows = [
            ["loaded", len(self.loaded), ""],
            ["... in another shape", len(self.reshaped), _pairs(self.reshaped)],
            ["re-initialised: another shape", len(self.other_shape), _pairs(self.other_shape)],
            ["re-initialised: not in the file", len(self.missing), "\n".join(summarise(self.missing))],
            ["not used: not in the model", len(self.unexpected), "\n".join(summarise(self.unexpected))],
            ["not used: not needed", len(self.ignored), "\n".join(summarise(self.ignored))],
        ]
        rows = [row for row in rows if row[1] or row[0] == "loaded"]
        return tabulate(rows, headers=["parameters", "number", f"names (file: {self.layout})"], tablefmt="simple")


def build_report(
    layout: Layout, state_dict: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor]
) -> LoadReport:
    """Compare a file with a model, by names and shapes.

    Args:
        layout: the file's state dict in our names.
        state_dict: the same in its own names.
        model_state: the model's state dict.
    """
    report = LoadReport(layout.name, [], [], [], [], list(layout.translation.unknown), list(layout.translation.ignored))
    for name, value in layout.translation.state_dict.items():
        source = layout.translation.source_keys[name]
        shape = tuple(value.shape)
        if name not in model_state:
            report.unexpected.append(name)
            continue
        model_shape = tuple(model_state[name].shape)
        if shape != model_shape:
            report.other_shape.append(ShapePair(name, shape, model_shape))
            continue
        report.loaded.append(name)
        if tuple(state_dict[source].shape) != shape:
            report.reshaped.append(ShapePair(name, tuple(state_dict[source].shape), shape))
    translated = layout.translation.state_dict
    report.missing.extend(name for name in model_state if name not in translated and not is_counter(name))
    return report


def is_counter(name: str) -> bool:
    """Whether a name is of a batch norm's counter, which has no influence on anything here."""
    return name.endswith(".num_batches_tracked")


def summarise(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers or in the last part only, as one: "res{2,3}.0.conv1.{weight,bias}"."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(re.sub(r"\d+", "#", part) for part in name.split(".")[:-1]), []).append(name)
    return [_merge([name.split(".") for name in group]) + _count(group) for group in groups.values()]


def _merge(names: Sequence[Sequence[str]]) -> str:
    return ".".join(_alternatives(parts) for parts in zip(*names))


def _alternatives(parts: Sequence[str]) -> str:
    different = list(dict.fromkeys(parts))
    if len(different) == 1:
        return different[0]
    stem = re.match(r"\D*", different[0])[0]
    endings = [part.removeprefix(stem) for part in different]
    if all(ending.isdigit() for ending in endings):
        numbers = sorted(map(int, endings))
        if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{stem}{{{numbers[0]}-{numbers[-1]}}}"
        return f"{stem}{{{','.join(map(str, numbers))}}}"
    return f"{{{','.join(different)}}}"


def _count(group: Sequence[str]) -> str:
    return f" ({len(group)})" if len(group) > 1 else ""


def _pairs(pairs: Sequence[ShapePair]) -> str:
    by_shapes: dict[tuple[Shape, Shape], list[str]] = {}
    for pair in pairs:
        by_shapes.setdefault((pair.file_shape, pair.model_shape), []).append(pair.name)
    lines = []
    for (file_shape, model_shape), names in by_shapes.items():
        lines += [f"{name}: {file_shape} in the file, {model_shape} here" for name in summarise(names)]
    return "\n".join(lines)
