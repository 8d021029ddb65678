"""Test-time augmentation."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image

from knet_d2 import model_zoo
from knet_d2.data import resolve_classes
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import Predictor, Trainer
from knet_d2.errors import ConfigError
from knet_d2.modeling.layers import sample
from knet_d2.modeling.meta_arch import KNet
from knet_d2.modeling.postprocessing import ImageGeometry, ImageLogits
from knet_d2.modeling.tta import (
    KNetWithTTA,
    View,
    match_kernels,
    merge_views,
    resample_masks,
)
from knet_d2.programs import train
from knet_d2.tasks import TASKS

SIZES = {"INPUT.MIN_SIZE_TEST": 40, "INPUT.MAX_SIZE_TEST": 70}
BANK = TASKS["panoptic"].bank(num_matched=3, num_things=2, num_stuff=1)


def augmented(task, sizes=(40,), flip=False, max_size=4000):
    """Return a model with many results, and the same model with test-time augmentation."""
    options = {**SIZES, "TEST.AUG.MIN_SIZES": sizes, "TEST.AUG.FLIP": flip, "TEST.AUG.MAX_SIZE": max_size}
    if task == "panoptic":
        options["MODEL.KNET.TEST.OUTPUTS"] = ("panoptic_seg", "instances", "sem_seg")
    model = tiny_model(task, options).eval()
    if task != "semantic":
        spread_scores(model)
    return model, KNetWithTTA(tiny_config(task, options), model).eval()


def picture(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


# ---- views -----------------------------------------------------------------------------------------------------


def test_views():
    """The plain view is first; the others are sorted from large to small, without duplicates, within the limits."""
    _, model = augmented("panoptic", sizes=(20, 40, 80), flip=True, max_size=140)
    plain = (40, 60)
    others = [(80, 120), (80, 120), plain, (20, 30), (20, 30)]
    views = model.views(100, 150)
    assert [view.size for view in views] == [plain, *others]
    assert [view.flipped for view in views] == [False, False, True, True, False, True]
    longer = [view.size for view in model.views(100, 200)]
    assert longer == [(35, 70), (70, 140), (70, 140), (40, 80), (40, 80), (20, 40), (20, 40)]
    _, model = augmented("panoptic", sizes=(40,), flip=False)
    assert model.views(100, 150) == [View(plain, False)]


@pytest.mark.parametrize("sizes", [(), (0,), (400, -1), ("large",)])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"TEST.AUG.MIN_SIZES is \("):
        augmented("semantic", sizes=sizes)


@pytest.mark.parametrize("name", [n for n in model_zoo.names() if n.startswith("ade20k")])
def test_official_sizes(name):
    """Those of the official multi-scale test: 0.5 to 1.75 times the plain size, each flipped, too."""
    cfg = model_zoo.get_config(name)
    ratios = [size / cfg.INPUT.MIN_SIZE_TEST for size in cfg.TEST.AUG.MIN_SIZES]
    assert ratios == [0.5, 0.75, 1, 1.25, 1.5, 1.75] and cfg.TEST.AUG.FLIP
    assert cfg.TEST.AUG.MAX_SIZE == 1.75 * cfg.INPUT.MAX_SIZE_TEST and not cfg.TEST.AUG.ENABLED


# ---- one view --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_one_view_through_the_merging_is_the_plain_result(task, monkeypatch):
    """Of an image whose sides are no multiples of anything, for a result of another size."""
    model, with_tta = augmented(task)
    monkeypatch.setattr(with_tta, "views", lambda height, width: [View((height, width), False)] * 3)
    sample = {"image": picture(43, 57), "height": 50, "width": 61}
    with torch.no_grad():
        (expected,), (found,) = model([sample]), with_tta([sample])
    assert list(found) == list(expected)
    if task == "semantic":
        torch.testing.assert_close(found["sem_seg"], expected["sem_seg"].softmax(0))
        assert torch.equal(found["sem_seg"].argmax(0), expected["sem_seg"].argmax(0))
        return
    a, b = expected["instances"], found["instances"]
    assert len(a) > 3 and 0.05 < a.pred_masks.float().mean() < 0.95
    assert torch.equal(a.pred_masks, b.pred_masks) and torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
    if task == "panoptic":
        assert torch.equal(expected["panoptic_seg"][0], found["panoptic_seg"][0])
        assert len(found["panoptic_seg"][1]) == len(expected["panoptic_seg"][1]) > 1
        torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])


def test_predictor_and_evaluation_see_the_same_plain_view(tmp_path):
    """Through Detectron2's predictor, which gives floats; the image is resized once, from its own size."""
    options = {**SIZES, "TEST.AUG.MIN_SIZES": (40,), "TEST.AUG.FLIP": False, "MODEL.WEIGHTS": str(tmp_path / "x.pth")}
    torch.save({"model": spread_scores(tiny_model("instance")).state_dict()}, tmp_path / "x.pth")
    image = picture(80, 120).permute(1, 2, 0).numpy()
    results = []
    for enabled in (False, True):
        predictor = Predictor(tiny_config("instance", {**options, "TEST.AUG.ENABLED": enabled}))
        results.append(predictor(image)["instances"])
    assert isinstance(predictor.model, KNetWithTTA) and isinstance(predictor.network, KNet)
    assert results[0].image_size == results[1].image_size == (80, 120)
    assert torch.equal(results[0].scores, results[1].scores)
    assert torch.equal(results[0].pred_masks, results[1].pred_masks) and results[0].pred_masks.any()


