"""What knet_d2.data.check finds in damaged data sets, and that it finds nothing in whole ones."""

import json
import os
import shutil

import numpy as np
import pytest
from data_helpers import custom_entry, data_cfg
from dataset_damages import DAMAGES, ERROR, IMAGE, SIZE, make_damage
from PIL import Image

from knet_d2.data.check import check_datasets
from knet_d2.data.shapes import write_shapes

TASKS = {"coco_instance": "instance", "coco_panoptic": "panoptic", "sem_seg": "semantic"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=6, seed=33, size=SIZE)
    return folder


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, str(tmp_path / "copy"))


def check(*entries, test=(), task=None, **options):
    cfg = data_cfg(task or TASKS[entries[0]["type"]], custom=(*entries, *test), resolve=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (tuple(x["name"] for x in part) for part in (entries, test))
    return check_datasets(cfg, **options)


def test_there_are_enough_damages():
    assert len(DAMAGES) >= 30


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(root, name):
    damage = DAMAGES[name]
    place = make_damage(root, damage)
    report = check(custom_entry(damage.data, root))
    kind, file = name.split(":")[0], os.path.join(root, damage.named or damage.file)
    found = [fault for fault in report.faults if fault.kind == kind]
    assert any(fault.file == file and place in fault.where for fault in found), report.text()
    assert {fault.level for fault in found} == {damage.level}
    assert report.failed == (damage.level == ERROR), report.text()
