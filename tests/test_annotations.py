"""Predictions as annotation files of label tools: read again, they are the same masks; sorted by doubt."""

import csv
import json
import os
from xml.etree import ElementTree

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data_helpers import data_cfg, unique_name
from detectron2.data import MetadataCatalog
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image
from pycocotools.coco import COCO

import knet_command
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import load_dataset
from knet_d2.data.classes import ClassTable
from knet_d2.data.discovery import find_annotations
from knet_d2.errors import ConfigError
from knet_d2.programs import annotate
from knet_d2.results.annotations import WRITERS, Annotated, write_annotations
from knet_d2.results.prediction import Prediction
from knet_d2.results.segment import Segment

SIZE = (48, 64)
CLASSES = ClassTable(["cup", "fork"], [0, 1], [(200, 0, 0), (0, 0, 200)], 2, [7, 3])


def shapes():
    """Masks of one, two and four parts, and one with a hole and a part beside it."""
    masks = np.zeros((4, *SIZE), bool)
    masks[0, 3:20, 5:30] = True
    masks[1, 22:30, 2:10] = masks[1, 22:30, 14:24] = True
    for x, y in ((40, 3), (52, 3), (40, 12), (52, 12)):
        masks[2, y : y + 6, x : x + 8] = True
    masks[3, 32:46, 30:50] = True
    masks[3, 36:42, 36:44] = False
    masks[3, 32:40, 55:60] = True
    return masks


def predictions(tmp_path):
    """Two images: all shapes, and a single one whose score is the more doubtful."""
    folder = tmp_path / "photos"
    folder.mkdir()
    found = []
    for name, masks, scores in (("b", shapes(), (0.9, 0.8, 0.95, 0.99)), ("c", shapes()[:1], (0.55,)), ("a", [], ())):
        Image.new("RGB", SIZE[::-1]).save(folder / f"{name}.png")
        segments = [Segment.from_mask(m, i % 2, score) for i, (m, score) in enumerate(zip(masks, scores))]
        found.append((str(folder / f"{name}.png"), Prediction(SIZE, segments, CLASSES)))
    return found


def read_again(folder, task="instance"):
    """The records of the whole folder by file name, and their classes; as knet train --data finds them."""
    (entry,) = find_annotations(folder, task).entries
    del entry["validation"]
    cfg = data_cfg(task, custom=({**entry, "name": unique_name("corrected")},))
    (name,) = cfg.DATASETS.TRAIN
    records = {os.path.relpath(x["file_name"], os.path.join(folder, "images")): x for x in load_dataset(name)}
    return records, MetadataCatalog.get(name)


def decoded(segmentation):
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *SIZE))
    return mask_util.decode(segmentation).astype(bool)


@pytest.mark.parametrize("kind", ["labelme", "yolo", "coco"])
def test_files_read_again_are_the_same_masks(tmp_path, kind):
    images = predictions(tmp_path)
    folder = str(tmp_path / "out")
    assert write_annotations(kind, images, folder, CLASSES, tolerance=0) == 3
    records, metadata = read_again(folder)
    assert sorted(metadata.thing_classes) == ["cup", "fork"]
    assert {name: len(x["annotations"]) for name, x in records.items()} == {"a.png": 0, "b.png": 4, "c.png": 1}
    for annotation, mask, label in zip(records["b.png"]["annotations"], shapes(), (0, 1, 0, 1), strict=True):
        assert np.array_equal(decoded(annotation["segmentation"]), mask)
        # COCO's file has the ids of the data set, 7 for cup and 3 for fork, of which fork is then the first class
        assert annotation["category_id"] == (1 - label if kind == "coco" else label)


def test_via(tmp_path):
    """It has neither holes nor groups of parts."""
    folder = str(tmp_path / "out")
    write_annotations("via", predictions(tmp_path), folder, CLASSES, tolerance=0)
    records, _ = read_again(folder)
    assert {name: len(x["annotations"]) for name, x in records.items()} == {
        "a.png": 0,
        "b.png": 1 + 2 + 4 + 2,
        "c.png": 1,
    }
    expected = shapes()
    expected[3, 36:42, 36:44] = True
    for label in (0, 1):
        found = [decoded(x["segmentation"]) for x in records["b.png"]["annotations"] if x["category_id"] == label]
        assert np.array_equal(np.any(found, axis=0), np.any(expected[label::2], axis=0))