# ---- several views ---------------------------------------------------------------------------------------------


def test_semantic_probabilities_are_averaged():
    model, with_tta = augmented("semantic", sizes=(30,), flip=True)
    image = picture(40, 60)
    resized = torch.from_numpy(np.ascontiguousarray(_resize(image, 30, 45)))
    size = {"height": 40, "width": 60}
    with torch.no_grad():
        (found,) = with_tta([{"image": image}])
        views = [model([{"image": x, **size}])[0]["sem_seg"].softmax(0) for x in (image, resized, resized.flip(-1))]
    views[2] = views[2].flip(-1)
    torch.testing.assert_close(found["sem_seg"], sum(views) / 3)
    assert (views[1] - views[2]).abs().max() > 0.01


def _resize(image, height, width):
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.BILINEAR)
    return np.asarray(pixels).transpose(2, 0, 1)


def test_views_of_a_model_are_matched_and_averaged():
    """Several sizes, flipped, through a whole model: kernels keep to their places within the plain view."""
    model, with_tta = augmented("panoptic", sizes=(32, 40, 64), flip=True)
    with torch.no_grad():
        (plain,) = model([{"image": picture(40, 60)}])
        (found,) = with_tta([{"image": picture(40, 60)}])
    assert found["panoptic_seg"][0].shape == (40, 60) and found["sem_seg"].shape == plain["sem_seg"].shape
    assert len(found["instances"]) == len(plain["instances"])
    assert not torch.allclose(found["sem_seg"], plain["sem_seg"], atol=1e-3)


def blocks(boxes, size, inside=4.0):
    """Logits [N, *size] of rectangles (top, bottom, left, right)."""
    logits = torch.full((len(boxes), *size), -inside)
    for mask, (top, bottom, left, right) in zip(logits, boxes):
        mask[top:bottom, left:right] = inside
    return logits


GEOMETRY = ImageGeometry((32, 64), (32, 64), (32, 64))
BOXES = [(0, 4, 0, 4), (0, 8, 8, 16), (4, 8, 0, 4), (0, 8, 0, 16)]


def prediction(order=(0, 1, 2), shift=0.0):
    """Three things and one stuff region; the things are those of BOXES in this order."""
    class_logits = torch.tensor([[2.0, -3.0, -9.0], [-3.0, 1.0, -9.0], [0.5, -1.0, -9.0], [-9.0, -9.0, 3.0]]) + shift
    things = list(order)
    return ImageLogits(class_logits[[*things, 3]], blocks([BOXES[i] for i in (*things, 3)], (8, 16)), GEOMETRY)


