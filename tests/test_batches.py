"""Predictions of several images at once: the results of single images, and what runs beside what."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.errors import ConfigError
from knet_d2.inference.batches import batched, in_groups, map_ahead

OPTIONS = {
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "MODEL.KNET.NUM_STAGES": 2,
    "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0,
}
# Resized to 64 x 80 (padded to 64 x 96), 64 x 96, 64 x 80 and 96 x 64
SIZES = [(64, 80), (64, 96), (32, 40), (120, 80)]


def predictor_of(task, folder, **options):
    """A tiny model with scores all over (0, 1)."""
    options = {**OPTIONS, **options}
    cfg = tiny_config(task, options)
    resolve_classes(cfg)
    model = tiny_model(task, options).eval()
    if task != "semantic":
        spread_scores(model)
    path = str(folder / f"{task}.pth")
    save_weights(path, model.state_dict(), describe_model(cfg))
    return knet_d2.load(path, device="cpu", confidence_threshold=0.0)


@pytest.fixture(scope="module", params=["instance", "panoptic", "semantic"])
def predictor(request, tmp_path_factory):
    return predictor_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def batches(predictor):
    """The shapes of the batches that the network has computed so far."""
    shapes = []
    handle = predictor.model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    yield shapes
    handle.remove()


def random_images(sizes=SIZES):
    return [np.random.RandomState(i).randint(0, 256, (*size, 3), np.uint8) for i, size in enumerate(sizes)]


def assert_same(found, expected):
    assert found.size == expected.size and len(found.segments) == len(expected.segments) > 0
    for a, b in zip(found.segments, expected.segments):
        assert a.label == b.label and a.score == (None if b.score is None else pytest.approx(b.score, abs=1e-4))
        assert (a.mask == b.mask).mean() > 0.999


def test_a_batch_gives_the_results_of_single_images(predictor, batches):
    images = random_images()
    expected = [predictor(image, order="RGB") for image in images]
    batches.clear()
    for found, wanted in zip(predictor.predict_batch(images, "RGB"), expected, strict=True):
        assert_same(found, wanted)
    if predictor.model.preprocessor.pads_images:
        assert [tuple(x) for x in batches] == [(3, 3, 64, 96), (1, 3, 96, 64)]
    else:
        assert [tuple(x) for x in batches] == [(2, 3, 64, 80), (1, 3, 64, 96), (1, 3, 96, 64)]


def test_images_padded_to_one_size(predictor, batches):
    images = random_images()
    if not predictor.model.preprocessor.pads_images:
        with pytest.raises(ConfigError, match=r"pad_to = \(96, 96\): a semantic model sees no padding"):
            predictor.predict_batch(images, "RGB", pad_to=(96, 96))
        return
    together = predictor.predict_batch(images, "RGB", pad_to=(96, 100))
    assert [tuple(x) for x in batches] == [(4, 3, 96, 128)]
    for image, found in zip(images, together, strict=True):
        assert_same(found, predictor.predict_batch([image], "RGB", pad_to=(96, 128))[0])
    padded, plain = together[0], predictor(images[0], order="RGB")
    assert [x.score for x in padded.segments] != pytest.approx([x.score for x in plain.segments], abs=1e-4)
    with pytest.raises(ConfigError, match=r"pad_to = \(80, 96\): an image is resized to 96 x 64"):
        predictor.predict_batch(images, "RGB", pad_to=(80, 96))


def test_a_folder_in_batches(predictor, batches, tmp_path, caplog):
    for i, image in enumerate(random_images(SIZES * 2)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    expected = list(predictor.images(str(tmp_path)))
    assert len(expected) == 7 and "3.png" in caplog.text
    batches.clear()
    found = list(predictor.images(str(tmp_path), batch_size=3, workers=2))
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, one), (_, other) in zip(found, expected):
        assert_same(one, other)
    assert max(x[0] for x in batches) > 1
    tiled = list(predictor.images(str(tmp_path), tile_size=500))  # each image is one tile
    assert [name for name, _ in tiled] == [name for name, _ in expected]
    for (_, one), (_, other) in zip(tiled, expected):
        assert_same(one, other)


def test_several_threads(predictor):
    """All four images are in the backbone at once, then in the cascade, from the first image on."""
    images = random_images()
    expected = [predictor(image, order="RGB") for image in images]
    fresh, together = knet_d2.load(predictor.cfg.MODEL.WEIGHTS, device="cpu", confidence_threshold=0.0), []
    for part in (fresh.model.backbone, fresh.model.cascade, fresh.model.postprocessor):
        barrier = threading.Barrier(len(images), timeout=60)
        part.register_forward_pre_hook(lambda *_, barrier=barrier: together.append(barrier.wait()))
    with ThreadPoolExecutor(len(images)) as pool:
        found = list(pool.map(lambda image: fresh(image, order="RGB"), images))
    assert len(together) == 3 * len(images)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_options_that_make_no_sense(predictor, tmp_path):
    Image.fromarray(random_images()[0]).save(tmp_path / "0.png")
    for options, message in (
        ({"batch_size": 0}, "batch_size = 0"),
        ({"workers": 0}, "workers = 0"),
        ({"tile_size": 64, "batch_size": 2}, "tile_size = 64: tiles"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(predictor.images(str(tmp_path), **options))


def test_predicting_goes_on_while_results_are_written(tmp_path):
    predictor, started = predictor_of("semantic", tmp_path), threading.Semaphore(0)
    predictor.model.backbone.register_forward_pre_hook(lambda *_: started.release())
    for i, image in enumerate(random_images([(64, 80)] * 8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    results = predictor.images(str(tmp_path), batch_size=2)
    next(results)
    assert all(started.acquire(timeout=60) for _ in range(2))  # the second batch, while the first result is in use
    next(results)
    assert started.acquire(timeout=60)
    assert not started.acquire(timeout=0.5)  # the fourth batch waits, however long a caller needs
    results.close()


def test_items_are_computed_ahead_in_order():
    taken = []
    items = (taken.append(i) or i for i in range(100))
    both = threading.Barrier(2, timeout=60)  # passed only if two items are computed at once

    def square(i):
        if i < 2:
            both.wait()
        return i * i

    results = map_ahead(square, items, workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 2 * 2  # so that memory stays the same
    assert list(results) == [i * i for i in range(3, 100)]


def test_groups_of_one_kind():
    calls = []
    result = in_groups(lambda some: calls.append(some) or [x * 10 for x in some], [1, 2, 3, 4, 5], lambda x: x % 2)
    assert (result, calls) == ([10, 20, 30, 40, 50], [[1, 3, 5], [2, 4]])
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
