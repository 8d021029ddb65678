"""A trainer that is built from a config in Python, without the program and load_config."""

import pytest
from data_helpers import custom_entry, unique_name
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from helpers import RESNET, SMALL, TASKS, set_options

import knet_d2
from knet_d2.config import add_knet_config
from knet_d2.data.shapes import THING_CLASSES, write_shapes
from knet_d2.engine import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=4, seed=5, size=64)
    return folder


def in_the_config(cfg, entry):
    cfg.DATASETS.CUSTOM = [entry]


def by_detectron2(cfg, entry):
    """Its classes are known only after the JSON was read."""
    register_coco_instances(entry["name"], {}, entry["json"], entry["images"])


def with_numbers(cfg, entry):
    by_detectron2(cfg, entry)
    cfg.MODEL.KNET.NUM_THING_CLASSES = 4
    cfg.MODEL.KNET.THING_CATEGORY_IDS = [0, 1, 2, 3]


def as_records(cfg, entry):
    entry["name"] = unique_name("records")
    DatasetCatalog.register(entry["name"], lambda: load_coco_json(entry["json"], entry["images"], entry["name"]))
    MetadataCatalog.get(entry["name"]).thing_classes = list(THING_CLASSES)


@pytest.mark.parametrize("register", [in_the_config, by_detectron2, with_numbers, as_records])
def test_its_checkpoint_is_complete(root, tmp_path, register):
    cfg = get_cfg()
    add_knet_config(cfg)
    set_options(cfg, {**SMALL, **RESNET, **TASKS["instance"], "MODEL.KNET.TASK": "instance"})
    entry = custom_entry("coco_instance", root)
    register(cfg, entry)
    cfg.DATASETS.TRAIN = (entry["name"],)
    cfg.OUTPUT_DIR = str(tmp_path / "new")
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 1, ()
    Trainer(cfg).train()
    assert knet_d2.load(str(tmp_path / "new" / "model_final.pth")).classes.names == list(THING_CLASSES)
