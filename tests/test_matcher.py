"""Matching costs against loops, and assignments against all permutations."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers import matcher_options, sigmoid

from knet_d2.errors import NonFiniteError
from knet_d2.modeling.matcher import Candidates, HungarianMatcher

N, T, SIZE = 4, 3, (3, 5)


def random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_image(num_instances, seed=0, with_classes=True):
    """(prediction, classes, soft masks) of one image."""
    prediction = Candidates(random(N, *SIZE, seed=seed), random(N, T, seed=seed + 1) if with_classes else None)
    classes = torch.randint(T, (num_instances,), generator=torch.Generator().manual_seed(seed))
    return prediction, classes, random(num_instances, *SIZE, seed=seed + 2).clamp(0, 1)


def slow_costs(prediction, classes, masks, weights=(2.0, 1.0, 4.0), alpha=0.25, gamma=2.0, eps=1e-12):
    """(class, mask, dice) costs [N, G] of section 5, one pair at a time."""
    costs = np.zeros((3, N, len(classes)))
    for n in range(N):
        p = [sigmoid(x) for x in prediction.mask_logits[n].flatten().tolist()]
        for g, (c, mask) in enumerate(zip(classes.tolist(), masks)):
            t = mask.flatten().tolist()
            if prediction.class_logits is not None:
                score = sigmoid(prediction.class_logits[n, c].item())
                costs[0, n, g] = -math.log(score + eps) * alpha * (1 - score) ** gamma
                costs[0, n, g] += math.log(1 - score + eps) * (1 - alpha) * score**gamma
            costs[1, n, g] = -sum(a * b + (1 - a) * (1 - b) for a, b in zip(p, t)) / len(p)
            squares = sum(a * a for a in p) + 1e-3 + sum(b * b for b in t) + 1e-3
            costs[2, n, g] = -2 * sum(a * b for a, b in zip(p, t)) / squares
    return costs * np.array(weights)[:, None, None]


def match_one(image, matcher=None):
    prediction, classes, masks = image
    return (matcher or HungarianMatcher(**matcher_options())).match([[prediction]], [classes], [masks])[0][0]


def as_pairs(match):
    return list(zip(*(x.tolist() for x in match)))


@pytest.mark.parametrize("with_classes", [True, False])
def test_cost_terms(with_classes):
    image = make_image(3, with_classes=with_classes)
    terms = HungarianMatcher(**matcher_options()).cost_terms(*image)
    assert ("class" in terms) == with_classes
    for name, expected in zip(("class", "mask", "dice"), slow_costs(*image)):
        if name in terms:
            np.testing.assert_allclose(terms[name].numpy(), expected, rtol=1e-9)


def test_weights_and_focal_parameters_are_used():
    image = make_image(2)
    matcher = HungarianMatcher(class_weight=3, mask_weight=5, dice_weight=7, focal_alpha=0.4, focal_gamma=1.0)
    expected = slow_costs(*image, weights=(3, 5, 7), alpha=0.4, gamma=1.0)
    np.testing.assert_allclose(sum(matcher.cost_terms(*image).values()).numpy(), expected.sum(axis=0), rtol=1e-9)


@pytest.mark.parametrize("num_instances", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_assignment_is_the_cheapest_of_all(num_instances, seed):
    image = make_image(num_instances, seed=10 * seed)
    cost = slow_costs(*image).sum(axis=0)
    pairs = as_pairs(match_one(image))
    kernels, instances = zip(*pairs)
    assert len(pairs) == len(set(kernels)) == len(set(instances)) == min(N, num_instances)
    assert list(kernels) == sorted(kernels)
    if num_instances <= N:
        options = [list(zip(p, range(num_instances))) for p in permutations(range(N), num_instances)]
    else:
        options = [list(enumerate(p)) for p in permutations(range(num_instances), N)]
    best = min(sum(cost[i] for i in option) for option in options)
    assert sum(cost[i] for i in pairs) == pytest.approx(best, rel=1e-9)


def test_image_without_instances_has_no_match():
    kernels, instances = match_one(make_image(0))
    assert kernels.shape == instances.shape == (0,)
    assert kernels.dtype == instances.dtype == torch.int64


def test_order_of_kernels_and_instances_does_not_matter():
    prediction, classes, masks = make_image(3)
    expected = set(as_pairs(match_one((prediction, classes, masks))))
    order, shuffled = [2, 0, 3, 1], [1, 2, 0]
    permuted = Candidates(*(x[order] for x in prediction[:2])), classes[shuffled], masks[shuffled]
    assert {(order[k], shuffled[g]) for k, g in as_pairs(match_one(permuted))} == expected


def test_every_image_and_stage_is_matched_on_its_own():
    images = [make_image(count, seed=10 * i) for i, count in enumerate((2, 0, 6, 1))]
    static = [prediction._replace(class_logits=None) for prediction, _, _ in images]
    predictions, classes, masks = zip(*images)
    result = HungarianMatcher(**matcher_options()).match([static, predictions], classes, masks)
    for stage, row in zip((static, predictions), result):
        for prediction, c, m, match in zip(stage, classes, masks, row):
            assert as_pairs(match) == as_pairs(match_one((prediction, c, m)))
    assert any(as_pairs(a) != as_pairs(b) for a, b in zip(*result))


def test_matching_needs_no_gradient():
    prediction, classes, masks = make_image(2)
    prediction = Candidates(*(x.requires_grad_() for x in prediction[:2]))
    seen = []

    class Recorder(HungarianMatcher):
        def cost_terms(self, *args):
            seen.append(super().cost_terms(*args))
            return seen[-1]

    match_one((prediction, classes, masks), Recorder(**matcher_options()))
    assert not any(cost.requires_grad for cost in seen[0].values())


def test_repeated_instances_get_the_cheapest_set_of_kernels():
    (prediction, classes, masks), matcher = make_image(2, seed=4), HungarianMatcher(**matcher_options())
    kernels, instances = match_one((prediction._replace(repeats=2), classes, masks), matcher)
    assert kernels.tolist() == sorted(set(kernels.tolist())) and sorted(instances.tolist()) == [0, 0, 1, 1]
    costs = sum(matcher.cost_terms(prediction, classes, masks).values())
    choices = permutations(range(N), 4)
    cheapest = min(sum(costs[n, g] for n, g in zip(choice, (0, 0, 1, 1))) for choice in choices)
    assert costs[kernels, instances].sum().item() == pytest.approx(cheapest.item())


@pytest.mark.parametrize("term, stage, image", [("class", 1, 1), ("mask", 0, 1), ("mask", 1, 0)])
def test_a_cost_that_is_not_finite_names_term_stage_and_image(term, stage, image):
    images = [make_image(2, seed=10 * i) for i in range(2)]
    predictions, classes, masks = zip(*images)
    stages = [[Candidates(*(x.clone() for x in p[:2])) for p in predictions] for _ in range(2)]
    broken = stages[stage][image]
    (broken.class_logits if term == "class" else broken.mask_logits)[1] = float("nan")
    with pytest.raises(NonFiniteError, match=f"The {term} cost of stage {stage} is not finite for image {image} "):
        HungarianMatcher(**matcher_options()).match(stages, classes, masks)
