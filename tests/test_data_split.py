"""A part of a data set's images put aside for validation by one key of DATASETS.CUSTOM."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg, edit_json
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from knet_d2.data import load_dataset, register_custom_datasets, resolve_classes
from knet_d2.data.check import check_datasets
from knet_d2.data.shapes import write_shapes
from knet_d2.data.split import Part, photo_of
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import build_evaluators

NUM_IMAGES = 10
TASKS = {"coco_instance": "instance", "coco_panoptic": "panoptic", "sem_seg": "semantic"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=NUM_IMAGES, seed=3, size=48)
    return folder


def split_cfg(kind, root, **changes):
    """The config, and the names of its training and validation set."""
    entry = custom_entry(kind, root, **{"validation": 0.3, **changes})
    names = (f"{entry['name']}_train", f"{entry['name']}_val")
    cfg = data_cfg(TASKS[kind], custom=(entry,), resolve=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    return cfg, *names


def files(name):
    return [os.path.basename(record["file_name"]) for record in load_dataset(name)]


@pytest.mark.parametrize("kind", TASKS)
def test_parts_are_disjoint_and_complete_and_the_same_for_all_types(root, kind):
    _, train, val = split_cfg(kind, root)
    assert len(files(train)) == 7 and len(files(val)) == 3
    assert set(files(train)) | set(files(val)) == set(os.listdir(os.path.join(root, "images")))
    assert set(files(val)) == {"000001.jpg", "000005.jpg", "000009.jpg"}  # by their names alone, on every machine


def test_order_doesnt_matter_and_a_new_image_moves_at_most_one():
    names = [f"photos/{i}.jpg" for i in range(40)]
    part = Part("val", 0.25)
    chosen = part.select(names)
    assert len(chosen) == 10 and part.select(names[::-1]) == chosen
    assert Part("train", 0.25).select(names) == set(names) - chosen
    for i in range(40, 80):
        added = part.select([*names, f"photos/{i}.jpg"])
        assert len(chosen - added) <= 1
    # in no relation to the order of the names
    assert len(chosen & set(names[:20])) not in (0, 10)


def test_versions_of_a_photo_stay_together():
    names = [f"p{i}_jpg.rf.{version:032x}.jpg" for i in range(10) for version in range(3)]
    chosen = Part("val", 0.2).select(names)
    assert len(chosen) == 6 and len({photo_of(x) for x in chosen}) == 2
    assert Part("train", 0.2).select(names) == set(names) - chosen
    assert photo_of("a/p0_jpg.rf.0123456789abcdef.jpg") == "a/p0_jpg.jpg" and photo_of("a.rf.jpg") == "a.rf.jpg"


@pytest.mark.parametrize("fraction, number", [(0.001, 1), (0.5, 2), (0.999, 3)])
def test_each_part_has_an_image(fraction, number):
    names = list("abcd")
    assert [len(Part(x, fraction).select(names)) for x in ("val", "train")] == [number, 4 - number]


@pytest.mark.parametrize("validation, test, number", [(0.2, 0.1, 100), (0.001, 0.001, 3), (0.5, 0.4, 3), (0.1, 0.8, 4)])
def test_three_parts_are_disjoint_and_complete_and_each_has_a_photo(validation, test, number):
    names = {f"{i}.jpg" for i in range(number)}
    parts = [Part(kind, validation, test).select(names) for kind in ("train", "val", "test")]
    assert set.union(*parts) == names and sum(map(len, parts)) == number and all(parts)
    if number == 100:
        assert [len(x) for x in parts] == [70, 20, 10]
        assert parts[1] == Part("val", validation).select(names)  # a test part takes nothing from validation


@pytest.mark.parametrize("group_by", [r"^(patient\d+)_", r"patient\d+", "folder"])
def test_groups_stay_together(group_by):
    separator = "/" if group_by == "folder" else "_"
    names = {f"patient{i}{separator}slice{k}.png" for i in range(20) for k in range(1 + i % 4)}
    parts = [Part(kind, 0.2, 0.1, group_by).select(names) for kind in ("train", "val", "test")]
    patients = [{x.split(separator)[0] for x in part} for part in parts]
    assert set.union(*parts) == names and [len(x) for x in patients] == [14, 4, 2]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20


def test_a_name_without_a_group_is_an_error(root):
    _, train, _ = split_cfg("coco_instance", root, group_by="^patient")
    with pytest.raises(DataError, match=r"00000\d.jpg: group_by = '\^patient' is not found in this file name"):
        load_dataset(train)
    _, train, _ = split_cfg("coco_instance", root, group_by="folder")
    with pytest.raises(DataError, match=f"{train} can't be split: it has images of 1 groups for 2 parts"):
        load_dataset(train)


@pytest.mark.parametrize("kind", TASKS)
def test_a_test_part_of_every_type(root, kind):
    _, train, val = split_cfg(kind, root, test=0.2)
    parts = [set(files(x)) for x in (train, val, train.replace("_train", "_test"))]
    assert [len(x) for x in parts] == [5, 3, 2] and len(set.union(*parts)) == NUM_IMAGES


@pytest.mark.parametrize("key", ["validation", "test"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 20, "0.2"])
def test_a_wrong_fraction_is_an_error_that_names_the_key(root, key, value):
    with pytest.raises(ConfigError, match=rf"CUSTOM\[0\]\.{key} = "):
        split_cfg("sem_seg", root, **{key: value})


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"validation": 0.5, "test": 0.5}, "leave nothing for training"),
        ({"group_by": "("}, r"group_by = '\(': use 'folder' or a regular expression"),
    ],
)
def test_other_wrong_splits(root, changes, what):
    with pytest.raises(ConfigError, match=what):
        split_cfg("sem_seg", root, **changes)


@pytest.mark.parametrize("kind", TASKS)
def test_a_limited_number_of_images(root, kind):
    """Of whole data sets and of parts, in loading, the check and evaluation; the choice depends on names alone."""
    whole, split = custom_entry(kind, root), custom_entry(kind, root, validation=0.3)
    cfg = data_cfg(TASKS[kind], resolve=False)
    cfg.DATASETS.CUSTOM, cfg.DATASETS.LIMIT = [whole, split], 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (whole["name"],), (f"{split['name']}_val",)
    register_custom_datasets(cfg)
    chosen = files(whole["name"])
    assert len(chosen) == 2 and set(chosen) == Part("all", limit=2).select(f"{i:06d}.jpg" for i in range(10))
    assert len(files(f"{split['name']}_val")) == len(files(f"{split['name']}_train")) == 2
    assert set(files(f"{split['name']}_val")) < {"000001.jpg", "000005.jpg", "000009.jpg"}
    assert {x.num_images for x in check_datasets(cfg).datasets} == {2}
    if kind != "coco_panoptic":
        assert len(MetadataCatalog.get(whole["name"]).get("image_ids", "12")) == 2


@pytest.mark.parametrize("limit", [-1, 0.5, True])
def test_a_wrong_limit(limit):
    cfg = data_cfg("instance", resolve=False)
    cfg.DATASETS.LIMIT = limit
    with pytest.raises(ConfigError, match="DATASETS.LIMIT = "):
        register_custom_datasets(cfg)


def test_a_limit_is_for_custom_data_sets():
    cfg = data_cfg("instance", resolve=False)
    cfg.DATASETS.LIMIT, cfg.DATASETS.TRAIN = 5, ("coco_2017_train",)
    with pytest.raises(ConfigError, match="DATASETS.LIMIT = 5: .* coco_2017_train is not one"):
        register_custom_datasets(cfg)


def test_one_image_is_too_few(tmp_path):
    write_shapes(str(tmp_path), num_images=1, seed=3, size=48)
    _, train, _ = split_cfg("sem_seg", str(tmp_path))
    with pytest.raises(DataError, match=f"{train} can't be split: it has images of 1 photos"):
        load_dataset(train)


def test_registered_again_or_with_another_fraction(root):
    cfg, *_ = split_cfg("sem_seg", root)
    register_custom_datasets(cfg)
    cfg.DATASETS.CUSTOM = [{**cfg.DATASETS.CUSTOM[0], "validation": 0.4}]
    with pytest.raises(ConfigError, match="other content exists"):
        register_custom_datasets(cfg)


def perfect_output(record, metadata):
    """The ground truth of a record as the model's output for its data set."""
    if metadata.evaluator_type == "sem_seg":
        labels = torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"])).astype(np.int64))
        return {"sem_seg": torch.nn.functional.one_hot(labels.clamp(max=6), 7).permute(2, 0, 1).float()}
    ids = np.array(Image.open(record["pan_seg_file_name"])).astype(np.int64) @ [1, 256, 65536]
    info = [{key: x[key] for key in ("id", "isthing", "category_id")} for x in record["segments_info"]]
    things = [x for x in record["segments_info"] if x["isthing"] and not x["iscrowd"]]
    masks = torch.from_numpy(ids == np.array([x["id"] for x in things], np.int64).reshape(-1, 1, 1))
    instances = Instances(
        ids.shape,
        pred_masks=masks,
        pred_boxes=Boxes(torch.zeros(len(things), 4)),
        scores=torch.ones(len(things)),
        pred_classes=torch.tensor([x["category_id"] for x in things], dtype=torch.int64),
    )
    return {"panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), info), "instances": instances}


@pytest.mark.parametrize("kind, metric", [("coco_panoptic", "PQ"), ("sem_seg", "mIoU")])
def test_evaluation_is_of_the_part_alone(root, kind, metric):
    """Perfect predictions for one part give perfect metrics, although the files contain all images."""
    changes = {"instances_json": os.path.join(root, "instances.json")} if kind == "coco_panoptic" else {}
    cfg, _, val = split_cfg(kind, root, **changes)
    resolve_classes(cfg)
    if changes:
        cfg.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg", "instances"]
    results = {}
    for evaluator in build_evaluators(cfg, val):
        evaluator.reset()
        for record in load_dataset(val):
            evaluator.process([record], [perfect_output(record, MetadataCatalog.get(val))])
        with contextlib.redirect_stdout(io.StringIO()):
            results.update(evaluator.evaluate())
    assert results["panoptic_seg" if changes else "sem_seg"][metric] == 100
    if changes:
        assert results["segm"]["AP"] == 100


@pytest.mark.parametrize("kind", TASKS)
def test_check_counts_each_part(root, kind):
    cfg, train, val = split_cfg(kind, root)
    report = check_datasets(cfg)
    assert not report.failed
    assert [(x.name, x.num_images) for x in report.datasets] == [(train, 7), (val, 3)]
    assert {os.path.basename(x) for x in report.datasets[1].images} == set(files(val))


def test_check_of_a_split_json_names_a_common_fault_once(root, tmp_path):
    copy = shutil.copytree(root, str(tmp_path / "copy"))
    edit_json(os.path.join(copy, "instances.json"), lambda c: c["categories"][1].update(name="circle"))
    edit_json(os.path.join(copy, "instances.json"), lambda c: c["annotations"][0].update(area=0))
    report = check_datasets(split_cfg("coco_instance", copy)[0])
    # No image of the held-out part shows the third class
    expected = ["category name twice", "class that is not evaluated", "wrong area"]
    assert sorted(fault.kind for fault in report.faults) == expected


def test_folds_of_the_demo_s_photos_depend_on_their_names_alone():
    """The photos are sorted by the hash of their names; every third one is in the same fold."""
    folder = Path(__file__).resolve().parent.parent / "demo" / "fruits_nuts"
    names = sorted(
        (p.name for p in (folder / "images").iterdir()), key=lambda x: hashlib.sha256(x.encode()).hexdigest()
    )
    assert len(names) == 18 and (folder / "LICENSE").is_file()
    count = 0
    for fold in range(3):
        content = json.loads((folder / f"fold{fold}.json").read_text())
        assert {x["file_name"] for x in content["images"]} == set(names[fold::3])
        assert {x["image_id"] for x in content["annotations"]} == {x["id"] for x in content["images"]}
        assert {x["category_id"] for x in content["annotations"]} == {1, 2, 3}
        corners = np.array([x["bbox"] for x in content["annotations"]])
        assert (corners[:, :2] + corners[:, 2:] <= [640, 480]).all() and corners.min() >= 0
        count += len(content["annotations"])
    assert count == 165
