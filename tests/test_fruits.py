"""The photos of the demo: instances as a panoptic data set, and the model that comes with the package."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knet_d2.config.merging import load_config
from knet_d2.data import build_mapper, load_dataset
from knet_d2.data.custom import register_custom_datasets
from knet_d2.data.panoptic_writer import write_panoptic
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import build_evaluators
from knet_d2.evaluation.semantic import SegmentClassEvaluator
from knet_d2.programs import convert_dataset

ROOT = Path(__file__).resolve().parent.parent
FRUITS = ROOT / "demo" / "fruits_nuts"


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def content():
    """A 10 x 12 image: a cup behind a spoon, a crowd of spoons, a cup that a spoon hides; and an empty image."""
    masks = [(3, box(1, 1, 6, 6), 0), (5, box(4, 4, 3, 2), 0), (5, box(9, 0, 3, 10), 1), (3, box(4, 4, 2, 1), 0)]
    masks.append((5, box(4, 4, 2, 1), 0))
    annotations = [
        {"id": i, "image_id": 7, "category_id": k, "segmentation": x, "iscrowd": c} for i, (k, x, c) in enumerate(masks)
    ]
    images = [{"id": 7, "file_name": "a/b.jpg", "height": 10, "width": 12}]
    images.append({"id": 8, "file_name": "c.png", "height": 2, "width": 3})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cup"}, {"id": 5, "name": "spoon"}],
    }


def test_instances_become_segments_and_all_else_one_of_stuff(tmp_path):
    write_panoptic(content(), str(tmp_path / "p.json"), str(tmp_path / "png"), "table")
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["categories"][-1] == {"id": 6, "name": "table", "isthing": 0}
    first, second = written["annotations"]
    ids = np.asarray(Image.open(tmp_path / "png" / "a" / "b.png")).astype(int) @ [1, 256, 65536]
    classes = {x["id"]: (x["category_id"], x["iscrowd"]) for x in first["segments_info"]}
    expected = np.zeros((10, 12), int) + 60  # 10 times the class, and 1 for crowds
    expected[1:7, 1:7] = 30
    expected[4:6, 4:7] = 50
    expected[:, 9:] = 51
    assert np.array_equal([[10 * classes[i][0] + classes[i][1] for i in row] for row in ids], expected)
    areas = {x["id"]: (x["area"], x["bbox"]) for x in first["segments_info"]}
    assert sorted(areas.values()) == [(2, [4, 4, 2, 1]), (4, [4, 4, 3, 2]), (30, [1, 1, 6, 6]), (30, [9, 0, 3, 10]),
                                      (54, [0, 0, 9, 10])]  # fmt: skip
    assert second["segments_info"] == [{"id": 1, "category_id": 6, "iscrowd": 0, "area": 6, "bbox": [0, 0, 3, 2]}]


def test_names_that_clash_are_refused(tmp_path):
    paths = str(tmp_path / "p.json"), str(tmp_path / "png")
    with pytest.raises(ConfigError, match="--rest cup"):
        write_panoptic(content(), *paths, "cup")
    twice = content()
    twice["images"][1]["file_name"] = "a/b.png"
    with pytest.raises(DataError, match=r"a/b\.png.*without ending"):
        write_panoptic(twice, *paths, "table")


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    for name in ("../b.png", "a/../../b.png", str(tmp_path / "b.png")):
        wrong = content()
        wrong["images"][1]["file_name"] = name
        with pytest.raises(DataError, match=f"{name}: its PNG would be outside of the folder"):
            write_panoptic(wrong, str(tmp_path / "p.json"), str(tmp_path / "png"), "table")
    assert list(tmp_path.iterdir()) == []


def test_the_converter_replaces_nothing_that_it_reads(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "c.png")
    (tmp_path / "c.json").write_text(json.dumps({**content(), "images": content()["images"][1:], "annotations": []}))
    before = {x: x.read_bytes() for x in tmp_path.iterdir()}
    keys = [f"json={tmp_path}/c.json", f"images={tmp_path}"]
    for (output, *options), replaced in (
        ([f"{tmp_path}/c.json"], "c.json"),
        (["p.json", "--panoptic", str(tmp_path)], "c.png"),
    ):
        args = convert_dataset.get_parser().parse_args(["coco_instance", output, *keys, *options])
        with pytest.raises(ConfigError, match=f"this would replace {tmp_path}/{replaced}, which is read"):
            convert_dataset.main(args)
    assert {x: x.read_bytes() for x in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fold", range(3))
def test_the_committed_maps_are_the_converter_s(fold, tmp_path, capsys):
    command = f"coco_instance {tmp_path}/p.json json={FRUITS}/fold{fold}.json images={FRUITS}/images"
    arguments = [*command.split(), "--panoptic", str(tmp_path / "png")]
    convert_dataset.main(convert_dataset.get_parser().parse_args(arguments))
    assert "6 images" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())
    assert written == json.loads((FRUITS / f"panoptic{fold}.json").read_text())
    for x in written["annotations"]:
        with Image.open(tmp_path / "png" / x["file_name"]) as a, Image.open(FRUITS / "panoptic" / x["file_name"]) as b:
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_objects_of_one_class(tmp_path):
    command = f"coco_instance {tmp_path}/one.json json={FRUITS}/fold0.json images={FRUITS}/images --one-class object"
    convert_dataset.main(convert_dataset.get_parser().parse_args(command.split()))
    written, source = json.loads((tmp_path / "one.json").read_text()), json.loads((FRUITS / "fold0.json").read_text())
    assert [x["name"] for x in written["categories"]] == ["object"]
    assert (
        {x["category_id"] for x in written["annotations"]} == {1} != {x["category_id"] for x in source["annotations"]}
    )
    outlines = [[x["segmentation"] for x in y["annotations"]] for y in (written, source)]
    assert outlines[0] == outlines[1]


def records(task, monkeypatch, options=()):
    """The config of a task on the fruits, and the records of its training set, with names of their own."""
    monkeypatch.chdir(ROOT)
    cfg = load_config(f"configs/fruits/{task}_lite0.yaml", ["MODEL.WEIGHTS", "", *options])
    register_custom_datasets(cfg)
    return cfg, [x for name in cfg.DATASETS.TRAIN for x in load_dataset(name)]


def test_panoptic_and_semantic_photos_have_fruits_and_the_rest(monkeypatch):
    plain = [
        "INPUT.CROP.ENABLED",
        "False",
        "INPUT.AUGMENTATIONS",
        "[{'name': 'Default'}]",
        "INPUT.COLOR_AUG_SSD",
        "False",
    ]
    plain += ["INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "(480, 480)", "INPUT.MAX_SIZE_TRAIN", "640"]
    cfg, found = records("panoptic", monkeypatch, plain)
    assert (cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.NUM_STUFF_CLASSES, len(found)) == (3, 1, 12)
    example = build_mapper(cfg, True)(found[0])
    objects = example["instances"].gt_masks.tensor
    assert len(objects) == sum(x["isthing"] for x in found[0]["segments_info"]) > 3
    assert torch.equal(example["sem_seg"] == 3, ~objects.any(0)) and objects.any(0).float().mean() > 0.05
    semantic, same = records("semantic", monkeypatch, plain)
    assert semantic.MODEL.KNET.NUM_STUFF_CLASSES == 4
    assert [type(x) for x in build_evaluators(semantic, semantic.DATASETS.TEST[0])] == [SegmentClassEvaluator]
    labels = build_mapper(semantic, True)(same[0])["sem_seg"][: objects.shape[1], : objects.shape[2]]
    for mask, label in zip(objects, example["instances"].gt_classes, strict=True):
        assert (labels[mask] == label).all()
    assert torch.equal(labels == 3, ~objects.any(0))
