"""MODEL.KNET.TEST.STAGE: results of the static kernels and of every stage."""

import pytest
import torch
from helpers import spread_scores, tiny_config, tiny_model

from knet_d2.errors import ConfigError
from knet_d2.modeling.cascade import static_predictions
from knet_d2.modeling.structures import KernelState


def test_static_class_probabilities_are_means_over_the_mask():
    mask_logits = torch.tensor([[[[1.0, 2.0], [-1.0, 0.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])  # the second one is empty
    semantic_logits = torch.tensor([0.3, -2.0]).reshape(1, 2, 1, 1) * torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    state = KernelState(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 4), mask_logits, semantic_logits)
    output = static_predictions(state)
    expected = [sum(torch.sigmoid(torch.tensor([a, 2 * a])).tolist()) / 2 for a in (0.3, -2.0)]
    assert output.class_logits.sigmoid()[0, 0].tolist() == pytest.approx(expected)
    assert output.class_logits.sigmoid()[0, 1].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert output.mask_logits is mask_logits


def test_semantic_kernels_have_no_class_scores():
    state = KernelState(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 4), torch.randn(1, 2, 2, 2))
    assert static_predictions(state).class_logits is None


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_every_stage_gives_its_own_result(task):
    image = {"image": torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))}
    results = {}
    for stage in (-1, 0, 1, 2, 3):
        model = tiny_model(task, {"MODEL.KNET.TEST.STAGE": stage}).eval()
        if task != "semantic":
            spread_scores(model)
        with torch.no_grad():
            output = model([image])[0]
        result = {"instance": "instances", "panoptic": "panoptic_seg", "semantic": "sem_seg"}[task]
        results[stage] = output[result]
    if task == "panoptic":
        flat = {k: torch.tensor([s["score"] for s in v[1]]) for k, v in results.items()}
    else:
        flat = {k: v.scores if task == "instance" else v for k, v in results.items()}

    def same(a, b):
        return flat[a].shape == flat[b].shape and torch.equal(flat[a], flat[b])

    assert same(-1, 3)
    assert not any(same(a, b) for a, b in [(0, 1), (1, 2), (2, 3), (0, 3)])


@pytest.mark.parametrize("stage", [-2, 4])
def test_a_stage_that_does_not_exist(stage):
    with pytest.raises(ConfigError, match=rf"MODEL\.KNET\.TEST\.STAGE = {stage}.*0 to 3"):
        tiny_model("panoptic", {"MODEL.KNET.TEST.STAGE": stage})
    assert tiny_config("panoptic").MODEL.KNET.TEST.STAGE == -1
