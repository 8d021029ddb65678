"""Matches the classes of a model with those of its weights file by name, and re-orders their rows of parameters.

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
    """Return the names of the parameters that have one row per class."""
    names = list(names)
    branches = [match for match in map(_CLASS_BRANCH.match, names) if match]
    last = {branch[1]: max(int(other[2]) for other in branches if other[1] == branch[1]) for branch in branches}
    in_last_layer = {branch[0] for branch in branches if int(branch[2]) == last[branch[1]]}
    return [name for name in names if name in in_last_layer or _CLASSIFIER.search(name)]


def match_rows(classes: ClassTable, file_classes: ClassTable) -> list[int | None]:
    """For each class of a model its index in the file, by name and kind (thing, stuff); None where it isn't there.

    Classes of the same name are matched in their order.
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
    """Re-order the rows of a state dict to the classes of a model.

    Args:
        state_dict: parameters by our names; it is not changed.
        rows: for each class of the model its row in the state dict; None: use the row in ``initial``.
        initial: the model's parameters by name, one row for each of ``rows``. A parameter of the state dict stays
            unchanged if it is missing here, or if the shapes differ in more than the number of rows.
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
