"""Classes of a weights file: their ids."""

import json

import numpy as np
from data_helpers import custom_entry, data_cfg
from detectron2.data import MetadataCatalog
from helpers import tiny_config, tiny_model

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data.classes import ClassTable
from knet_d2.data.shapes import write_shapes
from knet_d2.inference.resolve import resolve_model
from knet_d2.results.prediction import Prediction, Segment
from knet_d2.results.writers import coco_file
from knet_d2.tasks import TASKS


def table(things, stuff, ids=None):
    names = [*things, *stuff]
    return ClassTable(names, list(range(len(names))), [(0, 0, 0)] * len(names), len(things), ids or ())


# Ids


def test_to_coco_has_the_ids_of_the_data_sets_files(tmp_path):
    classes = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val"), TASKS["instance"])
    label = classes.names.index("toothbrush")
    assert (classes.category_ids[label], classes.dataset_ids[label]) == (79, 90)
    segment = Segment.from_mask(np.ones((4, 5), bool), label, 0.5)
    prediction = Prediction((4, 5), [segment], classes)
    assert prediction.to_coco()[0]["category_id"] == 90
    content = coco_file(prediction, "a.jpg")
    assert {x["id"]: x["name"] for x in content["categories"]}[90] == "toothbrush"
    assert content["annotations"][0]["category_id"] == 90
    for task, name, ids in (
        ("panoptic", "coco_2017_val_panoptic_separated", (1, 92)),
        ("panoptic", "coco_2017_val_panoptic", (1, 92)),
    ):
        found = ClassTable.from_metadata(MetadataCatalog.get(name), TASKS[task])
        assert (found.dataset_ids[0], found.dataset_ids[80]) == ids, name


def test_a_weights_file_keeps_the_ids_of_the_data_sets_files(tmp_path):
    write_shapes(str(tmp_path / "data"), 3, seed=1, size=64)
    cfg = data_cfg("panoptic", custom=(custom_entry("coco_panoptic", str(tmp_path / "data")),))
    expected = [x["id"] for x in json.loads((tmp_path / "data" / "panoptic.json").read_text())["categories"]]
    described = json.loads(describe_model(cfg)["classes"])
    assert [x["dataset_id"] for x in described] == expected != [x["id"] for x in described]


def test_files_of_earlier_versions_have_no_ids_of_the_data_set(tmp_path):
    model = tiny_model("instance")
    metadata = describe_model(tiny_config("instance"), table(["a", "b", "c"], [], [7, 8, 9]))
    path = str(tmp_path / "m.pth")
    for known, expected in ((True, [7, 8, 9]), (False, [0, 1, 2])):
        if not known:
            records = [{k: v for k, v in x.items() if k != "dataset_id"} for x in json.loads(metadata["classes"])]
            metadata = {**metadata, "classes": json.dumps(records)}
        save_weights(path, model.state_dict(), metadata)
        assert list(knet_d2.load(path, device="cpu").classes.dataset_ids) == expected
    assert resolve_model(None, ["MODEL.WEIGHTS", path])[1].category_ids == [0, 1, 2]
