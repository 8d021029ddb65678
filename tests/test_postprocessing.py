"""Results from logits: against loops, and on maps made by hand."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import sigmoid, slow_bilinear

from knet_d2.modeling.postprocessing import (
    ImageGeometry,
    ImageLogits,
    PostProcessor,
    ResultOptions,
    cells,
    dense,
    mask_probabilities,
    processor,
    rules,
)
from knet_d2.modeling.postprocessing.cells import Cells
from knet_d2.modeling.postprocessing.rules import masks_to_boxes, semantic_scores
from knet_d2.modeling.postprocessing.scores import SUPPRESSED, expected_ious, not_suppressed, thing_scores
from knet_d2.tasks import TASKS

# Head 4 x 6, masks 8 x 12, network input 16 x 24, of which the image is 14 x 19, shown at 9 x 31
GEOMETRY = ImageGeometry(padded=(16, 24), image=(14, 19), output=(9, 31))
HEAD = (4, 6)
# Masks of stride 4 are shown as they are
PLAIN = ImageGeometry(padded=(20, 20), image=(20, 20), output=(20, 20))
THINGS, STUFF = 2, 2
CATEGORIES = [7, 5, 92, 90]


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logit(p):
    return float(np.log(p / (1 - p)))


def slow_probabilities(mask_logits, geometry):
    result = []
    for mask in mask_logits.numpy():
        probs = np.vectorize(sigmoid)(slow_bilinear(mask, (2 * mask.shape[0], 2 * mask.shape[1])))
        probs = slow_bilinear(probs, geometry.padded)[: geometry.image[0], : geometry.image[1]]
        result.append(slow_bilinear(probs, geometry.output))
    return np.array(result)


def slow_box(mask):
    pixels = [(x, y) for y, x in np.ndindex(*mask.shape) if mask[y, x]]
    if not pixels:
        return [0, 0, 0, 0]
    xs, ys = zip(*pixels)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def slow_panoptic(class_logits, probs, class_mask, thing_threshold=0.3, overlap_threshold=0.6):
    """Section 6: pixels to the largest score * probability, kernels visited by falling score."""
    scores, classes = [], []
    for logits, allowed in zip(class_logits.tolist(), class_mask.tolist()):
        score, label = max((sigmoid(v), -c) for c, (v, ok) in enumerate(zip(logits, allowed)) if ok)
        scores.append(score)
        classes.append(-label)
    won = {n: [] for n in range(len(scores))}
    for pixel in np.ndindex(*probs.shape[1:]):
        won[max(range(len(scores)), key=lambda n: scores[n] * probs[(n, *pixel)])].append(pixel)
    panoptic, segments = np.zeros(probs.shape[1:], dtype=int), []
    for n in sorted(won, key=lambda n: -scores[n]):
        own_area = int((probs[n] >= 0.5).sum())
        is_thing = classes[n] < THINGS
        if is_thing and scores[n] < thing_threshold:
            continue
        if not won[n] or not own_area or len(won[n]) / own_area < overlap_threshold:
            continue
        number = len(segments) + 1
        for pixel in won[n]:
            panoptic[pixel] = number
        segment = {"id": number, "isthing": is_thing, "category_id": CATEGORIES[classes[n]]}
        segments.append({**segment, "score": scores[n], "area": len(won[n])})
    return panoptic, segments


def bank(num_kernels):
    return TASKS["panoptic"].bank(num_matched=num_kernels, num_things=THINGS, num_stuff=STUFF)


def class_mask(num_kernels):
    return bank(num_kernels).class_mask()


WAYS = (cells, dense)


def run(postprocessor, class_logits, mask_logits, geometry):
    """The processor's only output, made from cells and from dense masks."""
    prediction, (key,), results = (
        ImageLogits(class_logits, mask_logits, geometry),
        postprocessor.options.outputs,
        [],
    )
    for pixels in WAYS:
        with mock.patch.object(processor, "pixel_functions", lambda mask_logits, pixels=pixels: pixels):
            results.append(postprocessor(prediction)[key])
    return results


def result_options(output, **options):
    """The defaults of the config, but for the given ones."""
    defaults = {"stage": -1, "max_instances": 100, "score_threshold": 0.0}
    thresholds = {"thing_score_threshold": 0.3, "overlap_threshold": 0.6, "score_exponent": 0.0, "mask_nms": 1.0}
    return ResultOptions((output,), **{**defaults, **thresholds, **options})


