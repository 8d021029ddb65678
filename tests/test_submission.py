"""Files for test sets without ground truth, written by evaluating on a JSON that lists images and categories only."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from helpers import spread_scores, tiny_config
from PIL import Image

from knet_d2.data import register_custom_datasets, resolve_classes
from knet_d2.engine import Trainer

CATEGORIES = [
    {"id": 3, "name": "cup", "isthing": 1},
    {"id": 7, "name": "spoon", "isthing": 1},
    {"id": 9, "name": "wall", "isthing": 0},
]
SIZES = {21: (40, 32), 58: (32, 48)}


@pytest.fixture
def image_info(tmp_path):
    """Path of the JSON; the images lie beside it in "test" and have no annotations."""
    (tmp_path / "test").mkdir()
    images = []
    for image_id, (height, width) in SIZES.items():
        pixels = np.random.RandomState(image_id).randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "test" / f"{image_id:012d}.png")
        images.append({"id": image_id, "file_name": f"{image_id:012d}.png", "height": height, "width": width})
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({"images": images, "categories": CATEGORIES}))
    return path


def predict(tmp_path, task, entry, num_stuff):
    cfg = tiny_config(task, {"MODEL.KNET.NUM_THING_CLASSES": 2, "MODEL.KNET.NUM_STUFF_CLASSES": num_stuff})
    cfg.DATASETS.CUSTOM = [{"name": f"test_dev_{task}", "images": str(tmp_path / "test"), **entry}]
    cfg.DATASETS.TEST = (f"test_dev_{task}",)
    cfg.INPUT.MIN_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 32, 0, str(tmp_path / "output")
    register_custom_datasets(cfg)
    resolve_classes(cfg)
    torch.manual_seed(0)
    results = Trainer.test(cfg, spread_scores(Trainer.build_model(cfg)))
    assert not any(results.values())
    return tmp_path / "output" / "inference" / f"test_dev_{task}"


def test_instance(tmp_path, image_info):
    content = json.loads(image_info.read_text())
    content["categories"] = content["categories"][:2]
    image_info.write_text(json.dumps(content))
    folder = predict(tmp_path, "instance", {"type": "coco_instance", "json": str(image_info)}, num_stuff=0)
    results = json.loads((folder / "coco_instances_results.json").read_text())
    assert {x["image_id"] for x in results} == set(SIZES) and {x["category_id"] for x in results} == {3, 7}
    for result in results:
        assert mask_util.decode(result["segmentation"]).shape == SIZES[result["image_id"]]


def test_panoptic(tmp_path, image_info):
    entry = {"type": "coco_panoptic", "panoptic_json": str(image_info), "panoptic_root": str(tmp_path / "none")}
    folder = predict(tmp_path, "panoptic", entry, num_stuff=1)
    annotations = json.loads((folder / "predictions.json").read_text())["annotations"]
    assert {x["image_id"] for x in annotations} == set(SIZES)
    for annotation in annotations:
        assert annotation["file_name"] == f"{annotation['image_id']:012d}.png"
        pixels = np.asarray(Image.open(folder / "predictions" / annotation["file_name"])).astype(np.int64)
        assert pixels.shape == (*SIZES[annotation["image_id"]], 3)
        assert set(np.unique(pixels @ [1, 256, 65536])) - {0} == {x["id"] for x in annotation["segments_info"]}
        assert {x["category_id"] for x in annotation["segments_info"]} <= {3, 7, 9}
    assert sum(len(x["segments_info"]) for x in annotations) > 0
