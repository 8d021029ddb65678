"""Kernels from the image: the map of centres, its target and loss, its peaks, and the kernels that are read there."""

import math

import numpy as np
import pytest
import torch
from helpers import IMAGE_KERNELS, expected_losses, make_batch, make_example, tiny_model

from knet_d2.modeling.losses import center_focal_loss
from knet_d2.modeling.static_kernels.image_kernels import (
    ImageKernels,
    highest_peaks,
    inside_images,
    quadratic_coordinates,
    squared_distances,
)
from knet_d2.modeling.static_kernels.semantic_fpn import coordinate_channels
from knet_d2.modeling.targets import center_map, covered_cells

DIM, KERNELS, STRIDE = 32, 5, 8


def make_kernels(num_kernels=KERNELS, seed=0):
    """Image kernels in float64 with random weights in all layers."""
    torch.manual_seed(seed)
    kernels = ImageKernels(DIM, num_kernels, "GN", STRIDE).double()
    kernels.init_weights()
    torch.nn.init.normal_(kernels.extent.weight, std=0.5)
    return kernels


def make_map(rows):
    return torch.tensor(rows, dtype=torch.float64)[None]


EVERYWHERE = torch.ones(1, 1, 1, dtype=torch.bool)


# ---- places


def test_peaks_come_by_height_and_then_the_lowest_other_cells():
    scores = make_map([[0.9, 0.8, 0.15, 0.3], [0.7, 0.12, 0.2, 0.13], [0.14, 0.25, 0.11, 0.5]])
    assert highest_peaks(scores, EVERYWHERE, 5, window=3).tolist() == [[0, 11, 3, 10, 5]]
    assert highest_peaks(scores, EVERYWHERE, 3, window=5).tolist() == [[0, 10, 5]]


def test_padding_gives_no_peak_while_the_image_has_cells():
    scores = make_map([[0.2, 0.15, 0.9], [0.1, 0.3, 0.8]])
    inside = torch.tensor([[[True, True, False]] * 2])
    assert highest_peaks(scores, inside, 4, window=3).tolist() == [[4, 3, 1, 0]]


def test_more_kernels_than_cells_repeat_a_cell():
    assert highest_peaks(make_map([[0.2, 0.7]]), EVERYWHERE, 5, window=3).tolist() == [[1, 0, 0, 0, 0]]


def test_cells_inside_images():
    inside = inside_images(torch.zeros(2, 3, 4), torch.tensor([(24, 32), (9, 16)]), 8)
    assert inside[0].all()
    assert inside[1].tolist() == [[True, True, False, False]] * 2 + [[False] * 4]


def test_a_paraboloid_is_linear_in_the_coordinates():
    coordinates = quadratic_coordinates(torch.zeros(1, 3, 5, 9, dtype=torch.float64))[0]
    x0, y0 = 0.25, -0.5
    weights = torch.tensor([x0, y0, -0.25, -0.25, 0.0], dtype=torch.float64)
    found = torch.einsum("c,chw->hw", weights, coordinates) - x0**2 - y0**2
    for i, j in np.ndindex(5, 9):
        assert found[i, j].item() == pytest.approx(-((j / 4 - 1 - x0) ** 2) - (i / 2 - 1 - y0) ** 2)
    assert coordinates[4, 0, 0] == 4 and coordinates[4, 0, 8] == -4


def test_distances_to_places():
    assert squared_distances(torch.tensor([[5]]), 3, 4).tolist() == [[[[2, 1, 2, 5], [1, 0, 1, 4], [2, 1, 2, 5]]]]


# ---- the target and its loss


def slow_gaussian(place, size, area):
    sigma = max(0.8, 0.12 * math.sqrt(area))
    return np.array(
        [
            [math.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / (2 * sigma**2)) for x in range(size[1])]
            for y in range(size[0])
        ]
    )


