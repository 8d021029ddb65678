"""Compares a device with the recordings, as steps of ``tools/device_report.py``."""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from knet_d2.programs.benchmark.measure import precision
from knet_d2.programs.device_report.equality import precisions, row
from knet_d2.programs.device_report.plan import Row, Setup, Step

from .cases import COMMITTED, Result, architecture_of, filled_model, find_cases, load_manifests
from .program import check_case


def steps(setup: Setup, folder: Path = COMMITTED) -> Iterator[Step]:
    """Yield a comparison for each reference file of a folder that the size names."""
    manifests = load_manifests(folder)

    @functools.lru_cache(maxsize=1)
    def model_of(architecture: str) -> torch.nn.Module:
        return filled_model(architecture, manifests[architecture]["state_dict"], str(setup.device))

    def compare(case: str) -> list[Row]:
        with precision("fp32", setup.device):
            results, _ = check_case(folder, case, model_of(architecture_of(case)), precisions(setup.device))
        groups: dict[str, list[Result]] = {}
        for result in results:
            kind, _, name = result.name.partition(" ")
            kind = kind if name and kind.startswith("float") else "float32"
            groups.setdefault(kind, []).append(result)
        return [summary(case, kind, group) for kind, group in groups.items()]

    for case in find_cases(folder):
        if not setup.size.recordings or case in setup.size.recordings:
            yield Step(case, functools.partial(compare, case))


def summary(case: str, kind: str, results: list[Result]) -> Row:
    """Make one row of all comparisons of a case: the failed one, or else the one that is closest to its tolerance."""
    worst = max(results, key=lambda x: (not x.passed, x.difference / x.tolerance if x.tolerance else x.difference))
    failed = sum(not result.passed for result in results)
    detail = f"{len(results)} compared, {failed} out of tolerance, nearest to it: {worst.name.removeprefix(kind + ' ')}"
    return row(case, kind, worst.difference, worst.tolerance, detail)