def test_cvat(tmp_path):
    folder = str(tmp_path / "out")
    write_annotations("cvat", predictions(tmp_path), folder, CLASSES, tolerance=0)
    root = ElementTree.parse(os.path.join(folder, "annotations.xml")).getroot()
    assert root.findtext("version") == "1.1"
    assert [x.get("name") for x in root.iter("image")] == ["a.png", "c.png", "b.png"]  # by falling doubt
    image = root.findall("image")[2]
    assert (image.get("width"), image.get("height")) == ("64", "48")
    polygons: dict = {}
    for polygon in image.findall("polygon"):
        points = [[float(v) for p in polygon.get("points").split(";") for v in p.split(",")]]
        key = (polygon.get("group_id"), polygon.get("label"))
        polygons[key] = polygons.get(key, False) | decoded(points)
    assert list(polygons) == [(None, "cup"), ("2", "fork"), ("3", "cup")]
    for found, mask in zip(polygons.values(), shapes()):
        assert np.array_equal(found, mask)
    (mask,) = image.findall("mask")
    left, top, width, height = (int(mask.get(key)) for key in ("left", "top", "width", "height"))
    runs = [int(x) for x in mask.get("rle").split(",")]
    crop = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width).astype(bool)
    whole = np.zeros(SIZE, bool)
    whole[top : top + height, left : left + width] = crop
    assert np.array_equal(whole, shapes()[3])


def test_polygons_have_few_points(tmp_path):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    circle = (rows - 24) ** 2 + (columns - 32) ** 2 < 20**2
    (tmp_path / "x.png").touch()
    image = (str(tmp_path / "x.png"), Prediction(SIZE, [Segment.from_mask(circle, 0, 0.5)], CLASSES))
    numbers = {}
    for tolerance in (0, 1, 3):
        folder = str(tmp_path / str(tolerance))
        write_annotations("coco", [image], folder, CLASSES, tolerance)
        (annotation,) = COCO(os.path.join(folder, "annotations.json")).anns.values()
        mask = decoded(annotation["segmentation"])
        numbers[tolerance] = len(annotation["segmentation"][0]) // 2
        iou = (mask & circle).sum() / (mask | circle).sum()
        assert iou == 1 if tolerance == 0 else iou > 1 - 0.06 * tolerance
    assert numbers[0] > 2 * numbers[1] > 2 * numbers[3] >= 8


def test_order_is_by_doubt(tmp_path):
    images = predictions(tmp_path)
    write_annotations("coco", images, str(tmp_path / "out"), CLASSES)
    with open(tmp_path / "out" / "order.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(os.path.basename(x["file_name"]), x["doubt"], x["segments"]) for x in rows] == [
        ("a.png", "1.000", "0"),  # something may be missed
        ("c.png", "0.900", "1"),
        ("b.png", "0.400", "4"),
    ]
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [x["file_name"] for x in content["images"]] == ["a.png", "c.png", "b.png"]
    assert [x["score"] for x in content["annotations"]] == [0.55, 0.9, 0.8, 0.95, 0.99]
    semantic = Prediction(SIZE, [Segment.from_mask(shapes()[0], 0, None)], CLASSES)
    assert Annotated("x", "x", semantic).doubt == 0
    assert Annotated("x", "x", semantic._replace(segments=[])).doubt == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_are_no_utf_8(tmp_path, kind):
    name = os.fsdecode(b"photo \xff.png")
    (tmp_path / name).touch()
    prediction = Prediction(SIZE, [Segment.from_mask(shapes()[0], 0, 0.5)], CLASSES)
    assert write_annotations(kind, [(str(tmp_path / name), prediction)], str(tmp_path / "out"), CLASSES) == 1
    assert b"photo \xff.png,1.000,1" in (tmp_path / "out" / "order.csv").read_bytes()


