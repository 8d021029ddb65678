"""Compare this implementation with the official K-Net, tensor by tensor.

python -m checks.references                            # the references in tests/data
python -m checks.references --references FOLDER        # other references
python -m checks.references --mutate all               # check that the comparison detects errors
"""

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from knet_d2.errors import DataError

from .cases import (
    COMMITTED,
    CONFIGS,
    Result,
    architecture_of,
    filled_model,
    find_cases,
    load_case,
    load_manifests,
    not_compared,
)
from .inference import check_inference
from .mutations import MUTATIONS, Mutation, mutated
from .state_dicts import check_state_dict
from .training import check_training


def check_case(
    folder: Path, case: str, model: torch.nn.Module, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)
) -> tuple[list[Result], list[str]]:
    """Compare one reference file; returns the results, and the names of the recorded entries that are not compared.

    Training is compared in each of ``dtypes``. The model is in float32 afterwards.
    """
    arrays = load_case(folder, case)
    if case.startswith("ref_"):
        results = check_inference(model, case, arrays)
    else:
        results = [r for dtype in dtypes for r in check_training(model, case, arrays, dtype)]
        model.float()
    return results, not_compared(arrays, results)


def print_table(results: list[Result]) -> None:
    """Print the worst difference of each tensor over all cases of an architecture; * marks failed comparisons."""
    worst: dict[str, dict[str, Result]] = {}
    for result in results:
        name = re.sub(r"(_stats|_slice|_every\d+|_sub8)$|/.*", "", result.name)
        row = worst.setdefault(architecture_of(result.case), {})
        if name not in row or _excess(result) > _excess(row[name]):
            row[name] = result
    for architecture, row in worst.items():
        count = sum(architecture_of(result.case) == architecture for result in results)
        print(f"\n{architecture}: {count} compared")
        for name, result in row.items():
            mark = " " if result.passed else "*"
            print(f"  {mark} {name:31s} {result.difference:9.2e}  (allowed {result.tolerance:.1e}, {result.case})")


def _excess(result: Result) -> float:
    return result.difference if result.tolerance == 0 else result.difference / result.tolerance


def run_checks(folder: Path, architectures: list[str]) -> tuple[list[Result], list[str]]:
    """Check the state dicts and then all cases of the architectures, with only one model in memory."""
    manifests, model, architecture = load_manifests(folder), None, None
    results: list[Result] = []
    skipped: list[str] = []
    for name in (name for name in architectures if name in manifests):
        results += check_state_dict(name, manifests[name])
    for case in (case for case in find_cases(folder) if architecture_of(case) in architectures):
        if architecture_of(case) != architecture:
            architecture, model = architecture_of(case), None
            model = filled_model(architecture, manifests[architecture]["state_dict"])
        new, left_out = check_case(folder, case, model)
        failed = [result.name for result in new if not result.passed]
        counts = f"{len(new)} compared, {len(left_out)} skipped, {len(failed)} beyond tolerance"
        print(f"{case}: {counts} {[*left_out, *failed][:5] or ''}", flush=True)
        results += new
        skipped += left_out
    return results, skipped


def first_failure(folder: Path, mutation: Mutation, model_of: Callable[[str], torch.nn.Module]) -> Result | None:
    """Return the first comparison that fails under a mutation, of the cases in the folder; None if none fails.

    Args:
        folder: folder with the references.
        mutation: the mutation.
        model_of: function that returns the model of an architecture, with the weights of the recordings.
    """
    for case in mutation.cases:
        if not (folder / f"{case}.npz").exists():
            continue
        model, arrays = model_of(architecture_of(case)), load_case(folder, case)
        with mutated(mutation, model):
            results = (check_inference if case.startswith("ref_") else check_training)(model, case, arrays)
        model.float()
        failed = next((result for result in results if not result.passed), None)
        if failed:
            return failed
    return None


def run_mutations(folder: Path, names: list[str]) -> int:
    """Run the comparison under each mutation; returns the number of mutations that it does not detect."""
    manifests, uncaught = load_manifests(folder), 0

    @functools.lru_cache(maxsize=2)
    def model_of(architecture: str) -> torch.nn.Module:
        return filled_model(architecture, manifests[architecture]["state_dict"])

    for name in names:
        failed = first_failure(folder, MUTATIONS[name], model_of)
        uncaught += failed is None
        how = f"caught by {failed.case}, {failed.name}: {failed.difference:.2e}" if failed else "NOT CAUGHT"
        print(f"{name:44s} {how}", flush=True)
    print(f"{len(names) - uncaught} of {len(names)} mutations caught")
    return uncaught


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, default=COMMITTED, help="folder with the recorded tensors")
    parser.add_argument(
        "--architecture", action="append", choices=CONFIGS, help="check only this one (can be repeated)"
    )
    names = ["all", *MUTATIONS]
    parser.add_argument("--mutate", metavar="NAME", choices=names, help=f"one of {', '.join(names)}")
    return parser


def main(args: argparse.Namespace) -> int:
    if args.mutate:
        names = list(MUTATIONS) if args.mutate == "all" else [args.mutate]
        return int(run_mutations(args.references, names) > 0)

    results, skipped = run_checks(args.references, args.architecture or list(CONFIGS))
    if not results:
        raise DataError(
            f"{args.references}: has no manifest*.json*, ref_*.npz or train_*.npz. Set --references to another folder."
        )
    print_table(results)
    failed = [result for result in results if not result.passed]
    print(f"\n{len(results)} compared, {len(skipped)} skipped, {len(failed)} beyond tolerance")
    return int(bool(failed or skipped))
