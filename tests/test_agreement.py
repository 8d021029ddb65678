"""All processes have equal parameters, buffers and averages at every evaluation, and these are in the file.

The processes start from different weights and statistics and see different images.
"""

from pathlib import Path

import pytest
import torch
from agreement_helpers import CASES, NORMS, folder_of, run_all
from detectron2.engine import launch
from toys import assert_identical


@pytest.fixture(scope="module", params=[1, 3])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    launch(run_all, request.param, dist_url="auto", args=(str(folder),))
    return request.param, folder, torch.load(folder / "found.pth", weights_only=True)


def _only(contents, kind):
    """The entries of one kind, "trained" or "evaluated", by their names in the model."""
    return {name.removeprefix(kind + " "): x for name, x in contents.items() if name.startswith(kind)}


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_processes_are_equal(found, case):
    world_size, folder, by_case = found
    norm, decay, event = case
    of_processes = by_case[case]
    assert len(of_processes) == world_size and len(of_processes[0]) == 2
    for other in of_processes[1:]:
        assert_identical(of_processes[0], other)
    saved = [torch.load(Path(folder_of(folder, case)) / f"model_{i:07d}.pth", weights_only=True) for i in (1, 3)]
    for file, contents in zip(saved, of_processes[0]):
        trained, evaluated = (_only(contents, kind) for kind in ("trained", "evaluated"))
        assert_identical(dict(file["model"]), evaluated)
        if decay == "EMA":
            assert_identical(dict(file["trainer"]["hooks"]["WeightAverage"]["model"]), trained)
        assert torch.equal(trained["head.weight"], evaluated["head.weight"]) == (decay == "no EMA")
    first, last = of_processes[0]
    moves = not torch.equal(first["trained norm.running_mean"], last["trained norm.running_mean"])
    assert moves == (norm != "frozen BN") and not torch.equal(first["trained head.weight"], last["trained head.weight"])


@pytest.mark.parametrize("norm", NORMS)
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_other_events_do_not(found, norm):
    _, folder, by_case = found
    plain, resumed = ((norm, "EMA", event) for event in ("no event", "resume"))
    ends = [by_case[x][0][-1] for x in (resumed, plain)]
    assert_identical(*ends)
    logs = [Path(folder_of(folder, x)) / "metrics.json" for x in (resumed, plain)]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    for event in ("accumulation", "skipped step"):
        weights = [by_case[norm, "EMA", x][0][-1]["trained head.weight"] for x in ("no event", event)]
        # Without statistics of a batch, its parts have the gradients of the whole.
        is_equal = event == "accumulation" and norm == "frozen BN"
        assert torch.allclose(*weights) == is_equal, event


def test_different_weights_are_found(found):
    """The error is raised in all processes, before the next checkpoint is written."""
    world_size, folder, by_case = found
    for message in by_case["disturbance"]:
        if world_size == 1:
            assert message is None
        else:
            assert "have different values of module.backbone.weight (1 tensors differ" in message
            assert not list((folder / "disturbance").glob("model_*.pth"))
