"""Masks compared at sampled points: where they are drawn, what is read there, and equality with every pixel."""

import pytest
import torch
import torch.nn.functional as F
from helpers import IGNORE, IMAGE_KERNELS, expected_losses, make_batch, make_example, slow_bilinear, tiny_model

from knet_d2.data.build import MappedDataset
from knet_d2.data.ground_truth import CompactMapper, ground_truth_of
from knet_d2.errors import ConfigError
from knet_d2.modeling import sampled_points
from knet_d2.modeling.layers import sample
from knet_d2.modeling.sampled_points import SampledPoints, generator_of, sample_masks
from knet_d2.modeling.structures import Targets

POINTS = {"MODEL.KNET.LOSS.NUM_POINTS": 60}
LIKE = torch.zeros((), dtype=torch.float64)


def make_targets(num_masks=3, size=(40, 64), image_size=(40, 64), seed=0, num_stuff=0):
    """Targets of full resolution with rectangles in the image."""
    example = make_example(image_size, num_masks, seed=seed)
    padding = (0, size[1] - image_size[1], 0, size[0] - image_size[0])
    masks = F.pad(example["instances"].gt_masks.tensor.byte(), padding)
    stuff = torch.zeros(num_stuff, *size, dtype=torch.uint8)
    stuff[:, : image_size[0] // 2, : image_size[1]] = 1
    classes = torch.arange(num_stuff)
    return Targets(example["instances"].gt_classes, masks, classes, stuff, None, image_size, seed)


def centres(height, width):
    """The centres of all pixels of a map: [height width, 2]."""
    ys, xs = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
    return torch.stack([xs.repeat(height), ys.repeat_interleave(width)], dim=1)


# ---- what is read


@pytest.mark.parametrize("source, size", [((5, 9), (5, 9)), ((5, 9), (10, 18)), ((20, 36), (5, 9))])
def test_reading_at_the_centres_of_a_grid_is_resizing(source, size):
    maps = torch.randn(2, 3, *source, dtype=torch.float64)
    found = sample(maps, centres(*size).expand(2, 1, -1, -1)).view(2, 3, *size)
    torch.testing.assert_close(found, F.interpolate(maps, size, mode="bilinear", align_corners=False))
    torch.testing.assert_close(found[1, 2], torch.from_numpy(slow_bilinear(maps[1, 2], size)))


def test_points_at_the_edges_read_the_outermost_pixels():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.1, 0.9], [1.0, 0.5], [0.5, 0.5]]).view(1, 1, 5, 2)
    torch.testing.assert_close(sample(maps, points).flatten(), torch.tensor([1.0, 4.0, 3.0, 3.0, 2.5]))


def test_masks_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(sampled_points, "MASKS_AT_ONCE", 2)
    masks = (torch.rand(4, 6, 7) > 0.5).byte()
    index, points = torch.tensor([3, 0, 2, 2, 1]), torch.rand(5, 1, 11, 2)
    expected = sample(masks[index].float()[:, None], points)[:, 0]
    assert torch.equal(sample_masks(masks, index, points), expected)
    assert sample_masks(masks, index[:0], points[:0]).shape == (0, 1, 11)


# ---- where


def test_points_are_in_the_image_and_follow_its_seed_alone():
    targets = [make_targets(seed=1), make_targets(2, image_size=(17, 30), seed=2)]
    found = SampledPoints(targets, LIKE, (20, 32), 50)
    other = SampledPoints(targets[::-1], LIKE, (20, 32), 50)
    assert torch.equal(found._points[[1, 0]], other._points)
    x, y = found._points[1, 0].unbind(dim=1)
    assert 0.3 < x.max() / (30 / 64) < 1 and 0.3 < y.max() / (17 / 40) < 1
    assert not torch.equal(found._points[0], SampledPoints([make_targets(seed=3)], LIKE, (20, 32), 50)._points[0])
    assert torch.equal(found._points, SampledPoints(targets, LIKE.float(), (20, 32), 50)._points.float().double())


def test_every_purpose_has_a_stream_of_its_own():
    """Also the image's own points, whose key is empty, and the candidates of its first stage, whose key is zeros."""
    first = [generator_of(7, torch.device("cpu"), *key).initial_seed() for key in ((), (0,), (0, 0), (0, 1), (1, 0))]
    assert len(set(first)) == 5


@pytest.mark.parametrize("wanted, size, number", [(50, (20, 32), 50), (12544, (20, 32), 160), (9, (1, 1), 1)])
def test_small_images_have_fewer_points(wanted, size, number):
    assert SampledPoints([make_targets()], LIKE, size, wanted).num_points == number


def test_most_points_are_the_least_certain_candidates():
    """PointRend's rule: of 3 L candidates those with the smallest absolute logits, and uniform ones."""
    points = SampledPoints([make_targets(image_size=(20, 64))], LIKE, (20, 32), 40)
    logits = torch.stack([torch.linspace(-5, 5, 32).expand(20, 32)] * 2).double()  # 0 in the middle
    found = points._uncertain(0, points._generator(0, logits, 1), logits)
    candidates = points._uniform(0, points._generator(0, logits, 1), (2, 1, 120), logits)
    assert found.shape == (2, 1, 40, 2) and found[..., 1].max() <= 0.5
    distances, all_distances = ((x[..., 0] - 0.5).abs() for x in (found, candidates))
    for kernel in range(2):
        nearest = all_distances[kernel, 0].sort().values[:30]
        torch.testing.assert_close(distances[kernel, 0, :30].sort().values, nearest)
    assert distances[..., 30:].max() > 0.25
    again = points._uncertain(0, points._generator(0, logits, 2), logits)
    assert not torch.equal(found, again)


