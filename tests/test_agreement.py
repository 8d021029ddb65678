"""All processes have equal parameters, buffers and averages at every evaluation, and these are in the file."""

import pytest
import torch
from agreement_helpers import CASES, run_all
from detectron2.engine import launch
from toys import assert_identical


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    launch(run_all, request.param, dist_url="auto", args=(str(folder),))
    return request.param, folder, torch.load(folder / "found.pth", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_processes_are_equal(found, case):
    world_size, folder, by_case = found
    of_processes = by_case[case]
    assert len(of_processes) == world_size and len(of_processes[0]) == 2
    for other in of_processes[1:]:
        assert_identical(of_processes[0], other)
    first, last = of_processes[0]
    saved = torch.load(folder / case / "model_final.pth", weights_only=True)
    evaluated = {name.removeprefix("evaluated "): x for name, x in last.items() if name.startswith("evaluated ")}
    assert_identical(dict(saved["model"]), evaluated)
    if CASES[case][1].get("SOLVER__EMA_DECAY"):
        trained = {name.removeprefix("trained "): x for name, x in last.items() if name.startswith("trained ")}
        assert_identical(dict(saved["trainer"]["hooks"]["WeightAverage"]["model"]), trained)
        assert not torch.equal(trained["head.weight"], evaluated["head.weight"])
    moves = not torch.equal(first["trained norm.running_mean"], last["trained norm.running_mean"])
    assert moves == (case != "frozen BN") and not torch.equal(first["trained head.weight"], last["trained head.weight"])


@pytest.mark.parametrize("case", ["resume", "resume of BN"])
def test_resumed_processes_end_as_uninterrupted_ones(found, case):
    plain = {"resume": "BN and EMA", "resume of BN": "BN"}[case]
    _, folder, by_case = found
    assert_identical(by_case[case][0][-1], by_case[plain][0][-1])
    assert (folder / case / "metrics.json").read_bytes() == (folder / plain / "metrics.json").read_bytes()


def test_different_weights_are_found(found):
    """The error is raised in all processes, before the next checkpoint is written."""
    world_size, folder, by_case = found
    for message in by_case["disturbance"]:
        if world_size == 1:
            assert message is None
        else:
            assert "have different values of module.backbone.weight (1 tensors differ" in message
            assert not list((folder / "disturbance").glob("model_*.pth"))
