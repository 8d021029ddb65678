"""Loss terms and the criterion against loops over pixels in double precision."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    IGNORE,
    expected_losses,
    make_batch,
    matcher_options,
    sigmoid,
    slow_bilinear,
    tiny_config,
    tiny_model,
)

from knet_d2.errors import ConfigError
from knet_d2.modeling.criterion import KNetCriterion
from knet_d2.modeling.losses import (
    dense_focal_loss,
    dice_loss,
    focal_loss,
    kernel_cross_entropy,
    lovasz_softmax_loss,
    mask_loss,
)
from knet_d2.modeling.matcher import HungarianMatcher
from knet_d2.modeling.structures import KernelState, StageOutput, Targets
from knet_d2.tasks import TASKS

THINGS, STUFF, KERNELS, STAGES = 2, 3, 4, 2
ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "mask": 1.0, "dice": 4.0, "rank": 0.1, "dense": 1.0}
SEMANTIC_WEIGHTS = {"label_map": 0.1}
AUXILIARY_WEIGHT = 0.4


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Slow references: one number or one pixel at a time


def slow_focal(logit, target, alpha=ALPHA, gamma=GAMMA):
    p = sigmoid(logit)
    if target:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def slow_bce(logits, targets):
    """Mean over the pixels of all masks: [P, h, w] each."""
    if not len(logits):
        return 0.0
    terms = [
        -(t * math.log(sigmoid(x)) + (1 - t) * math.log(1 - sigmoid(x))) for x, t in zip(logits.flat, targets.flat)
    ]
    return sum(terms) / len(terms)


def slow_dice(logits, targets):
    if not len(logits):
        return 0.0
    losses = []
    for mask, target in zip(logits, targets):
        p = [sigmoid(x) for x in mask.flat]
        intersection = sum(a * b for a, b in zip(p, target.flat))
        losses.append(1 - 2 * intersection / (sum(a * a for a in p) + 1e-3 + sum(t * t for t in target.flat) + 1e-3))
    return sum(losses) / len(losses)


def slow_cross_entropy(logits, owners):
    """Mean over all pixels of [N, h, w] logits; pixels whose owner is None cost nothing."""
    total = 0.0
    for (y, x), owner in owners.items():
        if owner is not None:
            column = logits[:, y, x]
            total += math.log(sum(math.exp(v - column[owner]) for v in column))
    return total / len(owners)


def slow_owners(masks, shape):
    """masks: (kernel or class, [h, w]) in the order of painting -> {pixel: the last one above 0, or None}."""
    owners = dict.fromkeys(np.ndindex(*shape))
    for value, mask in masks:
        for pixel in owners:
            if mask[pixel] > 0:
                owners[pixel] = value
    return owners


def upsampled(masks):
    masks = masks.detach().numpy()
    return np.array([slow_bilinear(m, (2 * m.shape[0], 2 * m.shape[1])) for m in masks])


def slow_matched_losses(state, stages, targets, matches):
    """Every term of the loss of a panoptic K-Net; matches: per stage, per image a list of (kernel, instance)."""
    losses = {}
    images = range(len(targets))
    static = [upsampled(m[:KERNELS]) for m in state.mask_logits]
    shape = static[0].shape[1:]

    pairs = [[(k, targets[b].masks[g].numpy()) for k, g in sorted(matches[0][b])] for b in images]
    losses.update(slow_mask_losses(static, pairs, 0))
    losses["loss_dense_s0"] = slow_dense_loss(state.semantic_logits, targets, matches[0], shape)
    for i, stage in enumerate(stages, start=1):
        masks = [upsampled(m) for m in stage.mask_logits]
        positives, pairs = [], []
        for b, target in enumerate(targets):
            things = [(k, target.classes[g].item(), target.masks[g].numpy()) for k, g in sorted(matches[i - 1][b])]
            stuff_classes = target.stuff_classes.tolist()
            stuff = [(KERNELS + c - THINGS, c, m.numpy()) for c, m in zip(stuff_classes, target.stuff_masks)]
            positives.append({(k, c) for k, c, _ in things + stuff})
            pairs.append([(k, m) for k, _, m in things + stuff])
        losses.update(slow_mask_losses(masks, pairs, i))
        total = 0.0
        for b, (n, c) in product(images, np.ndindex(KERNELS + STUFF, THINGS + STUFF)):
            trained = c < THINGS if n < KERNELS else c == THINGS + n - KERNELS
            if trained:
                total += slow_focal(stage.class_logits[b, n, c].item(), (n, c) in positives[b])
        losses[f"loss_class_s{i}"] = WEIGHTS["class"] * total / max(1, sum(map(len, positives)))
    return losses


def slow_mask_losses(masks, pairs, stage):
    chosen = [(masks[b][k], m) for b, image in enumerate(pairs) for k, m in image]
    logits, goals = np.array([x for x, _ in chosen]), np.array([t for _, t in chosen])
    owners = [slow_owners(image, masks[0].shape[1:]) for image in pairs]
    rank = [slow_cross_entropy(m, o) for m, o in zip(masks, owners)]
    return {
        f"loss_mask_s{stage}": WEIGHTS["mask"] * slow_bce(logits, goals),
        f"loss_dice_s{stage}": WEIGHTS["dice"] * slow_dice(logits, goals),
        f"loss_rank_s{stage}": WEIGHTS["rank"] * sum(rank) / len(rank),
    }


def slow_dense_loss(semantic_logits, targets, matches, shape):
    total, foreground = 0.0, 0
    for logits, target, match in zip(semantic_logits, targets, matches):
        logits = upsampled(logits)
        painted = list(zip(target.stuff_classes.tolist(), target.stuff_masks))
        painted += [(target.classes[g].item(), target.masks[g]) for _, g in sorted(match)]
        for (y, x), label in slow_owners(painted, shape).items():
            foreground += label is not None
            total += sum(slow_focal(v, c == label) for c, v in enumerate(logits[:, y, x]))
    return WEIGHTS["dense"] * total / max(1, foreground)


# Builders


class GivenMatches:
    """A matcher that returns what it is told: per stage, per image a list of (kernel, instance)."""

    def __init__(self, matches):
        self.matches = matches

    def match(self, stages, classes, masks):
        assert len(stages) == len(self.matches)
        columns = [[torch.tensor(sorted(image)).long().reshape(-1, 2) for image in stage] for stage in self.matches]
        return [[(pairs[:, 0], pairs[:, 1]) for pairs in stage] for stage in columns]


def make_criterion(matcher=None, bank=None, weights=WEIGHTS, ignore_value=IGNORE):
    bank = bank or TASKS["panoptic"].bank(num_matched=KERNELS, num_things=THINGS, num_stuff=STUFF)
    return KNetCriterion(
        bank=bank,
        matcher=matcher or HungarianMatcher(**matcher_options()),
        weights=weights,
        focal_alpha=ALPHA,
        focal_gamma=GAMMA,
        ignore_value=ignore_value,
        auxiliary_weight=AUXILIARY_WEIGHT,
    ).double()


def make_predictions(batch_size, size=(3, 4), seed=0, stages=STAGES):
    n, k = KERNELS + STUFF, THINGS + STUFF
    state = KernelState(
        random(batch_size, 2, *size, seed=seed),
        random(batch_size, n, 2, seed=seed + 1),
        random(batch_size, n, *size, seed=seed + 2).requires_grad_(),
        random(batch_size, k, *size, seed=seed + 3).requires_grad_(),
    )
    outputs = [
        StageOutput(
            random(batch_size, n, 2, seed=seed + 10 * i),
            random(batch_size, n, *size, seed=seed + 10 * i + 1).requires_grad_(),
            random(batch_size, n, k, seed=seed + 10 * i + 2).requires_grad_(),
        )
        for i in range(1, stages + 1)
    ]
    return state, outputs


def make_targets(classes, stuff_classes, size=(6, 8), seed=0):
    """Make soft masks that overlap each other and do not cover all pixels."""

    def masks(count, seed):
        return (random(count, *size, seed=seed, scale=0.5) - 0.2).clamp(0, 1)

    return Targets(
        torch.tensor(classes).long(),
        masks(len(classes), 7 * seed + 1),
        torch.tensor(stuff_classes).long(),
        masks(len(stuff_classes), 7 * seed + 2),
    )


def as_numbers(losses):
    return {name: value.item() for name, value in losses.items()}


def picked(state, outputs, images):
    """The predictions for some images of the batch."""

    def pick(item):
        return type(item)(*(None if x is None else x[images] for x in item))

    return pick(state), [pick(stage) for stage in outputs]


# Single terms


def test_focal_loss_is_a_weighted_sum():
    logits, weights = random(4, 3), random(4, 3, seed=2).abs()
    targets = (random(4, 3, seed=1) > 0).double()
    triples = zip(*(x.flatten().tolist() for x in (logits, targets, weights)))
    expected = sum(w * slow_focal(x, t, 0.3, 1.5) for x, t, w in triples)
    assert focal_loss(logits, targets, weights, alpha=0.3, gamma=1.5).item() == pytest.approx(expected, rel=1e-9)


def test_dense_focal_loss_is_that_of_one_hot_targets():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 4, (2, 5, 7), generator=generator)
    one_hot = F.one_hot(labels, 4)[..., :3].permute(0, 3, 1, 2).double()
    expected = focal_loss(logits, one_hot, logits.new_ones(()), alpha=0.25, gamma=2.0)
    loss = dense_focal_loss(logits, labels, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [4, 30])
def test_dense_focal_loss_of_confident_predictions_is_exact(size):
    """The loss of confident predictions is small, and large terms that cancel would leave only rounding errors."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (1, 40, 40), generator=generator)
    one_hot = F.one_hot(labels, 9)[..., :8].permute(0, 3, 1, 2).double()
    logits = size * (2 * one_hot - 1) + torch.randn(1, 8, 40, 40, generator=generator)
    expected = focal_loss(logits, one_hot, logits.new_ones(()), alpha=0.25, gamma=2.0).item()
    assert dense_focal_loss(logits, labels, alpha=0.25, gamma=2.0).item() == pytest.approx(expected, rel=1e-13)
    rounded = logits.float()
    expected = focal_loss(rounded.double(), one_hot, logits.new_ones(()), alpha=0.25, gamma=2.0).item()
    assert dense_focal_loss(rounded, labels, alpha=0.25, gamma=2.0).item() == pytest.approx(expected, rel=5e-7)