def test_the_seed_of_an_example_follows_its_position_in_the_run():
    bank = tiny_model("panoptic").bank
    mapper = CompactMapper(lambda record: make_example((32, 32), record), bank, IGNORE)
    data, again, other = (MappedDataset([1, 2], mapper, seed) for seed in (5, 5, 6))
    seeds = [data[0, 7]["ground_truth"].seed, data[1, 8]["ground_truth"].seed]
    assert seeds == [again[1, 7]["ground_truth"].seed, again[0, 8]["ground_truth"].seed]
    assert len({*seeds, other[0, 7]["ground_truth"].seed}) == 3


# ---- losses


def losses_and_gradients(model, batch):
    losses = model(batch)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    return {name: loss.detach() for name, loss in losses.items()}, dict(zip(names, gradients))


# Twice the size of the feature of 96 x 96 pixels at stride 8; label maps are compared at every pixel of 96 x 75
@pytest.mark.parametrize(
    "task, options, size",
    [("instance", IMAGE_KERNELS, (24, 24)), ("panoptic", {}, (24, 24)), ("semantic", {}, (96, 75))],
)
def test_all_pixel_centres_are_the_official_losses(task, options, size, monkeypatch):
    batch = make_batch([3, 0, 4])
    model = tiny_model(task, {**options, "MODEL.KNET.DROPOUT": 0.0}).double().train()
    expected, expected_gradients = losses_and_gradients(model, batch)
    grid = centres(*size)
    monkeypatch.setattr(sampled_points, "LARGEST_SHARE", 1000.0)
    monkeypatch.setattr(SampledPoints, "_extent", lambda self, target: (1.0, 1.0))
    monkeypatch.setattr(SampledPoints, "_uniform", lambda self, image, generator, shape, like: grid.expand(*shape, 2))
    monkeypatch.setattr(
        SampledPoints, "_uncertain", lambda self, image, generator, logits: grid.expand(len(logits), 1, -1, -1)
    )
    model.criterion.num_points = len(grid)
    found, gradients = losses_and_gradients(model, batch)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-9, atol=1e-12)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "task, terms",
    [
        ("instance", ["loss_dense_s0"]),
        ("panoptic", ["loss_dense_s0", "loss_rank_s2"]),
        ("semantic", ["loss_rank_s0", "loss_rank_s2", "loss_auxiliary"]),
    ],
)
def test_losses_at_points_estimate_those_at_all_pixels(task, terms):
    """Over many draws the terms at uniform points have the official mean; mask loss looks at uncertain points."""
    batch = [make_example((128, 128), 3, seed=i) for i in range(2)]
    model = tiny_model(task, {"MODEL.KNET.DROPOUT": 0.0}).double().train()
    expected = model(batch)
    model.criterion.num_points = 200
    draws = [model(batch) for _ in range(12)]
    for name in terms:
        values = torch.stack([draw[name] for draw in draws])
        assert values.std() > 0
        assert values.mean().item() == pytest.approx(expected[name].item(), rel=0.1), name


def test_foreground_is_counted_exactly():
    model = tiny_model("panoptic", {**POINTS, "MODEL.KNET.NUM_KERNELS": 2}).double().train()
    batch = [make_example((64, 64), 3), make_example((40, 30), 0, seed=1)]
    seen = []
    foreground_count = SampledPoints.foreground_count

    def record(self, batch, labels, background):
        seen.append((foreground_count(self, batch, labels, background), labels, self.num_points))
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampledPoints, "foreground_count", record)
        model(batch)
    ((count, labels, number),) = seen
    assert number == 60 and labels.shape == (2, 1, 60)
    found = (labels != 5).sum().item()
    assert 0 < found < 120 and count.item() == pytest.approx(found, rel=0.15) and count != found


def seeded(model, examples, seeds):
    return [
        {"image": x["image"], "ground_truth": ground_truth_of(x, model.bank, IGNORE)._replace(seed=seed)}
        for x, seed in zip(examples, seeds)
    ]


def test_draws_do_not_depend_on_the_batch():
    """The mean over the images of losses that each image has alone is that of the batch, for means of equal counts."""
    model = tiny_model("instance", POINTS).double().train()
    for module in model.modules():  # statistics of a batch would mix the images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    examples = seeded(model, [make_example((64, 64), 2, seed=i) for i in range(3)], [11, 12, 13])
    together = model(examples)
    alone = [model([x]) for x in examples]
    for name, loss in together.items():
        if not name.startswith("loss_dense"):  # divided by the foreground of the batch
            assert loss.item() == pytest.approx(sum(x[name].item() for x in alone) / 3, rel=1e-9), name
    changed = model([*examples[:2], {**examples[2], "ground_truth": examples[2]["ground_truth"]._replace(seed=14)}])
    assert changed["loss_dice_s2"] != together["loss_dice_s2"]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("counts", [(0, 0), (200, 1)])
def test_empty_and_crowded_images_train(task, counts):
    model = tiny_model(task, {**IMAGE_KERNELS, **POINTS}).train()
    batch = [make_example((64, 48), count, seed=i) for i, count in enumerate(counts)]
    if counts[1]:
        batch[1]["instances"].gt_masks.tensor[:] = False
        batch[1]["instances"].gt_masks.tensor[0, 5, 7] = True  # a mask of one pixel
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    assert set(losses) == expected_losses(task) | {"loss_center_s0"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_bad_numbers_of_points():
    with pytest.raises(ConfigError, match="MODEL.KNET.LOSS.NUM_POINTS = -1: use 0"):
        tiny_model("panoptic", {"MODEL.KNET.LOSS.NUM_POINTS": -1})