def test_nothing_that_was_corrected_is_replaced(tmp_path):
    images = predictions(tmp_path)
    write_annotations("yolo", images, str(tmp_path / "out"), CLASSES)
    arguments = ["no_model.pth", "x.jpg", "--format", "yolo", "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="has files already"):  # before a model is loaded
        annotate.main(annotate.get_parser().parse_args(arguments))
    with pytest.raises(ConfigError, match="has files already, which people may have corrected"):
        write_annotations("yolo", images, str(tmp_path / "out"), CLASSES)
    with pytest.raises(ConfigError, match="--format x: use one of labelme, cvat, yolo, coco, via, png"):
        write_annotations("x", images, str(tmp_path / "new"), CLASSES)
    same = [(str(tmp_path / "photos" / "b.jpg"), images[0][1]), *images]
    with pytest.raises(ConfigError, match="has the same name as .*Rename one of them"):
        write_annotations("labelme", same, str(tmp_path / "same"), CLASSES)


@pytest.mark.parametrize("kind", ["labelme", "yolo", "coco", "via", "png"])
def test_images_of_several_folders(tmp_path, kind):
    """They keep their folders, so that equal names do not meet."""
    images = predictions(tmp_path)
    (tmp_path / "photos" / "more").mkdir()
    (tmp_path / "photos" / "b.png").rename(tmp_path / "photos" / "more" / "c.png")
    moved = [(str(tmp_path / "photos" / "more" / "c.png"), images[0][1]), images[1]]
    folder = str(tmp_path / "out")
    classes = CLASSES._replace(dataset_ids=[0, 1])
    write_annotations(kind, moved, folder, classes)
    records, metadata = read_again(folder, "semantic" if kind == "png" else "instance")
    assert sorted(metadata.stuff_classes if kind == "png" else metadata.thing_classes) == ["cup", "fork"]
    assert sorted(records) == ["c.png", "more/c.png"]
    if kind != "png":
        assert len(records["more/c.png"]["annotations"]) >= 4 > len(records["c.png"]["annotations"]) == 1
    (tmp_path / "photos").rename(tmp_path / "gone")  # the folder is complete without them
    assert all(os.path.isfile(x["file_name"]) for x in records.values())


@pytest.mark.parametrize(
    "name, ids, empty", [("background", [0, 255], 0), ("rest", [0, 255], 65535), ("rest", [], 255)]
)
def test_label_maps_have_the_values_of_the_data_set(tmp_path, name, ids, empty):
    (path, found), *_ = predictions(tmp_path)
    classes = ClassTable([name, "cell"], [0, 1], [(200, 0, 0), (0, 0, 200)], 0, ids)
    cell = shapes()[0]
    around = ~cell
    around[:, -4:] = False  # no segment
    segments = [Segment.from_mask(around, 0), Segment.from_mask(cell, 1)]
    folder = str(tmp_path / "out")
    assert write_annotations("png", [(path, Prediction(SIZE, segments, classes))], folder, classes) == 1
    expected = np.where(cell, ids[1] if ids else 1, 0)
    expected[:, -4:] = empty
    (file,) = (tmp_path / "out" / "masks").iterdir()
    assert file.name == "b.png" and (np.asarray(Image.open(file)) == expected).all()


@pytest.mark.parametrize("kind", ["labelme", "yolo", "coco", "cvat"])
def test_the_background_of_masks_is_no_annotation(tmp_path, kind):
    (path, found), *_ = predictions(tmp_path)
    classes = CLASSES._replace(names=["background", "cell"], num_things=0)
    segments = [Segment.from_mask(~shapes()[1], 0), Segment.from_mask(shapes()[1], 1)]
    alone = [Segment.from_mask(np.ones(SIZE, bool), 0)]
    images = [(path, Prediction(SIZE, segments, classes)), (path[:-5] + "c.png", Prediction(SIZE, alone, classes))]
    write_annotations(kind, images, str(tmp_path / "out"), classes)
    with open(tmp_path / "out" / "order.csv") as f:
        assert [(os.path.basename(x["file_name"]), x["segments"]) for x in csv.DictReader(f)] == [
            ("c.png", "0"),
            ("b.png", "1"),
        ]


@pytest.mark.parametrize("kind", WRITERS)
def test_program(tmp_path, kind, capsys):
    options = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "MODEL.KNET.NUM_STAGES": 1}
    ids = {"MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2], "MODEL.KNET.STUFF_CATEGORY_IDS": []}
    model = spread_scores(tiny_model("instance", {**options, **ids}).eval())
    description = describe_model(tiny_config("instance", {**options, **ids}))
    (tmp_path / "run").mkdir()
    save_weights(str(tmp_path / "run" / "model_final.pth"), model.state_dict(), description)
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "x.png")
    output = str(tmp_path / "out")
    words = [str(tmp_path / "run"), str(tmp_path / "photos"), "--format", kind, "--output", output]
    assert knet_command.main(["annotate", *words, "--confidence-threshold", "0", "--opts", "MODEL.DEVICE", "cpu"]) == 0
    assert "annotations of 1 images" in capsys.readouterr().out
    with open(os.path.join(output, "order.csv")) as f:
        assert int(next(csv.DictReader(f))["segments"]) > 0