def test_mask_and_dice_loss():
    logits, targets = random(3, 4, 5), random(3, 4, 5, seed=1).clamp(0, 1)
    assert mask_loss(logits, targets).item() == pytest.approx(slow_bce(logits.numpy(), targets.numpy()), rel=1e-9)
    assert dice_loss(logits, targets).item() == pytest.approx(slow_dice(logits.numpy(), targets.numpy()), rel=1e-9)


def test_dice_of_two_empty_masks_is_defined():
    loss = dice_loss(torch.full((1, 4, 4), -100.0), torch.zeros(1, 4, 4))
    assert loss.item() == pytest.approx(1)


def test_cross_entropy_counts_ignored_pixels_in_the_mean():
    logits = random(2, 3, 4, 5)
    targets = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    targets[0, :, 2:] = IGNORE
    expected = 0
    for image, labels in zip(logits.numpy(), targets.tolist()):
        owners = {p: (None if labels[p[0]][p[1]] == IGNORE else labels[p[0]][p[1]]) for p in np.ndindex(4, 5)}
        expected += slow_cross_entropy(image, owners) / 2
    assert kernel_cross_entropy(logits, targets, IGNORE).item() == pytest.approx(expected, rel=1e-9)


def test_cross_entropy_resizes_logits_to_the_labels():
    logits, labels = random(1, 3, 3, 4), torch.ones(1, 7, 9, dtype=torch.long)
    resized = np.array([slow_bilinear(m, (7, 9)) for m in logits[0]])
    expected = slow_cross_entropy(resized, dict.fromkeys(np.ndindex(7, 9), 1))
    assert kernel_cross_entropy(logits, labels, IGNORE).item() == pytest.approx(expected, rel=1e-9)


