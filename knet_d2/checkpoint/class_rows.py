"""Whose rows are whose: a model's classes and those of its weights file, matched by name.

Parameters with one row per class are the semantic classifier, whose rows are also the fixed kernels, the auxiliary
head's, and the last layer of every class branch. Nothing else in a K-Net depends on the order of the classes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..data.classes import ClassTable

_CLASSIFIER = re.compile(r"(?:^|\.)classifier\.(?:conv\.)?(?:weight|bias)$")
_CLASS_BRANCH = re.compile(r"(.*\.class_branch\.)(\d+)\.(?:weight|bias)$")


def class_parameters(names: Iterable[str]) -> list[str]:
    """Those of a model's parameters that have one row per class."""
    names = list(names)
    branches = [match for match in map(_CLASS_BRANCH.match, names) if match]
    last = {branch[1]: max(int(other[2]) for other in branches if other[1] == branch[1]) for branch in branches}
    in_last_layer = {branch[0] for branch in branches if int(branch[2]) == last[branch[1]]}
    return [name for name in names if name in in_last_layer or _CLASSIFIER.search(name)]


def match_rows(classes: ClassTable, file_classes: ClassTable) -> list[int | None]:
    """For each class of a model its index in the file, by name and kind (thing, stuff); None where it isn't there.

    Where several classes have one name, the first is the first, and so on.
    """
    rows = {key: row for row, key in enumerate(_keys(file_classes))}
    return [rows.get(key) for key in _keys(classes)]


def _keys(classes: ClassTable) -> list[tuple[bool, str, int]]:
    seen: Counter[tuple[bool, str]] = Counter()
    keys = []
    for i, name in enumerate(classes.names):
        kind = (i < classes.num_things, name)
        keys.append((*kind, seen[kind]))
        seen[kind] += 1
    return keys


def take_rows(
    state_dict: Mapping[str, torch.Tensor], rows: Sequence[int | None], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict whose classes are in another order or other ones.

    Args:
        state_dict: our names; it is not changed.
        rows: for each class its row in the state dict; None: take that of ``initial``.
        initial: values for the other classes, by name, one row for each of ``rows``. A parameter that is not in it, or
            differs in more than its number of rows, stays as it is.
    """
    result = dict(state_dict)
    kept = [i for i, row in enumerate(rows) if row is not None]
    source = [row for row in rows if row is not None]
    for name in class_parameters(state_dict):
        value, start = state_dict[name], initial.get(name)
        if start is None or start.shape[0] != len(rows) or start.shape[1:] != value.shape[1:]:
            continue
        result[name] = start.detach().to(value.device, value.dtype, copy=True)
        result[name][kept] = value[source]
    return result


def first_difference(classes: ClassTable, file_classes: ClassTable) -> str:
    """The first class that one of two different tables lacks, as a clause."""
    for table, other, where in (
        (classes, file_classes, "the data set has {}, which the weights file lacks"),
        (file_classes, classes, "the weights file has {}, which the data set lacks"),
    ):
        for i, row in enumerate(match_rows(table, other)):
            if row is None:
                kind = "thing" if i < table.num_things else "stuff"
                return where.format(f"the {kind} class {table.names[i]!r}")
    return ""