def test_kernels_of_a_mirrored_image_find_their_objects():
    """In the flipped view other kernels find the objects; without matching, different objects would be averaged."""
    plain, mirrored = prediction(), prediction(order=(2, 0, 1), shift=1.0)
    mirrored = mirrored._replace(mask_logits=mirrored.mask_logits.flip(-1))
    merged = merge_views(iter([plain, mirrored]), [False, True], BANK)
    mean = (plain.class_logits.sigmoid() + (plain.class_logits + 1).sigmoid()) / 2
    torch.testing.assert_close(merged.class_logits.sigmoid(), mean)
    torch.testing.assert_close(merged.mask_logits, plain.mask_logits, atol=1e-3, rtol=0)


def test_mean_of_masks_is_that_of_their_probabilities():
    plain = prediction()
    other = plain._replace(mask_logits=plain.mask_logits - 2)
    views = [plain, other, other]
    merged = merge_views(iter(views), [False] * 3, BANK)
    torch.testing.assert_close(merged.mask_logits.sigmoid(), sum(x.mask_logits.sigmoid() for x in views) / 3)
    assert merged.geometry == GEOMETRY


def test_what_has_no_match_stays():
    """One thing is only in the plain view, and another only in the other view."""
    plain, other = prediction(), prediction(shift=2.0)
    other.mask_logits[1] = blocks([(0, 2, 14, 16)], (8, 16))[0]
    merged = merge_views(iter([plain, other]), [False] * 2, BANK)
    torch.testing.assert_close(merged.class_logits[1], plain.class_logits[1])
    torch.testing.assert_close(merged.mask_logits[1], plain.mask_logits[1])
    assert not torch.isclose(merged.class_logits[[0, 2]], plain.class_logits[[0, 2]]).any()


def test_confident_logits_survive():
    """Float32 probabilities of 1 - 1e-9 are 1, whose logit is infinite."""
    plain = prediction()
    plain = plain._replace(mask_logits=plain.mask_logits * 50, class_logits=plain.class_logits * 30)
    merged = merge_views(iter([plain, plain, plain]), [False] * 3, BANK)
    torch.testing.assert_close(merged.mask_logits, plain.mask_logits)
    torch.testing.assert_close(merged.class_logits, plain.class_logits)


def test_the_finest_view_gives_the_grid():
    """The border of an object in the result is that of the largest view."""
    plain = prediction()
    large = plain.mask_logits.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    large[:, 9] = large[:, 8]
    finer = plain._replace(mask_logits=large, geometry=ImageGeometry((64, 128), (64, 128), (32, 64)))
    merged = merge_views(iter([plain, finer]), [False] * 2, BANK)
    assert merged.mask_logits.shape == (4, 16, 32) and merged.geometry == finer.geometry
    assert torch.equal(merged.mask_logits > 0, large > 0)


def test_only_two_views_are_in_memory():
    alive = []

    def views():
        for _ in range(6):
            view = prediction()
            alive.append(weakref.ref(view.mask_logits))
            assert sum(x() is not None for x in alive) <= 3  # the plain one, the one before and this one
            yield view
            del view

    merge_views(views(), [False] * 6, BANK)
    assert len(alive) == 6


# ---- parts -----------------------------------------------------------------------------------------------------