def test_lovasz_loss_of_sure_predictions_is_1_minus_iou():
    """The mean over the classes that the labels have: 1 of 4 is only predicted, and one is nowhere."""
    targets = torch.tensor([[[0, 0, 0, 1, 1, IGNORE]], [[0, 1, 1, 1, IGNORE, IGNORE]]])
    predicted = torch.tensor([[[0, 0, 1, 1, 2, 0]], [[0, 1, 1, 0, 1, 2]]])
    logits = 200 * torch.nn.functional.one_hot(predicted, 4).movedim(3, 1).double()
    ious = [3 / 5, 3 / 6]  # of the classes 0 and 1, without the ignored pixels
    assert lovasz_softmax_loss(logits, targets, IGNORE).item() == pytest.approx(1 - sum(ious) / 2, abs=1e-12)


def test_lovasz_loss_is_the_sum_over_falling_errors():
    """Eq. 9: each pixel's error times what it adds to 1 - IoU, if the pixels with larger errors are wrong as well."""
    logits, targets = random(2, 3, 4, 5), torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    targets[0, :2] = IGNORE
    probs, kept = logits.softmax(1).movedim(1, 3), targets != IGNORE
    found = []
    for c in range(3):
        mine = targets[kept] == c
        errors = (mine.double() - probs[..., c][kept]).abs().tolist()
        wrong, last, total = set(), 0.0, 0.0
        for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
            wrong.add(i)
            right = sum(mine[j].item() for j in range(len(errors)) if j not in wrong)
            union = mine.sum().item() + sum(not mine[j] for j in wrong)
            total += errors[i] * (1 - right / union - last)
            last = 1 - right / union
        found.append(total)
    assert lovasz_softmax_loss(logits, targets, IGNORE).item() == pytest.approx(sum(found) / 3, rel=1e-9)
    torch.autograd.gradcheck(lambda x: lovasz_softmax_loss(x, targets, IGNORE), logits.requires_grad_())