def panoptic_processor(num_kernels, **thresholds):
    options = result_options("panoptic_seg", **thresholds)
    return PostProcessor(bank=bank(num_kernels - STUFF), category_ids=CATEGORIES, options=options)


def run_panoptic(class_logits, mask_logits, geometry, **thresholds):
    results = run(panoptic_processor(len(class_logits), **thresholds), class_logits, mask_logits, geometry)
    (segment_map, segments), (other_map, other_segments) = results
    assert torch.equal(segment_map, other_map) and segments == other_segments
    return segment_map, segments


def run_instances(class_logits, mask_logits, geometry, **options):
    num_kernels, num_things = class_logits.shape
    instance_bank = TASKS["instance"].bank(num_matched=num_kernels, num_things=num_things, num_stuff=0)
    options = result_options("instances", **options)
    postprocessor = PostProcessor(bank=instance_bank, category_ids=list(range(num_things)), options=options)
    result, other = run(postprocessor, class_logits, mask_logits, geometry)
    assert result.image_size == other.image_size
    for name, values in result.get_fields().items():
        values, others = (x.tensor if name == "pred_boxes" else x for x in (values, other.get(name)))
        assert torch.equal(values, others), name
    return result


def mask_areas(pixels, mask_logits, geometry):
    """Of each kernel alone, so that it owns every pixel."""
    one = torch.ones(1, dtype=mask_logits.dtype)
    return [int(pixels.assign_pixels(one, x[None], one > 0, geometry)[2]) for x in mask_logits]


def drawn(*kernels):
    """Kernels on the 10 x 10 cells of PLAIN's head, things first, each given as (class, score, rows, columns).

    Returns class and mask logits. Inside of its rectangle a kernel's logit is 8, elsewhere -8. Every cell is 2 x 2
    pixels of the result.
    """
    class_logits = torch.full((len(kernels), THINGS + STUFF), -20.0)
    mask_logits = torch.full((len(kernels), 10, 10), -8.0)
    for n, (label, score, rows, columns) in enumerate(kernels):
        class_logits[n, label] = logit(score)
        mask_logits[n, rows, columns] = 8
    return class_logits, mask_logits


ALL, NONE = slice(None), slice(0, 0)


# Masks and boxes


def test_masks_are_resized_in_the_right_order():
    logits = random(2, *HEAD)
    result = mask_probabilities(logits, GEOMETRY).numpy()
    np.testing.assert_allclose(result, slow_probabilities(logits, GEOMETRY), rtol=1e-6)


def test_boxes_are_tight():
    masks = random(6, 5, 7) > torch.tensor([0, 2, 4, 6, 100, 7])[:, None, None]
    masks[5, 4, 6] = True  # the last pixel
    masks[3] = False
    masks[3, 2, 0] = True  # one pixel
    boxes = masks_to_boxes(masks)
    assert boxes.tolist() == [slow_box(m) for m in masks.numpy()]
    assert boxes[3].tolist() == [0, 2, 1, 3]
    assert boxes[4].tolist() == [0, 0, 0, 0]
    assert masks_to_boxes(masks[:0]).shape == (0, 4)


# Instances


@pytest.mark.parametrize("max_instances", [1, 5, 100])
def test_instances_are_the_best_pairs_of_kernel_and_class(max_instances):
    class_logits, mask_logits = random(4, 3), random(4, *HEAD, seed=1)
    result = run_instances(class_logits, mask_logits, GEOMETRY, max_instances=max_instances)
    pairs = sorted(((sigmoid(class_logits[n, c].item()), n, c) for n in range(4) for c in range(3)), reverse=True)
    pairs = pairs[:max_instances]
    probs = slow_probabilities(mask_logits, GEOMETRY)
    assert np.abs(probs - 0.5).min() > 1e-6  # no pixel depends on rounding
    np.testing.assert_allclose(result.scores.numpy(), [score for score, _, _ in pairs], rtol=1e-9)
    assert result.pred_classes.tolist() == [c for _, _, c in pairs]
    assert result.image_size == GEOMETRY.output
    assert result.pred_masks.dtype == torch.bool
    masks = np.array([probs[n] > 0.5 for _, n, _ in pairs])
    np.testing.assert_array_equal(result.pred_masks.numpy(), masks)
    assert result.pred_boxes.tensor.tolist() == [slow_box(m) for m in masks]
    if max_instances == 100:
        assert len(result) == 12  # all pairs: every kernel appears with every class