def test_center_map_is_the_maximum_of_gaussians_at_cells_of_the_masks():
    masks = torch.zeros(4, 24, 40, dtype=torch.float64)
    masks[0, 2:16, 2:32] = 1  # cells 1..7 x 1..15, whose middle is (4, 8)
    masks[1, 22, 38] = 1  # one pixel of cell (11, 19)
    masks[2, 0:24, 34:36] = masks[2, 20:24, 4:36] = 1  # an L, whose centroid is not on it
    target = center_map(covered_cells(masks, (12, 20), torch.float64))  # the last one has no pixel
    peaks = [tuple(x) for x in (target == 1).nonzero().tolist()]
    assert peaks[0] == (4, 8) and peaks[-1] == (11, 19) and len(peaks) == 3
    rows, columns = masks[2].nonzero(as_tuple=True)
    centroid = rows.double().mean() / 2 - 0.25, columns.double().mean() / 2 - 0.25
    cells = masks[2, ::2, ::2].nonzero().double()
    nearest = cells[((cells - torch.stack(centroid)) ** 2).sum(1).argmin()]
    assert peaks[1] == tuple(nearest.tolist())
    areas = (7 * 15, 0.25, masks[2].sum().item() / 4)
    expected = np.max([slow_gaussian(p, (12, 20), a) for p, a in zip((peaks[0], peaks[2], peaks[1]), areas)], axis=0)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-9)


def test_center_map_without_instances_is_empty():
    target = center_map(torch.zeros(0, 4, 4))
    assert target.shape == (4, 4) and not target.any()


@pytest.mark.parametrize("num_points", [0, 300])
def test_thin_objects_have_a_centre_and_a_place(num_points):
    """Masks at half the stride of 8, read without their neighbours, see nothing of two rows between their own."""
    model = tiny_model("instance", {**IMAGE_KERNELS, "MODEL.KNET.LOSS.NUM_POINTS": num_points}).double().train()
    example = make_example((64, 64), 1)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 27:29, 8:40] = True
    example["instances"].gt_masks.tensor = mask
    images = model.preprocess_image([example])
    output = model.network(images.tensor, torch.tensor(images.image_sizes))
    targets = model.prepare_targets(model.send_ground_truth([example]), images, output.state)
    assert num_points or not targets[0].masks.any()
    peak = (center_map(targets[0].covered) == 1).nonzero().tolist()
    assert len(peak) == 1 and peak[0][0] == 3 and 1 <= peak[0][1] < 5
    cells = torch.tensor([[0, 8 * peak[0][0] + peak[0][1], 5, 6, 7, 63]])
    places = output.state.places._replace(cells=cells, probs=torch.full((1, 6), 0.5, dtype=torch.float64))
    state = output.state._replace(places=places)
    batch = model.criterion._own_batch(state, output.stages, model.criterion._compare(state, targets))
    model.criterion._match([batch])
    assert all(images[0][0].tolist() == [1] for images in batch.matches)


def test_neighbouring_columns_of_a_wide_map_differ_in_half_precision():
    x = torch.zeros(1, 1, 2, 334, dtype=torch.bfloat16)
    assert len(coordinate_channels(x)[0, 0, 0].unique()) == 334


def test_center_loss_closed_form():
    logits = torch.tensor([0.3, -1.2, 2.0, 40.0, -40.0], dtype=torch.float64)
    targets = torch.tensor([1.0, 0.4, 0.0, 1.0, 0.0], dtype=torch.float64)
    expected = 0.0
    for x, t in zip(logits.tolist(), targets.tolist()):
        p = 1 / (1 + math.exp(-x))
        expected -= (1 - p) ** 2 * math.log(p) if t == 1 else (1 - t) ** 4 * p**2 * math.log(1 - p)
    assert center_focal_loss(logits, targets).item() == pytest.approx(expected)


