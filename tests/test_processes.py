"""P processes with B / P images each compute what one process with B images does.

KNET_TEST_PROCESSES names other numbers of processes than 2: KNET_TEST_PROCESSES=1,2,4 pytest -s tests/test_processes.py
"""

import math
import os

import pytest
import torch
from detectron2.engine import launch
from process_helpers import (
    COUNTS,
    OPTIONS,
    PARTS_STEP,
    evaluate,
    make_model,
    num_parts_of,
    numbers,
    share_of_batch,
    step_of_pairs,
    train,
    train_and_save,
)
from program_helpers import write_config

from knet_d2.data.shapes.writer import write_shapes

WORLD_SIZES = [int(x) for x in os.getenv("KNET_TEST_PROCESSES", "2").split(",")]


@pytest.fixture(scope="module")
def single():
    return {task: train(task) for task in OPTIONS}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Config file by task; of seven images, so that processes get different numbers of them."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_shapes(str(folder / "of_processes"), 7, seed=5, size=64)
    return {task: write_config(folder, folder / "of_processes", task) for task in OPTIONS}


@pytest.fixture(scope="module", params=WORLD_SIZES)
def shared(request, tmp_path_factory, configs):
    path = tmp_path_factory.mktemp("processes") / "results.pth"
    launch(train_and_save, request.param, dist_url="auto", args=(str(path), configs))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("task", OPTIONS)
def test_global_normalizers(single, shared, task):
    """Losses and gradients are equal in every step, and each step depends on the steps before."""
    loss_error = gradient_error = 0.0
    assert len(shared[task]) == len(single[task]) == len(COUNTS)
    for expected, found in zip(single[task], shared[task]):
        assert list(found["losses"]) == list(expected["losses"])
        assert set(found["gradients"]) == set(expected["gradients"]) and len(expected["gradients"]) > 50
        for name, loss in expected["losses"].items():
            loss_error = max(loss_error, abs(loss - found["losses"][name]) / max(abs(loss), 1e-9))
        # some are 0 but for rounding, as those of a bias before a norm
        largest = max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
        for name, gradient in expected["gradients"].items():
            error = (gradient - found["gradients"][name]).abs().max() / gradient.abs().max().clamp(min=1e-4 * largest)
            gradient_error = max(gradient_error, float(error))
    print(f"{task}: largest relative differences: losses {loss_error:.1e}, gradients {gradient_error:.1e}")
    assert loss_error < 1e-9 and gradient_error < 1e-9
    assert expected["losses"] != single[task][0]["losses"]


def test_pairs_of_frames(shared):
    """Each process has other pairs, and some have nothing to compare; losses and gradients are those of one process."""
    (expected, gradients), (found, shared_gradients) = step_of_pairs(), shared["pairs"]
    assert list(found) == list(expected) and found["loss_track_contrast"] > 0 < found["loss_track_cosine"]
    assert found == pytest.approx(expected, rel=1e-9)
    assert set(gradients) == set(shared_gradients) and any(name.startswith("video.") for name in gradients)
    largest = max(float(x.abs().max()) for x in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-7, atol=1e-9 * largest, msg=name)


@pytest.mark.parametrize("task, group", [("instance", "segm"), ("panoptic", "panoptic_seg"), ("semantic", "sem_seg")])
def test_evaluation(shared, configs, task, group):
    """All metrics are equal bit for bit."""
    expected, found = evaluate(configs[task])[group], shared["evaluation"][task][group]
    assert list(found) == list(expected) and any(value > 0 for value in expected.values())
    print(f"{task}: {expected}")
    for name, value in expected.items():
        assert found[name] == value or math.isnan(found[name]) and math.isnan(value), name


def test_local_normalizers(shared):
    """As in the official release, each process normalises its losses; class and centre losses use the mean count.

    The groups that exist in training only are normalised over all processes.
    """
    world_size = len(shared["local"])
    share = len(COUNTS[0]) // world_size
    positives = [sum(COUNTS[0][rank * share : (rank + 1) * share]) for rank in range(world_size)]
    mean = sum(positives) / world_size
    assert world_size == 1 or 0 in positives
    for rank, found in enumerate(shared["local"]):
        model, _ = make_model("instance", is_global=False)
        expected = numbers(model(share_of_batch(0, rank, world_size)))
        for name in expected:
            if name.startswith(("loss_class", "loss_center")):
                expected[name] *= max(positives[rank], 1) / max(mean, 1)
        for name in [name for name in expected if "_dn_" in name or "_o2m_" in name]:
            del expected[name]
            mean_loss = sum(losses[name] for losses in shared["local"]) / world_size
            assert mean_loss == pytest.approx(shared["instance"][0]["losses"][name], rel=1e-9), name
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert len(found) == len(expected) + 20
    if world_size > 1:
        mean_loss = sum(found["loss_mask_s1"] for found in shared["local"]) / world_size
        assert mean_loss != pytest.approx(shared["instance"][0]["losses"]["loss_mask_s1"], rel=1e-3)


def test_parts_of_a_batch(request, shared):
    """Part k of all processes together is what one process computes: the mean over the parts is taken."""
    world_size = request.node.callspec.params["shared"]
    num_parts, batch = num_parts_of(world_size), share_of_batch(PARTS_STEP, 0, 1)
    model, _ = make_model("panoptic", is_global=True)
    means = {}
    for images in torch.arange(len(batch)).view(world_size, num_parts, -1).unbind(dim=1):
        losses = {name: x / num_parts for name, x in model([batch[i] for i in images.flatten()]).items()}
        sum(losses.values()).backward()
        means = {name: means.get(name, 0) + x.item() for name, x in losses.items()}
    found_losses, found_gradients = shared["parts"]
    assert found_losses == pytest.approx(means, rel=1e-6)  # float32 in the log
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) > 50
    torch.testing.assert_close(found_gradients, expected, rtol=1e-9, atol=1e-12)


def test_costs_that_are_not_finite_in_one_process(shared):
    """All processes skip the step and continue together."""
    logs, changed, weights = zip(*shared["skipped"])
    for log in logs:
        assert "cost of stage 0 is not finite" in log and "bad.jpg" in log and "skipped (1 in a row)" in log
    assert set(map(tuple, changed)) == {(True, False, True)}
    assert len(set(weights)) == 1 and math.isfinite(weights[0])


def test_a_step_has_at_most_two_collectives(shared):
    """One before and one after the backward pass, beside DistributedDataParallel's and those of SyncBN."""
    for found in shared["collectives"]:
        for (task, is_global), names in found.items():
            if len(shared["collectives"]) == 1:
                assert names == []
            elif task != "semantic":
                assert names == ["all_reduce", "all_gather"], is_global
            else:  # SyncBN has collectives of its own
                assert names[-1] == "all_gather" and "all_gather_object" not in names


def test_processes_agree_on_a_stop_signal(shared):
    assert {tuple(agreed) for agreed in shared["signals"]} == {(None, "SIGTERM")}