def test_one_kernel_can_appear_with_several_classes():
    class_logits = torch.tensor([[4.0, 3.0, -4.0], [-5.0, -6.0, -7.0]])
    mask_logits = random(2, *HEAD)
    result = run_instances(class_logits, mask_logits, GEOMETRY, max_instances=2)
    assert result.pred_classes.tolist() == [0, 1]
    assert torch.equal(result.pred_masks[0], result.pred_masks[1])


def test_empty_masks_are_kept_with_a_box_of_zeros():
    mask_logits = torch.full((1, *HEAD), -5.0)
    result = run_instances(torch.tensor([[3.0, 0.0]]), mask_logits, GEOMETRY, max_instances=1)
    assert len(result) == 1
    assert not result.pred_masks.any()
    assert result.pred_boxes.tensor.tolist() == [[0, 0, 0, 0]]


def test_score_threshold():
    class_logits = torch.tensor([[logit(0.9), logit(0.5)], [logit(0.2), logit(0.7)]])
    mask_logits = random(2, *HEAD).float()
    for threshold, count in ((0.0, 4), (0.3, 3), (0.6, 2), (0.95, 0)):
        result = run_instances(class_logits, mask_logits, GEOMETRY, max_instances=10, score_threshold=threshold)
        assert len(result) == len(result.pred_masks) == len(result.pred_boxes) == count
        assert result.pred_masks.shape[1:] == GEOMETRY.output


@pytest.mark.parametrize("pixels", WAYS)
def test_probability_of_exactly_half_is_outside_of_an_instance_but_inside_of_a_panoptic_mask(pixels):
    mask_logits = torch.zeros(1, 10, 10)
    result = run_instances(torch.tensor([[3.0]]), mask_logits, PLAIN, max_instances=1)
    assert not result.pred_masks.any()
    assert mask_areas(pixels, mask_logits, PLAIN) == [20 * 20]
    mask_logits[0, :, 5:] = -8  # up-sampled, the last column of the ten is lower, too
    assert mask_areas(pixels, mask_logits, PLAIN) == [20 * 9]


# Panoptic


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_map_matches_a_loop(seed):
    class_logits, mask_logits = random(7, THINGS + STUFF, seed=seed, scale=1.5), random(7, *HEAD, seed=seed + 10)
    panoptic, segments = run_panoptic(class_logits, mask_logits, GEOMETRY, overlap_threshold=0.35)
    probs = slow_probabilities(mask_logits, GEOMETRY)
    expected, expected_segments = slow_panoptic(class_logits, probs, class_mask(5), overlap_threshold=0.35)
    np.testing.assert_array_equal(panoptic.numpy(), expected)
    assert panoptic.dtype == torch.int32
    assert 0 < len(segments) < 7
    for segment, other in zip(segments, expected_segments, strict=True):
        assert segment == pytest.approx(other)
        assert segment["area"] == int((panoptic == segment["id"]).sum())


def test_ids_follow_falling_scores_and_categories_are_the_metadata_s():
    class_logits, mask_logits = drawn(
        (0, 0.5, slice(0, 5), slice(0, 5)),
        (1, 0.8, slice(0, 5), slice(5, 10)),
        (2, 0.6, slice(5, 10), ALL),
        (3, 0.9, NONE, NONE),
    )
    panoptic, segments = run_panoptic(class_logits, mask_logits, PLAIN)
    assert [(s["id"], s["category_id"], s["isthing"], s["area"]) for s in segments] == [
        (1, 5, True, 100),
        (2, 92, False, 200),
        (3, 7, True, 100),
    ]
    assert [s["score"] for s in segments] == pytest.approx([0.8, 0.6, 0.5])
    assert torch.equal(panoptic[:10, :10], torch.full((10, 10), 3, dtype=torch.int32))
    assert panoptic[0, 19] == 1 and panoptic[19, 0] == 2


def test_a_thing_below_the_threshold_leaves_the_pixels_that_it_wins_void():
    # The thing (0.29) beats the stuff below it (0.2) for a quarter of the image, and is dropped all the same
    kernels = [(0, 0.29, slice(0, 5), slice(0, 5)), (2, 0.2, ALL, ALL), (3, 0.01, NONE, NONE)]
    panoptic, segments = run_panoptic(*drawn(*kernels), PLAIN)
    assert [(s["category_id"], s["area"]) for s in segments] == [(92, 300)]
    assert not panoptic[:10, :10].any()
    assert (panoptic[10:] == 1).all() and (panoptic[:, 10:] == 1).all()
    kernels[0] = (0, 0.31, *kernels[0][2:])
    assert [s["category_id"] for s in run_panoptic(*drawn(*kernels), PLAIN)[1]] == [7, 92]