def test_center_loss_is_divided_by_the_instances_of_the_batch():
    model = tiny_model("instance", IMAGE_KERNELS).double().train()
    batch = [make_example((64, 64), count, seed=i) for i, count in enumerate((1, 3))]
    images = model.preprocess_image(batch)
    output = model.network(images.tensor, torch.tensor(images.image_sizes))
    targets = model.prepare_targets(model.send_ground_truth(batch), images, output.state)
    maps = torch.stack([center_map(target.covered) for target in targets])
    expected = center_focal_loss(output.state.center_logits, maps) / 4
    found = model.criterion(output.state, output.stages, targets)["loss_center_s0"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


# ---- the kernels


def test_first_masks_are_convolutions_that_fall_with_the_distance_to_the_peaks():
    kernels = make_kernels()
    fused, localization = torch.randn(2, 2, DIM, 6, 7, dtype=torch.float64).unbind(0)
    first, masks, logits, found, _ = kernels.first_masks(fused, localization, None)
    expected_logits = kernels.center_predictor(kernels.center_conv(fused))[:, 0]
    torch.testing.assert_close(logits, expected_logits)
    places = highest_peaks(logits.sigmoid(), EVERYWHERE, KERNELS, window=3)
    assert torch.equal(found.cells, places)
    for b, n in np.ndindex(2, KERNELS):
        y, x = divmod(places[b, n].item(), 7)
        there = localization[b, :, y, x]
        kernel = kernels.kernel_branch(there)
        torch.testing.assert_close(first[b, n], kernel)
        steepness, offset = kernels.extent(there).tolist()
        for i, j in np.ndindex(6, 7):
            value = kernel @ localization[b, :, i, j] + offset
            value = value - 0.02 * math.exp(min(steepness, 6)) * ((i - y) ** 2 + (j - x) ** 2)
            torch.testing.assert_close(masks[b, n, i, j], value)


def test_a_sure_centre_makes_every_class_of_every_stage_more_probable():
    model = tiny_model("panoptic", {**IMAGE_KERNELS, "MODEL.KNET.NUM_STAGES": 2}).double().eval()
    state = model.network(model.preprocess_image(make_batch([3, 1])).tensor).state
    logits = state.center_logits.flatten(1).gather(1, state.places.cells)
    torch.testing.assert_close(state.places.probs, logits.sigmoid())
    with_places, without = model.cascade(state), model.cascade(state._replace(places=None))
    for found, plain in zip(with_places, without):
        added = (found.class_logits - plain.class_logits).detach()
        torch.testing.assert_close(added[:, :6], (logits + math.log(9)).detach()[..., None].expand_as(added[:, :6]))
        assert not added[:, 6:].any() and torch.equal(found.mask_logits, plain.mask_logits)


@pytest.mark.parametrize("num_points, dice_weight", [(0, 4.0), (300, 4.0), (0, 4e4)])
def test_an_instance_takes_the_kernel_with_the_surest_centre_inside_of_it(num_points, dice_weight):
    """At every stage, whatever the kernels' masks and the weights of their costs are."""
    options = {"MODEL.KNET.LOSS.NUM_POINTS": num_points, "MODEL.KNET.MATCHER.DICE_WEIGHT": dice_weight}
    model = tiny_model("instance", {**IMAGE_KERNELS, **options}).double().train()
    example = make_example((64, 64), 2)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :32, :32] = masks[1, 32:, 32:] = True
    example["instances"].gt_masks.tensor = masks
    images = model.preprocess_image([example])
    output = model.network(images.tensor, torch.tensor(images.image_sizes))
    # Cells of 8 x 8, by rows: the first, the last and the second are inside of an instance
    cells = torch.tensor([[0, 63, 9, 7, 6, 5]])
    for probs, expected in (((0.3, 0.1, 0.6, 0.9, 0.9, 0.9), [1, 2]), ((0.6, 0.1, 0.3, 0.9, 0.9, 0.9), [0, 1])):
        places = output.state.places._replace(cells=cells, probs=torch.tensor([probs], dtype=torch.float64))
        targets = model.prepare_targets(model.send_ground_truth([example]), images, output.state)
        state, criterion = output.state._replace(places=places), model.criterion
        batch = criterion._own_batch(state, output.stages, criterion._compare(state, targets))
        criterion._match([batch])
        assert [images[0][0].tolist() for images in batch.matches] == [expected] * len(output.stages)