def test_matching_by_masks_and_classes():
    """Two kernels share an object; matching by masks alone would match the best kernel to the worst."""
    masks = torch.zeros(4, 20, dtype=torch.bool)
    masks[:2, :10] = True
    masks[1, 0] = False
    masks[2, 10:14] = True
    other = masks[[3, 1, 0, 2]]
    other[3] = False
    other[3, 12:] = True  # IoU with the third: 2 / 8
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.1], [0.8, 0.1], [0.7, 0.1]])
    other_scores = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.1, 0.1], [0.8, 0.1]])
    rows, columns = match_kernels(masks, scores, other, other_scores)
    assert dict(zip(rows.tolist(), columns.tolist())) == {0: 1, 1: 2}
    # of two equal masks, the one of the same class
    rows, columns = match_kernels(masks[[0, 0]], torch.eye(2), masks[[0, 0]], torch.eye(2).flip(0))
    assert dict(zip(rows.tolist(), columns.tolist())) == {0: 1, 1: 0}


@pytest.mark.parametrize("flipped", [False, True])
def test_resampling_between_grids_of_padded_images(flipped):
    """Bilinear sampling keeps a linear function, whatever the paddings and strides are."""
    source, target = ImageGeometry((64, 96), (50, 80), (1, 1)), ImageGeometry((96, 160), (90, 144), (1, 1))

    def plane(size, geometry, flipped):
        y, x = ((torch.arange(n) + 0.5) / n * geometry.padded[i] / geometry.image[i] for i, n in enumerate(size))
        return 3 * y[:, None] + 7 * ((1 - x) if flipped else x)

    found = resample_masks(plane((16, 24), source, flipped)[None], source, (12, 20), target, flipped)
    expected = plane((12, 20), target, False)
    inside = (slice(1, 10), slice(1, 17))  # the border is not linear
    torch.testing.assert_close(found[0][inside], expected[inside])


# ---- programs --------------------------------------------------------------------------------------------------


def test_in_a_run(tmp_path):
    """The last evaluation, and no other one, is done with augmentation, too; its results have keys of their own."""
    write_shapes(str(tmp_path / "data"), num_images=3, seed=5, size=64)
    entry = custom_entry("coco_panoptic", str(tmp_path / "data"))
    options = {"MODEL.KNET.NUM_THING_CLASSES": 0, "MODEL.KNET.NUM_STUFF_CLASSES": 0}
    cfg = tiny_config("panoptic", options)
    cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [entry], (entry["name"],), (entry["name"],)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS = (64,), 48, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED = 2, 2, (), 1
    cfg.TEST.EVAL_PERIOD, cfg.TEST.NUM_PICTURES, cfg.TEST.REPORT, cfg.TEST.AUG.ENABLED = 1, 0, False, True
    cfg.TEST.AUG.MIN_SIZES, cfg.OUTPUT_DIR = (48, 64), str(tmp_path / "out")
    os.makedirs(cfg.OUTPUT_DIR)
    data_cfg("panoptic", custom=(entry,))
    resolve_classes(cfg)
    trainer = Trainer(cfg)
    seen = []
    trainer.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]["image"].shape[-1]))
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert {"panoptic_seg", "panoptic_seg_TTA"} <= set(results)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert ["panoptic_seg_TTA/PQ" in line for line in lines] == [False, True]
    # two steps of training, two plain evaluations; then 48 plain, 64, 64 flipped, 48 flipped
    assert sorted(set(seen[:-12])) == [48, 64] and seen[-12:] == [48, 64, 64, 48] * 3

    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    again = train.evaluate(cfg, resume=False)
    for key in ("panoptic_seg", "panoptic_seg_TTA"):
        assert again[key] == pytest.approx(results[key], nan_ok=True)


def test_border_of_resampling_without_the_padding_mode():
    """MPS has no padding mode "border": points beyond the outermost pixels are moved there."""
    generator = torch.Generator().manual_seed(0)
    maps, grid = torch.randn(1, 3, 5, 7, generator=generator), 3 * torch.rand(1, 40, 40, 2, generator=generator) - 1.5
    expected = torch.nn.functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(sample(maps, (grid + 1) / 2), expected, rtol=1e-4, atol=1e-5)
    zeros = torch.nn.functional.grid_sample(maps, grid, align_corners=False)
    assert (zeros - expected).abs().max() > 0.5