def test_a_thing_of_exactly_the_threshold_is_kept():
    kernels = drawn((0, 0.5, ALL, ALL), (2, 0.2, NONE, NONE), (3, 0.2, NONE, NONE))
    assert len(run_panoptic(*kernels, PLAIN, thing_score_threshold=0.5)[1]) == 1


def test_stuff_is_never_dropped_for_its_score():
    kernels = drawn((0, 0.1, NONE, NONE), (2, 0.001, ALL, slice(0, 5)), (3, 0.002, ALL, slice(5, 10)))
    panoptic, segments = run_panoptic(*kernels, PLAIN)
    assert [(s["category_id"], s["area"]) for s in segments] == [(90, 200), (92, 200)]
    assert (panoptic > 0).all()


@pytest.mark.parametrize("rows, kept", [(3, True), (4, True), (5, False)])
def test_a_segment_of_which_too_little_is_left_is_dropped(rows, kept):
    """Another thing covers some rows of a thing of 10 x 5 cells."""
    kernels = drawn(
        (0, 0.5, ALL, slice(0, 5)),
        (1, 0.9, slice(0, rows), slice(0, 5)),
        (2, 0.4, ALL, slice(5, 10)),
        (3, 0.1, NONE, NONE),
    )
    panoptic, segments = run_panoptic(*kernels, PLAIN)
    areas = {s["category_id"]: s["area"] for s in segments}
    assert areas == {5: 20 * rows, 92: 200, **({7: 20 * (10 - rows)} if kept else {})}
    assert (panoptic[-1, 0] == 0) != kept  # a dropped segment's pixels stay void


def test_overlap_of_exactly_the_threshold_is_kept_whatever_the_area():
    """15 of 25 cells are 0.6; in float32 0.6 * 100 pixels is more than 60."""
    kernels = drawn(
        (0, 0.5, slice(0, 5), slice(0, 5)),
        (1, 0.9, slice(0, 2), slice(0, 5)),
        (2, 0.4, ALL, slice(5, 10)),
        (3, 0.3, slice(5, 10), slice(0, 5)),
    )
    _, segments = run_panoptic(*kernels, PLAIN)
    assert {s["category_id"]: s["area"] for s in segments} == {5: 40, 7: 60, 92: 200, 90: 100}


def test_pixels_won_below_half_count_and_are_painted():
    # Probability 0.27 everywhere but in one row of cells; nobody else wants the rest
    class_logits, mask_logits = drawn((0, 0.9, slice(0, 1), ALL), (2, 0.1, NONE, NONE), (3, 0.1, NONE, NONE))
    mask_logits[0, 1:] = -1
    panoptic, segments = run_panoptic(class_logits, mask_logits, PLAIN)
    assert [s["area"] for s in segments] == [400]
    assert (panoptic == 1).all()


def test_a_kernel_without_a_pixel_is_no_segment_even_if_every_part_is_enough():
    class_logits, mask_logits = drawn(
        (0, 0.9, ALL, ALL), (1, 0.5, ALL, ALL), (2, 0.1, NONE, NONE), (3, 0.1, NONE, NONE)
    )
    _, segments = run_panoptic(class_logits, mask_logits, PLAIN, overlap_threshold=0.0)
    assert [x["category_id"] for x in segments] == [CATEGORIES[0]]


def test_a_winner_without_a_pixel_of_at_least_half_is_dropped():
    class_logits, mask_logits = drawn((0, 0.9, NONE, NONE), (2, 0.1, NONE, NONE), (3, 0.1, NONE, NONE))
    mask_logits[0] = -1
    panoptic, segments = run_panoptic(class_logits, mask_logits, PLAIN)
    assert segments == [] and not panoptic.any()


def test_thing_takes_its_best_thing_class_only():
    class_logits, mask_logits = drawn((1, 0.8, ALL, ALL), (2, 0.1, NONE, NONE), (3, 0.1, NONE, NONE))
    class_logits[0, 2] = 9  # a stuff column, which a thing kernel does not have
    class_logits[1, 3] = 9
    segments = run_panoptic(class_logits, mask_logits, PLAIN)[1]
    assert [(s["category_id"], s["isthing"]) for s in segments] == [(5, True)]
    assert segments[0]["score"] == pytest.approx(0.8)


# Semantic, and all of them in pieces