def test_the_lovasz_loss_is_part_of_each_cross_entropy_of_label_maps():
    batch = make_batch([3, 1])
    plain, model = (
        tiny_model("semantic", {"MODEL.KNET.LOSS.LOVASZ_WEIGHT": weight, "MODEL.KNET.DROPOUT": 0.0}).train()
        for weight in (0.0, 0.5)
    )
    losses, expected = model(batch), plain(batch)
    assert losses.keys() == expected.keys() == expected_losses("semantic")
    for name, loss in losses.items():
        factor = 0.4 if name == "loss_auxiliary" else 1.0
        assert 0.1 < (loss - expected[name]).item() / (0.5 * factor) < 1, name  # an untrained model's IoU is low


def test_label_weights_are_factors_on_the_cross_entropy_of_each_class():
    """Weights of one class alone give the share of its pixels in each loss of label maps; that of points as well."""
    batch = make_batch([3, 1])
    for points in (0, 60):
        options = {"MODEL.KNET.DROPOUT": 0.0, "MODEL.KNET.LOSS.NUM_POINTS": points}
        unit = [[float(i == k) for i in range(5)] for k in range(5)]
        expected, *shares, mixed = (
            tiny_model("semantic", {**options, "MODEL.KNET.LOSS.LABEL_WEIGHTS": weights}).train()(batch)
            for weights in ([], *unit, [0, 0.5, 0, 3, 1])
        )
        assert mixed.keys() == expected.keys() == expected_losses("semantic")
        for name, loss in expected.items():
            parts = [share[name].item() for share in shares]
            assert sum(parts) == pytest.approx(loss.item(), rel=1e-5) and max(parts) < 0.8 * loss, name
            assert mixed[name].item() == pytest.approx(0.5 * parts[1] + 3 * parts[3] + parts[4], rel=1e-5), name


def test_label_weights_need_a_cross_entropy():
    options = {"MODEL.KNET.LOSS.LABEL_WEIGHTS": [1.0] * 5, "MODEL.KNET.LOSS.RANK_WEIGHT": 0.0}
    with pytest.raises(ConfigError, match=r"LABEL_WEIGHTS = .* use a RANK_WEIGHT above 0"):
        tiny_model("semantic", options)


