"""A part of a data set's images put aside for validation by one key of DATASETS.CUSTOM."""

import contextlib
import io
import os
import shutil

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
    part = Part(0.25, True)
    chosen = part.select(names)
    assert len(chosen) == 10 and part.select(names[::-1]) == chosen
    assert Part(0.25, False).select(names) == set(names) - chosen
    for i in range(40, 80):
        added = part.select([*names, f"photos/{i}.jpg"])
        assert len(chosen - added) <= 1
    # in no relation to the order of the names
    assert len(chosen & set(names[:20])) not in (0, 10)


def test_versions_of_a_photo_stay_together():
    names = [f"p{i}_jpg.rf.{version:032x}.jpg" for i in range(10) for version in range(3)]
    chosen = Part(0.2, True).select(names)
    assert len(chosen) == 6 and len({photo_of(x) for x in chosen}) == 2
    assert Part(0.2, False).select(names) == set(names) - chosen
    assert photo_of("a/p0_jpg.rf.0123456789abcdef.jpg") == "a/p0_jpg.jpg" and photo_of("a.rf.jpg") == "a.rf.jpg"


@pytest.mark.parametrize("fraction, number", [(0.001, 1), (0.5, 2), (0.999, 3)])
def test_each_part_has_an_image(fraction, number):
    names = list("abcd")
    assert [len(Part(fraction, x).select(names)) for x in (True, False)] == [number, 4 - number]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 20, "0.2"])
def test_a_wrong_fraction_is_an_error_that_names_the_key(root, value):
    with pytest.raises(ConfigError, match=r"CUSTOM\[0\]\.validation = "):
        split_cfg("sem_seg", root, validation=value)


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
    assert sorted(fault.kind for fault in report.faults) == ["category name twice", "wrong area"]