@pytest.mark.parametrize("classes_at_once", [1, 3, 8])
def test_semantic_scores_are_sums_over_kernels(monkeypatch, classes_at_once):
    monkeypatch.setattr(rules, "CLASSES_AT_ONCE", classes_at_once)
    class_logits, mask_logits = random(5, THINGS + STUFF), random(5, *HEAD, seed=1)
    mask = class_mask(3)
    result = semantic_scores(class_logits, mask_logits, mask, GEOMETRY).numpy()
    probs = slow_probabilities(mask_logits, GEOMETRY)
    for c in range(THINGS + STUFF):
        expected = sum(sigmoid(class_logits[n, c].item()) * probs[n] for n in range(5) if mask[n, c])
        np.testing.assert_allclose(result[c], expected, rtol=1e-6)


@pytest.mark.parametrize("pixels", WAYS)
@pytest.mark.parametrize("step, at_once", [(1, 1), (4, 3), (20, 16)])
def test_a_tie_goes_to_the_first_kernel(monkeypatch, pixels, step, at_once):
    monkeypatch.setattr(cells, "CELL_STEP", step)
    monkeypatch.setattr(dense, "MASKS_AT_ONCE", at_once)
    scores = torch.tensor([0.5, 0.8, 0.8, 0.8])
    owners, areas, _ = pixels.assign_pixels(scores, torch.zeros(4, *HEAD), scores > 0, PLAIN)
    assert (owners == 1).all()
    assert areas.tolist() == [0, 400, 0, 0]


def test_segments_of_equal_scores_are_in_the_order_of_their_kernels():
    quarters = [(rows, columns) for rows in (slice(0, 5), slice(5, 10)) for columns in (slice(0, 5), slice(5, 10))]
    kernels = [(i % 2, 0.7, *quarter) for i, quarter in enumerate(quarters)]
    panoptic, segments = run_panoptic(*drawn(*kernels, (2, 0.1, NONE, NONE), (3, 0.1, NONE, NONE)), PLAIN)
    assert panoptic[::10, ::10].flatten().tolist() == [x["id"] for x in segments] == [1, 2, 3, 4]


# Dense and cells

LARGE_HEAD = (30, 40)
LARGE = ImageGeometry(padded=(240, 320), image=(229, 311), output=(150, 203))
EDGE = 1e-5


def blobs(count, *, offset, seed=0):
    """Smooth logits [count, *LARGE_HEAD] around an offset."""
    return 3 * F.interpolate(random(1, count, 6, 8, seed=seed, scale=1), LARGE_HEAD, mode="bicubic")[0] + offset


def check_both_ways(scores, mask_logits, geometry):
    """Compare cells with dense: only pixels whose probability is within EDGE of a threshold or a tie may differ."""
    probs = mask_probabilities(mask_logits, geometry)
    unsure = (probs - 0.5).abs() < EDGE
    kernels = torch.arange(len(scores)).repeat(2).flip(0)
    masks = [x.binary_masks(mask_logits, kernels, geometry) for x in WAYS]
    assert not ((masks[0] != masks[1]) & ~unsure[kernels]).any()
    owners, areas, mask_areas = zip(
        *(x.assign_pixels(scores, mask_logits, scores > 0.2, geometry) for x in (cells, dense))
    )
    best = (scores[:, None, None] * probs).topk(min(2, len(scores)), dim=0).values
    assert not ((owners[0] != owners[1]) & (best[0] - best[-1] > EDGE)).any()
    for x, y in zip(owners, areas):
        assert torch.equal(x.flatten().bincount(minlength=len(scores)), y)
    read = (areas[0] > 0) & (scores > 0.2)
    assert ((mask_areas[0] - mask_areas[1]).abs() <= unsure.sum(dim=(1, 2)))[read].all()
    assert mask_areas[0][~read].eq(0).all()


