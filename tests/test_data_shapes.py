"""The generated data set: determinism, documented properties, files, and generation on first use."""

import hashlib
import json
import multiprocessing
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from panopticapi.utils import rgb2id
from PIL import Image

from knet_d2.data.shapes import (
    STUFF_CLASSES,
    THING_CLASSES,
    draw_scene,
    make_split,
    register_shapes,
    registration,
    write_shapes,
)
from knet_d2.errors import DataError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("shapes"))
    write_shapes(root, num_images=60, seed=11, size=96)
    return root


def _hash(root):
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(root)):
        for name in sorted(names):
            with open(os.path.join(folder, name), "rb") as f:
                digest.update(name.encode() + f.read())
    return digest.hexdigest()


def _load(path):
    with open(path) as f:
        return json.load(f)


def test_same_seed_gives_same_files_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_shapes(str(tmp_path / folder), num_images=4, seed=seed, size=64)
    assert _hash(tmp_path / "a") == _hash(tmp_path / "b") != _hash(tmp_path / "c")


def test_an_image_depends_on_its_index_alone(tmp_path):
    for folder, number in (("few", 2), ("more", 5)):
        write_shapes(str(tmp_path / folder), num_images=number, seed=5, size=64)
    first, second = ((tmp_path / folder / "images" / "000001.jpg").read_bytes() for folder in ("few", "more"))
    assert first == second


def test_statistics():
    scenes = [draw_scene(np.random.default_rng([3, i]), 128) for i in range(120)]
    things = [thing for scene in scenes for thing in scene.things]
    single = [thing for thing in things if not thing.iscrowd]
    numbers = np.array([sum(not thing.iscrowd for thing in scene.things) for scene in scenes])
    assert numbers.min() == 0 and numbers.max() == 8
    assert len(THING_CLASSES) >= 4 and len(STUFF_CLASSES) >= 3
    assert np.bincount([t.category for t in single], minlength=len(THING_CLASSES)).min() > len(single) / 8
    stuff = np.bincount(np.concatenate([scene.stuff[scene.stuff >= 0] for scene in scenes]))
    assert len(stuff) == len(STUFF_CLASSES) and stuff.min() > stuff.sum() / 5
    assert np.mean([t.occlusion > 0.05 for t in single]) >= 0.2
    extent = [max(np.ptp(axis) + 1 for axis in np.nonzero(t.mask)) for t in single if t.occlusion == 0]
    assert max(extent) / min(extent) >= 5
    assert sum(t.iscrowd for t in things) >= 5


def test_recorded_occlusion_and_visibility_follow_from_the_drawing_order():
    for i in range(20):
        things = draw_scene(np.random.default_rng([4, i]), 96).things
        masks = np.array([thing.mask for thing in things]).reshape(-1, 96, 96)
        assert masks.sum(axis=0).max(initial=0) <= 1, "visible masks overlap"
        for thing in things:
            assert thing.mask.any()
            assert thing.polygon is None or thing.occlusion == 0


def test_the_three_formats_tell_the_same(shapes):
    instances, panoptic = (_load(os.path.join(shapes, name)) for name in ("instances.json", "panoptic.json"))
    by_image = {image["id"]: [] for image in instances["images"]}
    for annotation in instances["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    isthing = {category["id"]: category["isthing"] for category in panoptic["categories"]}
    label = {category["id"]: i for i, category in enumerate(panoptic["categories"])}
    for annotation in panoptic["annotations"]:
        ids = rgb2id(np.array(Image.open(os.path.join(shapes, "panoptic", annotation["file_name"]))))
        labels = np.array(Image.open(os.path.join(shapes, "semantic", annotation["file_name"])))
        segments = annotation["segments_info"]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in segments}
        things = [segment for segment in segments if isthing[segment["category_id"]]]
        for thing, instance in zip(things, by_image[annotation["image_id"]], strict=True):
            mask = _instance_mask(instance, ids.shape)
            np.testing.assert_array_equal(mask, ids == thing["id"])
            assert (thing["category_id"], thing["iscrowd"]) == (instance["category_id"], instance["iscrowd"])
            assert thing["area"] == instance["area"] == mask.sum()
        expected = np.full(ids.shape, 255)
        for segment in segments:
            expected[ids == segment["id"]] = label[segment["category_id"]]
        np.testing.assert_array_equal(labels, expected)


def test_all_kinds_of_segmentation_occur(shapes):
    kinds = set()
    for annotation in _load(os.path.join(shapes, "instances.json"))["annotations"]:
        segmentation = annotation["segmentation"]
        kinds.add(list if isinstance(segmentation, list) else type(segmentation["counts"]))
        assert bool(annotation["iscrowd"]) == (
            isinstance(segmentation, dict) and isinstance(segmentation["counts"], list)
        )
    assert kinds == {list, str}


def test_registered_splits_are_made_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(registration, "SPLITS", {"train": (3, 1), "val": (2, 2)})
    names = [f"shapes_{task}_{split}" for task in ("instance", "panoptic", "semantic") for split in ("train", "val")]
    kept = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in names}
    try:
        register_shapes(str(tmp_path))
        assert not os.listdir(tmp_path)
        assert [len(DatasetCatalog.get(name)) for name in names] == [3, 2] * 3
        made = MetadataCatalog.get("shapes_instance_train")
        expected = load_coco_json(made.json_file, made.image_root, "shapes_instance_train")
        assert DatasetCatalog.get("shapes_instance_train") == expected
        panoptic = DatasetCatalog.get("shapes_panoptic_val")[0]
        assert {"pan_seg_file_name", "segments_info", "image_id"} <= set(panoptic)
        assert "sem_seg_file_name" in DatasetCatalog.get("shapes_semantic_val")[0]
        types = [MetadataCatalog.get(name).evaluator_type for name in names[::2]]
        assert types == ["coco", "coco_panoptic_seg", "sem_seg"]
    finally:
        for name, (loader, metadata) in kept.items():
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            DatasetCatalog.register(name, loader)
            MetadataCatalog[name] = metadata


def _make(root, barrier, results):
    registration.SPLITS = {"train": (40, 1)}
    barrier.wait()
    results.put(make_split("train", root))


def test_two_processes_at_once_make_one_whole_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    (folder,) = folders
    assert len(os.listdir(os.path.join(folder, "images"))) == 40
    assert len(_load(os.path.join(folder, "panoptic.json"))["annotations"]) == 40
    left = set(os.listdir(os.path.dirname(folder)))
    assert left == {"train", "train.lock"}, "temporary folders were left behind"


def test_a_broken_start_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(root, *args):
        os.makedirs(os.path.join(root, "images"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registration, "write_shapes", fail)
    with pytest.raises(DataError, match="No space left.*DETECTRON2_DATASETS"):
        make_split("val", str(tmp_path))
    assert os.listdir(tmp_path / "shapes" / registration.VERSION) == ["val.lock"]


def _instance_mask(annotation, shape):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, *shape))
    elif isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, *shape)
    else:
        rle = segmentation
    return mask_util.decode(rle).astype(bool)