@pytest.mark.parametrize(
    "task, weights, message",
    [
        ("panoptic", [1.0] * 5, r"use \[\] for this task"),
        ("semantic", [1.0] * 4, "has 4 numbers: use one for each of 5 classes"),
        ("semantic", [1.0, 1.0, -1.0, 1.0, 1.0], "numbers of at least 0"),
        ("semantic", [math.nan] * 5, "numbers of at least 0"),
        ("semantic", ["1", "1", "1", "1", "1"], "numbers of at least 0"),
        ("semantic", [0.0] * 5, "some are above 0"),
    ],
)
def test_bad_label_weights(task, weights, message):
    with pytest.raises(ConfigError, match=rf"MODEL\.KNET\.LOSS\.LABEL_WEIGHTS = .*{message}"):
        tiny_model(task, {"MODEL.KNET.LOSS.LABEL_WEIGHTS": weights})


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("semantic", {"LOVASZ_WEIGHT": -1.0}, "= -1.0: use 0, or more for semantic segmentation"),
        ("panoptic", {"LOVASZ_WEIGHT": 1.0}, "= 1.0: use 0, or more for semantic segmentation"),
        ("semantic", {"LOVASZ_WEIGHT": 1.0, "GLOBAL_NORMALIZERS": True}, "GLOBAL_NORMALIZERS = True can't make it"),
        ("semantic", {"LOVASZ_WEIGHT": 1.0, "RANK_WEIGHT": 0.0}, "use a RANK_WEIGHT above 0"),
    ],
)
def test_bad_lovasz_weights(task, options, message):
    with pytest.raises(ConfigError, match=rf"MODEL\.KNET\.LOSS\.LOVASZ_WEIGHT .*{message}"):
        tiny_model(task, {f"MODEL.KNET.LOSS.{key}": value for key, value in options.items()})


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: mask_loss(x[:0], x.detach()[:0]),
        lambda x: dice_loss(x[:0], x.detach()[:0]),
        lambda x: kernel_cross_entropy(x[None], torch.full((1, 4, 5), IGNORE), IGNORE),
        lambda x: lovasz_softmax_loss(x[None], torch.full((1, 4, 5), IGNORE), IGNORE),
        lambda x: focal_loss(x[:0], x.detach()[:0], x.detach()[:0], alpha=ALPHA, gamma=GAMMA),
    ],
    ids=["mask", "dice", "rank", "lovasz", "focal"],
)
def test_nothing_to_compare_costs_0_and_is_part_of_the_graph(loss):
    logits = random(3, 4, 5).requires_grad_()
    value = loss(logits)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() == 0


# The criterion