@pytest.mark.parametrize("seed", range(12))
def test_cells_and_dense_agree_on_random_geometries(seed):
    rng = np.random.default_rng(seed)
    head = rng.integers(1, 40, 2)
    padded = head * rng.integers(1, 9) + rng.integers(0, 5, 2)
    image = [int(rng.integers(max(1, length // 2), length + 1)) for length in padded]
    output = [int(rng.integers(1, 3 * length)) for length in padded]
    geometry = ImageGeometry(*(tuple(map(int, size)) for size in (padded, image, output)))
    count = int(rng.integers(1, 20))
    mask_logits = random(count, *head, seed=seed).float() - float(rng.integers(0, 6))
    check_both_ways(torch.from_numpy(rng.random(count, np.float32)), mask_logits, geometry)


@pytest.mark.parametrize("value", [-20.0, 20.0, 0.0])
def test_cells_and_dense_agree_on_constant_masks(value):
    check_both_ways(torch.linspace(0, 1, 4), torch.full((4, *LARGE_HEAD), value), LARGE)


@pytest.mark.parametrize("pixels", WAYS)
def test_no_kernel_is_shown(pixels):
    masks = pixels.binary_masks(torch.zeros(3, *HEAD), torch.zeros(0, dtype=torch.int64), GEOMETRY)
    assert masks.shape == (0, *GEOMETRY.output) and masks.dtype == torch.bool


def test_a_batch_is_what_its_images_are():
    """As in an exported graph."""
    scores, mask_logits = torch.rand(3, 7), blobs(21, offset=-2).float().unflatten(0, (3, 7))
    kernels = torch.tensor([[4, 4, 0], [1, 2, 3], [6, 5, 4]])
    results = (
        dense.assign_pixels(scores, mask_logits, scores > 0, LARGE),
        dense.binary_masks(mask_logits, kernels, LARGE),
    )
    for i in range(3):
        for whole, part in zip(results[0], dense.assign_pixels(scores[i], mask_logits[i], scores[i] > 0, LARGE)):
            assert torch.equal(whole[i], part)
        assert torch.equal(results[1][i], dense.binary_masks(mask_logits[i], kernels[i], LARGE))


# Cells


def record_computed(monkeypatch):
    """Collects the shapes of all probabilities that are computed: cells, kernels, pixels of a cell."""
    shapes, original = [], Cells.resize

    def recording(*arguments):
        probs = original(*arguments)
        shapes.append(tuple(probs.flatten(2).shape))
        return probs

    monkeypatch.setattr(Cells, "resize", recording)
    return shapes


@pytest.mark.parametrize("output", [(150, 203), (7, 203), (1, 1), (900, 90), (60, 80)])
@pytest.mark.parametrize(
    "step, most, elements",
    [(1, 24, 1 << 18), (4, 24, 1 << 12), (4, 24, 1), (4, 1, 1 << 18), (9, 999, 1 << 18), (500, 9999, 1 << 18)],
)
def test_size_of_cells_does_not_change_results(monkeypatch, step, most, elements, output):
    geometry = LARGE._replace(output=output)
    class_logits, mask_logits = random(7, THINGS + STUFF, scale=1.5), blobs(7, offset=-2)
    probs = mask_probabilities(mask_logits, geometry)
    monkeypatch.setattr(cells, "CELL_STEP", step)
    monkeypatch.setattr(cells, "CELL_PIXELS", most)
    monkeypatch.setattr(cells, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(cells, "BOUNDS_ELEMENTS", elements)
    shapes = record_computed(monkeypatch)

    chosen = torch.tensor([5, 0, 6, 3, 0])
    assert torch.equal(cells.binary_masks(mask_logits, chosen, geometry), (probs > 0.5)[chosen])

    scores = class_logits.sigmoid().amax(dim=1)
    owners, areas, mask_areas = cells.assign_pixels(scores, mask_logits, scores > 0, geometry)
    assert torch.equal(owners, (scores[:, None, None] * probs).argmax(dim=0))
    assert torch.equal(mask_areas, (probs >= 0.5).sum(dim=(1, 2)) * (areas > 0))
    assert all(count == 1 or count * kernels * pixels <= elements for count, kernels, pixels in shapes)
    assert Cells(mask_logits, geometry).areas.sum() == output[0] * output[1]


@pytest.mark.parametrize("padded", [(30, 40), (31, 45)])
def test_masks_that_are_finer_than_the_input(padded):
    """The masks are larger than the input, as from a head with stride 1/2."""
    geometry = ImageGeometry(padded=padded, image=(29, 37), output=(50, 99))
    check_both_ways(torch.linspace(0.5, 0.9, 5, dtype=torch.float64), blobs(5, offset=-1), geometry)


def test_only_the_borders_of_instances_are_computed(monkeypatch):
    mask_logits = torch.full((3, *LARGE_HEAD), -5.0)
    mask_logits[0, 8:20, 10:25] = 5  # an object; kernel 1 has none, kernel 2 has everything
    mask_logits[2] = 5
    shapes = record_computed(monkeypatch)
    masks = cells.binary_masks(mask_logits, torch.arange(3), LARGE)
    assert torch.equal(masks, mask_probabilities(mask_logits, LARGE) > 0.5)
    assert 0 < sum(math.prod(shape) for shape in shapes) < masks[0].numel() / 4


def test_kernels_that_cannot_win_a_cell_are_not_computed_there(monkeypatch):
    """One kernel is everywhere with a high score; the others are weak, and below one half."""
    mask_logits = blobs(20, offset=-9)
    mask_logits[4] = 6
    scores = torch.full((20,), 0.3, dtype=torch.float64)
    scores[4] = 0.9
    shapes = record_computed(monkeypatch)
    owners, _, mask_areas = cells.assign_pixels(scores, mask_logits, scores > 0, LARGE)
    assert (owners == 4).all()
    assert mask_areas.sum() == mask_areas[4] == 150 * 203  # all of it full
    assert sum(math.prod(shape) for shape in shapes) == 0


def test_cells_with_other_numbers_of_kernels_are_computed_together(monkeypatch):
    """1 to 17 kernels compete in a cell; cells with few of them repeat one, and are computed in few calls."""
    mask_logits, scores = blobs(20, offset=0), torch.linspace(0.5, 0.9, 20, dtype=torch.float64)
    shapes = record_computed(monkeypatch)
    owners, _, _ = cells.assign_pixels(scores, mask_logits, scores < 0, LARGE)
    assert torch.equal(owners, dense.assign_pixels(scores, mask_logits, scores < 0, LARGE)[0])
    assert [kernels for count, kernels, _ in shapes if count] == [17, 4]


def test_areas_are_counted_only_where_a_mask_is_uncertain(monkeypatch):
    mask_logits = torch.full((1, *LARGE_HEAD), 5.0)
    mask_logits[0, :, :20] = -5
    shapes, one = record_computed(monkeypatch), torch.ones(1)
    _, _, mask_areas = cells.assign_pixels(one, mask_logits, one > 0, LARGE)
    assert torch.equal(mask_areas, (mask_probabilities(mask_logits, LARGE) >= 0.5).sum(dim=(1, 2)))
    assert 0 < sum(count for count, _, _ in shapes) < Cells(mask_logits, LARGE).areas.numel() / 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_do_not_stop_the_merging(value):
    mask_logits = blobs(4, offset=-2)
    mask_logits[1, 5, 5] = value
    class_logits = torch.full((4, THINGS + STUFF), value, dtype=torch.float64)
    for segment_map, _ in run(panoptic_processor(4), class_logits, mask_logits, LARGE):
        assert segment_map.shape == LARGE.output


# Scores that take the masks into account


def slow_thing_scores(class_logits, mask_logits, geometry, exponent, max_iou):
    """(kernel, class) -> score of all pairs that are left, by loops."""
    (height, width), (padded, image, _) = mask_logits.shape[1:], geometry
    pixels = [
        (i, j)
        for i, j in np.ndindex(height, width)
        if (i + 0.5) * padded[0] / height < image[0] and (j + 0.5) * padded[1] / width < image[1]
    ]
    masks = [{x for x in pixels if mask[x] > 0} for mask in mask_logits.numpy()]
    fine = [slow_bilinear(mask, (2 * height, 2 * width)) for mask in mask_logits]
    scores = {}
    for k, logits in enumerate(class_logits.tolist()):
        intersection = union = 0.0
        for i, j in np.ndindex(2 * height, 2 * width):
            if (i + 0.5) * padded[0] / (2 * height) < image[0] and (j + 0.5) * padded[1] / (2 * width) < image[1]:
                probability = sigmoid(float(fine[k][i, j]))
                intersection += probability * (probability > 0.5)
                union += max(probability, probability > 0.5)
        factor = (intersection / union) ** exponent
        scores.update({(k, c): sigmoid(v) * factor for c, v in enumerate(logits)})
    if max_iou == 1:
        return scores
    kept = {}
    for (k, c), score in sorted(scores.items(), key=lambda item: -item[1]):
        if all(len(masks[k] & masks[j]) <= max_iou * len(masks[k] | masks[j]) for j, _ in kept) and all(
            j != k for j, _ in kept
        ):
            kept[k, c] = score
    return kept


@pytest.mark.parametrize("exponent, max_iou", [(0.0, 1.0), (2.0, 1.0), (0.0, 0.3), (0.5, 0.6)])
def test_scores_of_things_match_a_loop(exponent, max_iou):
    class_logits, mask_logits = random(7, 3), random(7, *HEAD, seed=1)
    mask_logits[3:5] = mask_logits[:2] + 0.3 * random(2, *HEAD, seed=2)  # twins
    mask_logits[6] = -1  # an empty mask
    expected = slow_thing_scores(class_logits, mask_logits, GEOMETRY, exponent, max_iou)
    options = {"exponent": exponent, "max_iou": max_iou}
    found = thing_scores(class_logits.sigmoid(), mask_logits, GEOMETRY, **options)
    assert max_iou == 1 or 2 < len(expected) < 7
    for k, c in np.ndindex(7, 3):
        assert found[k, c].item() == pytest.approx(expected.get((k, c), SUPPRESSED), rel=1e-9)
    batch = thing_scores(
        torch.stack([class_logits, -class_logits]).sigmoid(),
        torch.stack([mask_logits, mask_logits]),
        GEOMETRY,
        **options,
    )
    torch.testing.assert_close(batch[0], found)


def test_suppression_is_greedy_along_a_chain():
    """Each mask overlaps the next one: the first suppresses the second, which then spares the third."""
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])[[3, 0, 4, 1, 2]]
    order = torch.tensor([3, 0, 4, 1, 2])
    overlaps = (order[:, None] - order).abs() <= 1
    assert not_suppressed(scores, overlaps).tolist() == [bool(rank % 2 == 0) for rank in order]


def test_of_equal_scores_the_first_kernel_is_kept():
    assert not_suppressed(torch.tensor([0.5, 0.5]), torch.ones(2, 2, dtype=torch.bool)).tolist() == [True, False]


def test_suppressed_instances_are_not_returned_and_leave_room_for_others():
    masks = torch.full((3, 5, 5), -9.0)
    masks[:2, :3], masks[2, 4] = 9.0, 9.0
    class_logits = torch.tensor([[2.0, 1.5], [1.0, 1.8], [-1.0, -2.0]])
    everything = run_instances(class_logits, masks, PLAIN, max_instances=3)
    assert everything.pred_masks.flatten(1).any(dim=0).sum() == everything.pred_masks[0].sum()
    result = run_instances(class_logits, masks, PLAIN, max_instances=3, mask_nms=0.7)
    assert result.pred_classes.tolist() == [0, 0]
    torch.testing.assert_close(result.scores, torch.tensor([sigmoid(2.0), sigmoid(-1.0)]))
    assert torch.equal(result.pred_masks[0], everything.pred_masks[0]) and result.pred_masks[1].any()


def test_twins_of_a_thing_void_its_pixels_unless_one_is_suppressed():
    masks = torch.full((4, 5, 5), -9.0)
    masks[0, :, :3] = masks[1, :, :3] = 3.0
    masks[0, 0:2, :3] = masks[1, 3:5, :3] = 4.0
    masks[2:] = -1.0
    class_logits = torch.full((4, 4), -3.0)
    class_logits[0, 0], class_logits[1, 1], class_logits[2, 2] = 1.0, 1.0, 1.0
    segment_map, _ = run_panoptic(class_logits, masks, PLAIN)
    assert not segment_map[:, :10].any()
    segment_map, segments = run_panoptic(class_logits, masks, PLAIN, mask_nms=0.7)
    assert segments[0]["category_id"] == CATEGORIES[0] and (segment_map[:, :10] == 1).all()
    _, segments = run_panoptic(class_logits, masks, PLAIN, mask_nms=0.7, score_exponent=2.0)
    expected = slow_thing_scores(class_logits, masks, PLAIN, 2.0, 1.0)[0, 0]
    assert 0.5 * sigmoid(1.0) < expected < 0.9 * sigmoid(1.0)
    assert segments[0]["score"] == pytest.approx(expected, rel=1e-5)


def test_no_kernels_have_no_scores():
    found = thing_scores(torch.ones(0, 3), torch.ones(0, 5, 5), PLAIN, exponent=1.0, max_iou=0.7)
    assert found.shape == (0, 3)


@pytest.mark.parametrize("logit", [1.0, 8.0])
def test_expected_ious_of_soft_and_sharp_masks(logit):
    """Half of the cells at p, the others at 1 - p: p / (1 + 1 - p), but for the two cells of the border."""
    masks = torch.full((2, 1, 200), logit, dtype=torch.float64)
    masks[..., 100:] = -logit
    found = expected_ious(masks, ImageGeometry((4, 800), (4, 800), (4, 800)))
    p = sigmoid(logit)
    assert found.tolist() == pytest.approx(2 * [p / (2 - p)], abs=0.01)
