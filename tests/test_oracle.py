"""For every format: a model that predicts exactly what training reads as ground truth scores 100."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_helpers import data_cfg, unique_name
from dataset_trees import (
    CLASSES,
    NUM_THINGS,
    compressed,
    instances_json,
    polygon,
    registered_below,
    uncompressed,
    write_cityscapes,
    write_images,
    write_labels,
    write_lvis,
    write_panoptic,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_panoptic, register_coco_panoptic_separated
from detectron2.structures import Instances
from helpers import SMALL
from PIL import Image

from knet_d2.config.files import get_config_file
from knet_d2.data import load_dataset
from knet_d2.data.mapper import build_loss_mapper
from knet_d2.engine import Trainer, load_config
from knet_d2.errors import ConfigError
from knet_d2.evaluation import build_evaluators


def oracle(cfg, record):
    """The ground truth of a record, as training reads it, in the form of the outputs of a model."""
    knet, example = cfg.MODEL.KNET, build_loss_mapper(cfg)(record)
    outputs, size = {}, example["image"].shape[-2:]
    if "instances" in example:
        truth, instances = example["instances"], Instances(size)
        instances.pred_masks, instances.pred_classes = truth.gt_masks.tensor, truth.gt_classes
        instances.pred_boxes = truth.gt_masks.get_bounding_boxes()
        instances.scores = torch.linspace(1, 0.5, len(truth))
        outputs["instances"] = instances
    if "sem_seg" in example:
        labels = example["sem_seg"]
        # Void pixels may have any class; those of crowds are things in separated label maps.
        known = labels.where(labels != cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE, 0)
        if "instances" in example:
            for mask, label in zip(instances.pred_masks, instances.pred_classes):
                known[mask] = label
        number = knet.NUM_THING_CLASSES + knet.NUM_STUFF_CLASSES
        outputs["sem_seg"] = torch.nn.functional.one_hot(known, number).permute(2, 0, 1).float()
    if len(outputs) == 2:
        ids, info = torch.zeros(size, dtype=torch.int32), []
        regions = [(m, True, knet.THING_CATEGORY_IDS[c]) for m, c in zip(instances.pred_masks, instances.pred_classes)]
        for i, category in enumerate(knet.STUFF_CATEGORY_IDS, knet.NUM_THING_CLASSES):
            regions.append((labels == i, False, category))
        for mask, isthing, category in regions:
            if mask.any():
                info.append({"id": len(info) + 1, "isthing": isthing, "category_id": category})
                ids[mask] = len(info)
        outputs["panoptic_seg"] = (ids, info)
    return outputs


def scores(task, name, custom=(), outputs=()):
    """Evaluate the oracle: {"group/metric": value} of the main metrics."""
    cfg = data_cfg(task, name, custom=custom)
    cfg.MODEL.KNET.TEST.OUTPUTS = list(outputs)
    results = {}
    for evaluator in build_evaluators(cfg, name):
        evaluator.reset()
        for record in load_dataset(name):
            evaluator.process([record], [oracle(cfg, record)])
        with contextlib.redirect_stdout(io.StringIO()):
            results.update(evaluator.evaluate())
    metrics = ("AP", "PQ", "PQ_th", "PQ_st", "SQ", "mIoU", "pACC")
    return {f"{k}/{m}": results[k][m] for k in results for m in metrics if m in results[k]}


def assert_perfect(found, *groups):
    assert {x.split("/")[0] for x in found} == set(groups)
    assert found == pytest.approx(dict.fromkeys(found, 100.0), abs=1e-9)


# ---- instances: each entry changes the file

INSTANCES = {
    "polygons": {},
    "annotation ids from 0": {"first_id": 0},
    "compressed RLE": {"segmentation": compressed},
    "uncompressed RLE": {"segmentation": uncompressed},
    "category ids out of order": {"ids": (90, 3)},
    "no crowds": {"with_crowds": False},
}


@pytest.mark.parametrize("kind", INSTANCES)
def test_coco_instances(tmp_path, kind):
    entry = _instances(tmp_path, instances_json(**INSTANCES[kind]))
    assert_perfect(scores("instance", entry["name"], (entry,)), "bbox", "segm")


def test_more_than_255_classes(tmp_path):
    content = instances_json(ids=(7, 300))
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 366)]
    entry = _instances(tmp_path, content)
    assert_perfect(scores("instance", entry["name"], (entry,)), "bbox", "segm")


def _instances(root, content):
    write_images(root / "images")
    (root / "instances.json").write_text(json.dumps(content))
    return {
        **{"name": unique_name("oracle"), "type": "coco_instance"},
        **{"json": str(root / "instances.json"), "images": str(root / "images")},
    }


@pytest.mark.parametrize("segmentation", [polygon, compressed])
def test_instances_registered_in_python(tmp_path, segmentation):
    entry = _instances(tmp_path, instances_json(segmentation))
    data_cfg("instance", custom=(entry,))
    name, records = unique_name("python"), load_dataset(entry["name"])
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(CLASSES[:NUM_THINGS])
    assert_perfect(scores("instance", name), "bbox", "segm")


# ---- panoptic

PANOPTIC = {"panoptic": ["panoptic_seg", "instances"], "instance": ["instances"]}


@pytest.mark.parametrize("task", PANOPTIC)
@pytest.mark.parametrize("leave_out", [(), ("area", "iscrowd")], ids=["complete", "without area and iscrowd"])
@pytest.mark.parametrize("ids", [(1, 2, 3, 4), (90, 2, 1, 200)], ids=str)
def test_coco_panoptic(tmp_path, task, ids, leave_out):
    """Without iscrowd, the group of cars is one car."""
    content = instances_json(ids=ids)
    for annotation in content["annotations"]:
        annotation["iscrowd"] &= "iscrowd" not in leave_out
    entry = {**_instances(tmp_path, content), "type": "coco_panoptic"}
    entry["instances_json"] = entry.pop("json")
    write_panoptic(tmp_path, ids, leave_out)
    entry.update(panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(tmp_path / "panoptic"))
    groups = ["bbox", "segm", *(["panoptic_seg"] if task == "panoptic" else [])]
    assert_perfect(scores(task, entry["name"], (entry,), PANOPTIC[task]), *groups)


@pytest.fixture
def coco(tmp_path):
    """The scene as Detectron2 registers COCO: thing and stuff classes have the same contiguous ids in "separated"."""
    ids = (1, 2, 11, 12)
    _instances(tmp_path, instances_json(ids=ids))
    write_panoptic(tmp_path, ids)
    write_labels(tmp_path / "labels", [0, 0, 1, 2])
    name = unique_name("coco")
    things = {1: 0, 2: 1}
    standard = {
        "thing_classes": list(CLASSES),
        "stuff_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": {11: 2, 12: 3},
    }
    separated = {
        "thing_classes": list(CLASSES[:NUM_THINGS]),
        "stuff_classes": ["things", *CLASSES[NUM_THINGS:]],
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": {0: 0, 11: 1, 12: 2},
    }
    images, panoptic, panoptic_json, labels, instances = (
        str(tmp_path / x) for x in ("images", "panoptic", "panoptic.json", "labels", "instances.json")
    )
    register_coco_panoptic(name, standard, images, panoptic, panoptic_json, instances)
    register_coco_panoptic_separated(name, separated, images, panoptic, panoptic_json, labels, instances)
    return name


def test_coco_as_detectron2_registers_it(coco):
    assert_perfect(scores("panoptic", coco, outputs=PANOPTIC["panoptic"]), "panoptic_seg", "bbox", "segm")
    assert_perfect(scores("instance", coco), "bbox", "segm")


def test_separated_coco(coco):
    outputs = ["panoptic_seg", "instances", "sem_seg"]
    found = scores("panoptic", coco + "_separated", outputs=outputs)
    assert_perfect(found, "panoptic_seg", "bbox", "segm", "sem_seg")
    assert_perfect(scores("semantic", coco + "_stuffonly"), "sem_seg")


# ---- label maps: values of the classes, options of the entry

LABELS = {
    "plain": ([0, 1, 2, 3], {}),
    "values from 1": ([1, 2, 3, 4], {"label_values": 1, "ignore": [0]}),
    "255 is a class": ([0, 7, 255, 100], {"label_values": [0, 7, 255, 100], "ignore": [3]}),
    "16 bits": ([7, 300, 40000, 1], {"label_values": [7, 300, 40000, 1], "ignore": [65535]}),
}


@pytest.mark.parametrize("kind", LABELS)
def test_label_maps(tmp_path, kind):
    values, options = LABELS[kind]
    write_images(tmp_path / "images")
    void = options.get("ignore", [255])[0]
    write_labels(tmp_path / "labels", values, void, np.uint8 if max(*values, void) < 256 else np.uint16)
    folders = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    entry = {"name": unique_name("oracle"), "type": "sem_seg", "classes": list(CLASSES), **folders, **options}
    assert_perfect(scores("semantic", entry["name"], (entry,)), "sem_seg")


def test_label_maps_as_detectron2_registers_ade20k(tmp_path):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [0, 1, 2, 3])
    name, folders = unique_name("ade20k"), (str(tmp_path / "labels"), str(tmp_path / "images"))
    DatasetCatalog.register(name, lambda: load_sem_seg(*folders))
    metadata = {"stuff_classes": list(CLASSES), "evaluator_type": "sem_seg", "ignore_label": 255}
    MetadataCatalog.get(name).set(**metadata, sem_seg_root=folders[0], image_root=folders[1])
    assert_perfect(scores("semantic", name), "sem_seg")


def test_pascal_voc_by_the_recipe_in_the_docs(tmp_path, monkeypatch):
    """VOCdevkit has images without a label map, and palette images whose colours are not the classes."""
    text = (Path(__file__).parents[1] / "docs" / "DATASETS.md").read_text()
    recipe = text[text.index("### Pascal VOC") :]
    commands, config = (re.search(f"```{kind}\n(.*?)```", recipe, re.DOTALL).group(1) for kind in ("bash", "yaml"))
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    labels = np.array([[0, 255, 7], [20, 7, 0]], np.uint8).repeat(32, 0).repeat(32, 1)
    for name in ("2007_000001", "2007_000002", "without_labels"):
        Image.new("RGB", labels.shape[::-1], "gray").save(root / "JPEGImages" / f"{name}.jpg")
    for split, name in (("train", "2007_000001"), ("val", "2007_000002")):
        image = Image.fromarray(labels, "P")
        image.putpalette([x for i in range(256) for x in (i * 67 % 256, i * 29 % 256, 9)])
        image.save(root / "SegmentationClass" / f"{name}.png")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(name + "\n")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-ec", commands], check=True)
    entries = yaml.safe_load(config)["DATASETS"]["CUSTOM"]
    cfg = data_cfg("semantic", *(x["name"] for x in entries), custom=entries)
    assert cfg.MODEL.KNET.NUM_STUFF_CLASSES == 21
    for entry, number in zip(entries, (1, 2), strict=True):
        (record,) = load_dataset(entry["name"])
        assert record["file_name"].endswith(f"2007_{number:06d}.jpg")
    seen = build_loss_mapper(cfg)(record)["sem_seg"]
    assert set(seen.unique().tolist()) == {0, 7, 20, 255} and entries[0]["classes"][20] == "tv monitor"
    assert_perfect(scores("semantic", "voc_val", entries), "sem_seg")


# ---- Cityscapes and LVIS, in the layout that Detectron2 expects


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr("knet_d2.evaluation.build._searched", set())
    with registered_below(tmp_path):
        yield tmp_path


def test_cityscapes_panoptic(tree):
    write_cityscapes(tree, "val")
    assert_perfect(scores("panoptic", "cityscapes_fine_panoptic_val"), "panoptic_seg")


# task, name, what a warning says of the classes that no object or pixel belongs to
CITYSCAPES = [
    (
        "instance",
        "cityscapes_fine_instance_seg_val",
        "No instance of data set cityscapes_fine_instance_seg_val is of the classes rider, truck, bus, train, "
        "motorcycle, bicycle.",
    ),
    (
        "semantic",
        "cityscapes_fine_sem_seg_val",
        "No pixel of data set cityscapes_fine_sem_seg_val is of the classes sidewalk, building, wall, fence, pole, "
        "traffic light, traffic sign, vegetation, terrain, rider and 5 more.",
    ),
]


def absent_classes(caplog):
    return [x for x in caplog.messages if "is of the classes" in x]


@pytest.mark.parametrize("task, name, absent", CITYSCAPES)
def test_cityscapes_instances_and_label_maps(tree, task, name, absent, caplog):
    pytest.importorskip("cityscapesscripts")
    write_cityscapes(tree, "val")
    assert_perfect(scores(task, name), "segm" if task == "instance" else "sem_seg")
    build_evaluators(data_cfg(task, name), name)  # in the next evaluation of a training run
    assert absent_classes(caplog) == [absent]


def test_lvis(tree, caplog):
    pytest.importorskip("lvis")
    write_lvis(tree, "val")
    assert_perfect(scores("instance", "lvis_v1_val"), "bbox", "segm")
    (absent,) = absent_classes(caplog)  # "almond" and the last class have instances
    names = "aerosol_can, air_conditioner, airplane, alarm_clock, alcohol, alligator, ambulance, amplifier"
    assert absent.startswith(f"No instance of data set lvis_v1_val is of the classes {names}, ")
    assert absent.endswith(" and 1191 more.")


def test_missing_packages_are_named(tree, monkeypatch):
    write_lvis(tree, "val")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for task, name, package in (
        *((*x[:2], "cityscapesscripts") for x in CITYSCAPES),
        ("instance", "lvis_v1_val", "lvis"),
    ):
        with pytest.raises(ConfigError, match=f"{name} is evaluated by .* pip install {package}"):
            build_evaluators(data_cfg(task, name), name)


# ---- the configs for them, on the same tiny trees

CONFIGS = {
    "cityscapes/panoptic.yaml": (write_cityscapes, None, (8, 11), "panoptic_seg/PQ"),
    "cityscapes/instance.yaml": (write_cityscapes, "cityscapesscripts", (8, 0), "segm/AP"),
    "cityscapes/semantic.yaml": (write_cityscapes, "cityscapesscripts", (0, 19), "sem_seg/mIoU"),
    "lvis/instance.yaml": (write_lvis, "lvis", (1203, 0), "segm/AP"),
}
TINY = {
    **{key: value for key, value in SMALL.items() if not key.startswith("DATASETS.")},
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.CROP.SIZE": (64, 96),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.STEPS": (),
    "SOLVER.MAX_ITER": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.EVAL_PERIOD": 1,
}


@pytest.mark.parametrize("path", CONFIGS)
def test_one_training_step_and_one_evaluation(tree, path):
    write, package, classes, metric = CONFIGS[path]
    if package:
        pytest.importorskip(package)
    for split in ("train", "val"):
        write(tree, split)
    options = {**TINY, "OUTPUT_DIR": str(tree / "output")}
    cfg = load_config(get_config_file(path), [item for pair in options.items() for item in pair])
    assert (cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.NUM_STUFF_CLASSES) == classes
    (tree / "output").mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with contextlib.redirect_stdout(io.StringIO()):
        results = trainer.train()
    group, key = metric.split("/")
    assert key in results[group]
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])