CASES = {
    "things and stuff": (
        [make_targets([1, 0, 1], [2, 4], seed=0), make_targets([0], [3], seed=1)],
        [[[(3, 0), (0, 1), (2, 2)], [(1, 0)]], [[(0, 0), (1, 1), (3, 2)], [(3, 0)]]],
    ),
    "one image has no instance": (
        [make_targets([], [2, 3, 4], seed=2), make_targets([1, 1], [], seed=3)],
        [[[], [(0, 1), (2, 0)]], [[], [(3, 0), (1, 1)]]],
    ),
    "nothing at all": ([make_targets([], []), make_targets([], [])], [[[], []], [[], []]]),
    "more instances than kernels": (
        [make_targets([0, 1, 0, 1, 0, 1], [4], seed=4)],
        [[[(0, 5), (1, 3), (2, 0), (3, 1)]], [[(0, 2), (1, 4), (2, 5), (3, 0)]]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_all_terms_match_loops_over_kernels_and_pixels(case):
    targets, matches = CASES[case]
    state, stages = make_predictions(len(targets))
    losses = make_criterion(GivenMatches(matches))(state, stages, targets)
    expected = slow_matched_losses(state, stages, targets, matches)
    assert as_numbers(losses) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    sum(losses.values()).backward()
    for tensor in (state.mask_logits, state.semantic_logits, *(x for s in stages for x in s[1:])):
        assert tensor.grad.isfinite().all()


def test_without_positives_only_class_and_dense_losses_remain():
    targets, matches = CASES["nothing at all"]
    state, stages = make_predictions(2)
    losses = as_numbers(make_criterion(GivenMatches(matches))(state, stages, targets))
    positive = {name for name, value in losses.items() if value > 0}
    assert positive == {"loss_dense_s0", "loss_class_s1", "loss_class_s2"}


def test_keys_do_not_depend_on_the_batch():
    expected = {f"loss_{term}_s{s}" for term in ("mask", "dice", "rank") for s in range(STAGES + 1)}
    expected |= {"loss_dense_s0", "loss_class_s1", "loss_class_s2"}
    for classes in ([], [0], [1, 0, 1, 1, 0, 0]):
        for stuff in ([], [2, 3]):
            state, stages = make_predictions(2)
            losses = make_criterion()(state, stages, [make_targets(classes, stuff), make_targets([], [])])
            assert set(losses) == expected
            assert all(value.isfinite() and value.requires_grad for value in losses.values())


def test_terms_of_weight_0_are_left_out():
    state, stages = make_predictions(1)
    weights = {**WEIGHTS, "rank": 0.0, "mask": 0.0}
    losses = make_criterion(weights=weights)(state, stages, [make_targets([0], [2])])
    assert {name.split("_")[1] for name in losses} == {"class", "dice", "dense"}


def test_losses_are_proportional_to_their_weights():
    state, stages = make_predictions(1)
    targets = [make_targets([0, 1], [2])]
    once = as_numbers(make_criterion()(state, stages, targets))
    thrice = as_numbers(make_criterion(weights={name: 3 * w for name, w in WEIGHTS.items()})(state, stages, targets))
    assert thrice == pytest.approx({name: 3 * value for name, value in once.items()})


def test_order_of_images_does_not_matter():
    targets = [make_targets([1, 0, 1], [2, 4], seed=0), make_targets([0], [3], seed=1), make_targets([], [], seed=2)]
    state, stages = make_predictions(3)
    losses = as_numbers(make_criterion()(state, stages, targets))
    order = [2, 0, 1]
    permuted = as_numbers(make_criterion()(*picked(state, stages, order), [targets[i] for i in order]))
    assert permuted == pytest.approx(losses)


def test_a_batch_of_two_equal_images_costs_as_much_as_one():
    targets = [make_targets([1, 0], [2, 4])]
    state, stages = make_predictions(1)
    losses = as_numbers(make_criterion()(state, stages, targets))
    doubled = as_numbers(make_criterion()(*picked(state, stages, [0, 0]), 2 * targets))
    assert doubled == pytest.approx(losses)


def test_last_stage_is_not_matched_but_all_others_are():
    seen = []

    class Recorder(HungarianMatcher):
        def match(self, stages, classes, masks):
            seen.extend(stages)
            return super().match(stages, classes, masks)

    state, stages = make_predictions(2)
    make_criterion(Recorder(**matcher_options()))(state, stages, [make_targets([0], [2]), make_targets([1], [])])
    static, first = seen
    assert [p.class_logits for p in static] == [None, None]
    for prediction, masks in ((static[1], state.mask_logits), (first[1], stages[0].mask_logits)):
        np.testing.assert_allclose(prediction.mask_logits.detach(), upsampled(masks[1, :KERNELS]), atol=1e-12)
    assert torch.equal(first[1].class_logits, stages[0].class_logits[1, :KERNELS, :THINGS])


def test_class_columns_that_a_kernel_cannot_take_get_no_gradient():
    state, stages = make_predictions(1)
    losses = make_criterion()(state, stages, [make_targets([0, 1], [3])])
    losses["loss_class_s1"].backward()
    trained = stages[0].class_logits.grad[0] != 0
    expected = torch.zeros_like(trained)
    expected[:KERNELS, :THINGS] = True
    for i in range(STUFF):
        expected[KERNELS + i, THINGS + i] = True
    assert torch.equal(trained, expected)
    assert stages[0].class_logits.grad[0, KERNELS, THINGS] > 0  # stuff that is absent is a negative
    assert stages[0].class_logits.grad[0, KERNELS + 1, THINGS + 1] < 0


def test_class_loss_is_divided_by_the_mean_number_of_positives_of_all_ranks(monkeypatch):
    state, stages = make_predictions(1)
    targets = [make_targets([0, 1], [3])]
    alone = as_numbers(make_criterion()(state, stages, targets))

    def all_reduce(tensor):
        tensor += 4  # the other rank has 4 positives, this one has 3

    monkeypatch.setattr("knet_d2.modeling.criterion.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    expected = {name: value * (3 / 3.5 if "class" in name else 1) for name, value in alone.items()}
    assert as_numbers(make_criterion()(state, stages, targets)) == pytest.approx(expected)


def test_rank_loss_of_identity_assignment_is_the_semantic_loss():
    """With one kernel per class, and its masks made from the label map, both tasks have the same cost over kernels."""
    labels = torch.randint(STUFF, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    labels[:, :, 6:] = IGNORE
    logits = [random(2, STUFF, 3, 4, seed=s) for s in range(2)]
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, 6, 8, dtype=torch.float64)

    semantic_bank = TASKS["semantic"].bank(num_matched=0, num_things=0, num_stuff=STUFF)
    state = KernelState(random(2, 2, 3, 4), random(2, STUFF, 2), logits[0])
    targets = [Targets(*none, *none, sem_seg=image) for image in labels]
    criterion = make_criterion(bank=semantic_bank, weights=SEMANTIC_WEIGHTS)
    semantic = criterion(state, [StageOutput(state.kernels, logits[1])], targets)

    # The same as stuff of a panoptic model, whose one instance kernel claims nothing
    panoptic_bank = TASKS["panoptic"].bank(num_matched=1, num_things=1, num_stuff=STUFF)
    with_thing = [torch.cat([torch.full((2, 1, 3, 4), -1e9, dtype=torch.float64), x], dim=1) for x in logits]
    state = KernelState(random(2, 2, 3, 4), random(2, 1 + STUFF, 2), with_thing[0], with_thing[0])
    stage = StageOutput(state.kernels, with_thing[1], random(2, 1 + STUFF, 1 + STUFF))
    masks = [torch.stack([image == c for c in range(STUFF)]).double() for image in labels]
    targets = [Targets(*none, 1 + torch.arange(STUFF), m) for m in masks]
    panoptic = make_criterion(bank=panoptic_bank)(state, [stage], targets)

    assert panoptic["loss_rank_s1"].item() == pytest.approx(semantic["loss_rank_s1"].item(), rel=1e-12)
    resized = [np.array([slow_bilinear(m, (6, 8)) for m in image]) for image in logits[1]]
    expected = 0
    for image, target in zip(resized, labels.tolist()):
        owners = {p: (None if target[p[0]][p[1]] == IGNORE else target[p[0]][p[1]]) for p in np.ndindex(6, 8)}
        expected += WEIGHTS["rank"] * slow_cross_entropy(image, owners) / 2
    assert semantic["loss_rank_s1"].item() == pytest.approx(expected, rel=1e-9)


def test_semantic_losses_are_on_static_logits_stages_and_auxiliary_logits():
    bank = TASKS["semantic"].bank(num_matched=0, num_things=0, num_stuff=STUFF)
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, 6, 8)
    targets = [Targets(*none, *none, sem_seg=torch.ones(6, 8, dtype=torch.long))]
    state = KernelState(random(1, 2, 3, 4), random(1, STUFF, 2), random(1, STUFF, 3, 4))
    stages = [StageOutput(state.kernels, random(1, STUFF, 3, 4, seed=s)) for s in (1, 2)]
    auxiliary = random(1, STUFF, 2, 3, seed=3)
    losses = as_numbers(make_criterion(bank=bank, weights=SEMANTIC_WEIGHTS)(state, stages, targets, auxiliary))
    expected = {
        "loss_rank_s0": (WEIGHTS["rank"], state.mask_logits),
        "loss_rank_s1": (WEIGHTS["rank"], stages[0].mask_logits),
        "loss_rank_s2": (WEIGHTS["rank"], stages[1].mask_logits),
        "loss_auxiliary": (AUXILIARY_WEIGHT, auxiliary),
    }
    for name, (weight, logits) in expected.items():
        resized = np.array([slow_bilinear(m, (6, 8)) for m in logits[0]])
        expected[name] = weight * slow_cross_entropy(resized, dict.fromkeys(np.ndindex(6, 8), 1))
    assert losses == pytest.approx(expected, rel=1e-9)


def test_half_precision_logits_are_compared_in_float32():
    state, stages = make_predictions(1)
    targets = [make_targets([0], [2])]
    targets = [Targets(t.classes, t.masks.float(), t.stuff_classes, t.stuff_masks.float()) for t in targets]
    half = [StageOutput(*(x.detach().float() for x in s)) for s in stages]
    for dtype in (torch.float16, torch.bfloat16):
        static = KernelState(*(None if x is None else x.detach().to(dtype) for x in state))
        losses = make_criterion().float()(static, half, targets)
        assert {value.dtype for value in losses.values()} == {torch.float32}


def test_ignore_value_must_not_be_a_class():
    bank = TASKS["panoptic"].bank(num_matched=4, num_things=3, num_stuff=2)
    with pytest.raises(ConfigError, match="MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 4"):
        KNetCriterion(tiny_config("panoptic", {"MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 4}), bank)