@pytest.mark.parametrize("stride, window", [(4, 5), (8, 3), (16, 3)])
def test_peaks_are_as_far_apart_at_every_stride(stride, window):
    assert ImageKernels(DIM, KERNELS, "GN", stride).window == window


def places_of(model, images, image_sizes):
    """Cells (y, x) of the kernels' places, [B, N, 2]: with a steep fall, where the first masks are highest."""
    torch.nn.init.constant_(model.sem_seg_head.instance_kernels.extent.bias, 1e6)
    masks = model.network(images, image_sizes).state.mask_logits[:, : model.bank.num_matched]
    index = masks.flatten(2).argmax(dim=2)
    return torch.stack([index // masks.shape[3], index % masks.shape[3]], dim=2)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@torch.no_grad()
def test_places_are_in_the_images_of_a_batch_of_several_sizes(task):
    model = tiny_model(task, IMAGE_KERNELS, seed=1).eval()
    batch = [{"image": make_example(size, 0)["image"]} for size in ((96, 64), (40, 61), (24, 16))]
    images = model.preprocess_image(batch)
    in_padding = places_of(model, images.tensor, None)
    limits = torch.tensor([[12, 8], [5, 8], [3, 2]])
    assert (in_padding >= limits[:, None]).any()
    places = places_of(model, images.tensor, torch.tensor(images.image_sizes))
    assert (places < limits[:, None]).all()
    for b in range(3):
        assert len({tuple(x) for x in places[b].tolist()}) == 6
        alone = places_of(model, images.tensor[b : b + 1], torch.tensor(images.image_sizes[b : b + 1]))
        assert torch.equal(alone[0], places[b])


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_trains_with_more_kernels_than_cells_and_more_instances_than_kernels(task):
    for num_kernels, size, count in ((40, (32, 32), 2), (3, (64, 64), 30)):
        model = tiny_model(task, {**IMAGE_KERNELS, "MODEL.KNET.NUM_KERNELS": num_kernels}).train()
        losses = model([make_example(size, count), make_example(size, 0, seed=1)])
        assert set(losses) == expected_losses(task) | {"loss_center_s0"}
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_half_precision_does_not_round_the_peaks_together():
    model = tiny_model("instance", IMAGE_KERNELS).train()
    batch = make_batch([2, 0, 5])
    images = model.preprocess_image(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.network(images.tensor, torch.tensor(images.image_sizes)).state
        losses = model(batch)
    assert state.center_logits.dtype == torch.float32 and state.feature.dtype == torch.bfloat16
    assert len(state.center_logits.unique()) > 0.9 * state.center_logits.numel()
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_number_of_kernels_can_change_without_training():
    model = tiny_model("instance", IMAGE_KERNELS).eval()
    other = tiny_model("instance", {**IMAGE_KERNELS, "MODEL.KNET.NUM_KERNELS": 9}, seed=1).eval()
    other.load_state_dict(model.state_dict())
    image = model.preprocess_image([make_example((64, 96), 0)]).tensor
    few, many = (m.network(image).state.mask_logits for m in (model, other))
    assert many.shape[1] == 9
    torch.testing.assert_close(many[:, :6], few)


def test_an_image_does_not_depend_on_its_neighbours_objects():
    """Losses' normalisers aside: the predictions of an image are the same beside 0 and beside 50 objects."""
    model = tiny_model("panoptic", IMAGE_KERNELS).eval()
    image = make_example((64, 64), 2)
    outputs = [
        model.network(model.preprocess_image([image, make_example((64, 64), count, seed=2)]).tensor).stages[-1]
        for count in (0, 50)
    ]
    for first, second in zip(*outputs):
        torch.testing.assert_close(first[0], second[0])
