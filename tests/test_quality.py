"""Class targets that are the quality of the masks."""

import math

import pytest
import torch
from helpers import make_batch, make_example, tiny_model

from knet_d2.errors import ConfigError
from knet_d2.modeling.layers import upsample_masks, upsampled_size
from knet_d2.modeling.losses import focal_loss, mask_ious, quality_focal_loss
from knet_d2.modeling.targets import build_targets

QUALITY = "MODEL.KNET.LOSS.QUALITY_EXPONENT"


def test_hard_targets_give_the_focal_loss():
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 40, dtype=torch.float64)
    targets = (torch.rand(40, dtype=torch.float64) > 0.5).double()
    for alpha, gamma in ((0.25, 2.0), (0.5, 1.5)):
        found = quality_focal_loss(logits, targets, weights, alpha=alpha, gamma=gamma)
        torch.testing.assert_close(found, focal_loss(logits, targets, weights, alpha=alpha, gamma=gamma))


def test_a_soft_target_costs_least_at_its_own_probability():
    target, alpha = 0.7, 0.25
    arguments = {"alpha": alpha, "gamma": 2.0}
    logits = torch.logit(torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64))
    found = [quality_focal_loss(x, torch.full_like(x, target), torch.ones_like(x), **arguments) for x in logits]
    entropy = [-target * math.log(p) - (1 - target) * math.log(1 - p) for p in (0.5, 0.7, 0.9)]
    expected = [alpha * 0.2**2 * entropy[0], 0.0, alpha * 0.2**2 * entropy[2]]
    assert [x.item() for x in found] == pytest.approx(expected, abs=1e-12)


def test_ious_of_masks():
    logits = torch.tensor([[[1.0, 1, -1, -1]], [[-1, -1, -1, -1]], [[2, 2, 2, 2]]])
    targets = torch.tensor([[[0.0, 1, 0.6, 0.4]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    masks, truths = logits > 0, targets > 0.5
    assert mask_ious(masks, truths).tolist() == pytest.approx([1 / 3, 1, 1])
    assert mask_ious(~masks, truths).tolist() == pytest.approx([1 / 3, 1, 0])
    assert mask_ious(masks[:0], truths[:0]).shape == (0,)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("num_points", [0, 300])
def test_positive_kernels_learn_the_quality_of_their_masks(task, num_points):
    """Of stage 1: the class loss from its masks and the ground truth, which only the class targets change."""
    options = {"MODEL.KNET.NUM_STAGES": 1, "MODEL.KNET.LOSS.NUM_POINTS": num_points}
    model, plain = (tiny_model(task, {**options, QUALITY: x}).double().train() for x in (0.5, 0.0))
    batch = [{**x, "seed": i} for i, x in enumerate(make_batch([3, 1]))]
    images = model.preprocess_image(batch)
    output = model.network(images.tensor, torch.tensor(images.image_sizes))
    targets = model.prepare_targets(model.send_ground_truth(batch), images, output.state)
    losses, others = (m.criterion(output.state, output.stages, targets) for m in (model, plain))
    assert {name for name in losses if losses[name] != others[name]} == {"loss_class_s1"}
    criterion = model.criterion
    compared = criterion._own_batch(output.state, output.stages, criterion._compare(output.state, targets))
    criterion._match([compared])
    positives, logits = compared.positives(1), output.stages[0].class_logits
    labels = torch.zeros_like(logits)
    # At every pixel of the up-sampled masks, also where the losses compare masks at points
    size = upsampled_size(output.stages[0].mask_logits)
    whole = [build_targets(x, images.tensor, size, criterion.ignore_value) for x in model.send_ground_truth(batch)]
    whole = [torch.cat([x.masks, x.stuff_masks]) for x in whole]
    for p, place in enumerate(zip(positives.image_index, positives.kernel_index, positives.classes)):
        mask = upsample_masks(output.stages[0].mask_logits)[place[0], place[1]] > 0
        truth = whole[place[0]][positives.target_index[p]] > 0.5
        labels[place] = ((mask & truth).sum() / (mask | truth).sum()).sqrt() if truth.any() else 1.0
    assert labels.max() > 0
    total = quality_focal_loss(logits, labels, criterion.class_mask.double(), **criterion.focal)
    expected = criterion.weights["class"] * total / len(positives.kernel_index)
    torch.testing.assert_close(losses["loss_class_s1"], expected)


def test_images_without_objects_have_no_quality():
    model = tiny_model("instance", {QUALITY: 1.0}).train()
    losses = model([make_example((64, 64), 0)])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_a_negative_exponent_is_refused():
    with pytest.raises(ConfigError, match=f"{QUALITY} = -1"):
        tiny_model("instance", {QUALITY: -1.0})
