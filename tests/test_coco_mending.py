"""COCO files that are not as COCO's format asks, but have one meaning: training, evaluation and the check read it."""

import argparse
import contextlib
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import yaml
from data_helpers import data_cfg, unique_name
from dataset_trees import SIZE, compressed, instances_json, uncompressed, write_images, write_panoptic
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_oracle import assert_perfect, scores

from knet_d2.data import load_dataset
from knet_d2.data.check import check_datasets
from knet_d2.data.coco_mending import mend_coco
from knet_d2.data.segmentation import box_of, read_rle
from knet_d2.errors import DataError
from knet_d2.programs import check_dataset


def _each(kind, change):
    def edit(content):
        for i, item in enumerate(content[kind]):
            change(item, i)

    return edit


def _update(kind, **functions):
    """Each value of a key becomes what a function makes of it."""
    return _each(kind, lambda item, i: item.update({key: f(item[key]) for key, f in functions.items()}))


def _drop(kind, *keys):
    return _each(kind, lambda item, i: [item.pop(key) for key in keys])


def _set_in_turn(kind, key, *values):
    return _each(kind, lambda item, i: item.update({key: values[i % len(values)]}))


def _crowd_flags(content):
    """true for crowds; of the others the first has no flag, the second null, the rest false."""
    for i, annotation in enumerate(content["annotations"]):
        annotation["iscrowd"] = True if annotation["iscrowd"] else None if i == 1 else False
    del content["annotations"][0]["iscrowd"]


def _stray_click(content):
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = [[5.0, 5.0, 9.0, 9.0], *annotation["segmentation"], []]


def _two_entries(content):
    """The image 0 has a second entry, to which its first annotation belongs; another is in both."""
    content["images"].append({**content["images"][0], "id": 77})
    content["annotations"][0]["image_id"] = 77
    content["annotations"].append({**content["annotations"][1], "id": 900, "image_id": 77})


def _margin(box):
    x, y, width, height = box
    return [x - 5, y - 9, width + 10, height + 9]


def _corners(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _windows_path(name):
    return "..\\..\\upload\\" + name


# What is changed in the JSON of 2 images and 8 annotations -> (the change, what the warning says, number of places)
MEANT = {
    "iscrowd": (_crowd_flags, "iscrowd is missing, null, true or false", 8),
    "category ids as text": (_update("annotations", category_id=str), "category_id and the id that it names", 8),
    "image ids as text": (_update("images", id=str), "image_id and the id that it names", 8),
    "ids as text with zeros": (_update("annotations", image_id="{:04d}".format), "image_id and the id", 8),
    "category ids as floats": (_update("annotations", category_id=float), "a number with a decimal point", 8),
    "all ids as floats": (_update("images", id=float), "a number with a decimal point", 2),
    "sizes as text": (_update("images", height=str, width=str), "height or width is text", 4),
    "sizes as floats": (_update("images", height=float), "height or width is text or has a decimal point", 2),
    "no sizes": (_drop("images", "height", "width"), "height or width is missing; read from the image", 2),
    "sizes of null": (_set_in_turn("images", "height", None), "height or width is missing; read from the image", 2),
    "no area": (_drop("annotations", "area"), "area is missing; computed from the mask", 8),
    "no box": (_drop("annotations", "bbox"), "bbox is missing; computed from the mask", 8),
    "empty box": (_set_in_turn("annotations", "bbox", None, []), "bbox is missing; computed from the mask", 8),
    "boxes with margins": (_update("annotations", bbox=_margin), "bbox has a margin around the mask", 8),
    "boxes as corners": (_update("annotations", bbox=_corners), "bbox is two corners", 8),
    "Windows paths": (_update("images", file_name=_windows_path), "file_name is not a path below", 2),
    "absolute Windows paths": (
        _update("images", file_name="C:\\photos\\{}".format),
        "file_name is not a path below",
        2,
    ),
    "percent codes": (_update("images", file_name=lambda x: x.replace("0.", "%30.").replace("1.", "%31.")), "file_", 2),
    "folders of another computer": (_update("images", file_name="/home/me/photos/{}".format), "file_name is not", 2),
    "polygons of two points": (_stray_click, "a polygon has fewer than 3 points", 6),
    "an image twice": (lambda c: c["images"].append(dict(c["images"][1])), "an image is listed more than once", 1),
    "an image with two ids": (_two_entries, "an image is listed more than once", 1),
}


def _swapped_size(content):
    for annotation in content["annotations"]:
        annotation["segmentation"] = {**annotation["segmentation"], "size": list(SIZE[::-1])}


def _transposed(content):
    for annotation in content["annotations"]:
        rle = annotation["segmentation"]
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *rle["size"])
        rle = mask_util.encode(np.asfortranarray(mask_util.decode(rle).T))
        annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.mark.parametrize("form", [compressed, uncompressed])
@pytest.mark.parametrize(("change", "what"), [(_swapped_size, "its size is swapped"), (_transposed, "transposed")])
def test_run_lengths_whose_size_is_swapped(tmp_path, form, change, what):
    """The runs fit both sizes of an image that is not square. The boxes tell which mask is meant."""
    content = instances_json(form)
    change(content)
    assert content["annotations"][0]["segmentation"]["size"] == [128, 64]
    del content["annotations"][1]["bbox"]  # is read as the others are
    entry = _entry(tmp_path, content)
    faults = check_datasets(data_cfg("instance", custom=(entry,), resolve=False)).faults
    assert {x.kind for x in faults} == {"read as meant"} and what in faults[0].what and "(8 places" in faults[0].what
    masks, expected = (
        [mask_util.decode(read_rle(x["segmentation"])) for x in annotations]
        for annotations in ([y for x in _records(entry) for y in x["annotations"]], instances_json(form)["annotations"])
    )
    assert len(masks) == 8 and all(np.array_equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert_perfect(scores("instance", entry["name"], (entry,)), "bbox", "segm")


def test_run_lengths_whose_size_is_swapped_stay_an_error_without_boxes_that_tell():
    def mended(change):
        content = instances_json(uncompressed)
        _swapped_size(content)
        change(content["annotations"])
        return [x for x in mend_coco(content, None) if "swapped" in x.what]

    def moved(annotations):
        annotations[3]["bbox"][0] += 40

    def without_boxes(annotations):
        for annotation in annotations:
            del annotation["bbox"]

    def damaged(annotations):
        annotations[0]["segmentation"]["counts"].append(1)

    assert mended(lambda annotations: None)
    assert mended(moved) == mended(without_boxes) == mended(damaged) == []


def _text(content, encoding):
    return json.dumps(content, ensure_ascii=False).encode(encoding)


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def _entry(root, content=None, encoding="utf-8", **form):
    write_images(root / "images")
    content = content or instances_json(**form)
    (root / "instances.json").write_bytes(_text(content, encoding))
    return {
        **{"name": unique_name("meant"), "type": "coco_instance"},
        **{"json": str(root / "instances.json"), "images": str(root / "images")},
    }


def _records(entry):
    data_cfg("instance", custom=(entry,))
    return load_dataset(entry["name"])


def _by_image(records):
    """Records without what depends on the order and the ids of the file."""
    key = str
    return {
        os.path.basename(x["file_name"]): (x["height"], x["width"], sorted(x["annotations"], key=key)) for x in records
    }


def _expected(root):
    root.mkdir()
    return _by_image(_records(_entry(root)))


def _edited(change):
    content = instances_json()
    change(content)
    return content


@pytest.mark.parametrize("name", MEANT)
def test_training_reads_what_is_meant(tmp_path, name, caplog):
    change, what, places = MEANT[name]
    entry = _entry(tmp_path, _edited(change))
    with caplog.at_level(logging.WARNING, "knet_d2.data.coco_mending"):
        found = _by_image(_records(entry))
    assert found == _expected(tmp_path / "plain")
    (warning,) = (x.getMessage() for x in caplog.records if x.name.endswith("data.coco_mending"))
    assert entry["json"] in warning and what in warning
    assert f"({places} place{'s' if places > 1 else ''}, the first is " in warning


@pytest.mark.parametrize("name", MEANT)
def test_check_and_evaluation_read_the_same(tmp_path, name):
    change, what, places = MEANT[name]
    entry = _entry(tmp_path, _edited(change))
    (fault,) = check_datasets(data_cfg("instance", custom=(entry,), resolve=False)).faults
    assert (fault.kind, fault.level, fault.file) == ("read as meant", "warning", entry["json"])
    assert what in fault.what and f"({places} place" in fault.what
    assert_perfect(scores("instance", entry["name"], (entry,)), "bbox", "segm")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path, encoding):
    content = instances_json()
    content["categories"][0]["name"] = "Käfer"
    entry = _entry(tmp_path, content, encoding)
    (fault,) = check_datasets(data_cfg("instance", custom=(entry,), resolve=False)).faults
    assert fault.kind == "read as meant" and "byte order mark or is UTF-16" in fault.what
    assert _by_image(_records(entry)) == _expected(tmp_path / "plain")


@pytest.mark.parametrize("form", [compressed, uncompressed])
def test_boxes_and_areas_of_run_lengths(tmp_path, form):
    content = instances_json(form)
    boxes = [x.pop("bbox") for x in content["annotations"]]
    areas = [x.pop("area") for x in content["annotations"]]
    mend_coco(content, None)
    assert [x["bbox"] for x in content["annotations"]] == [list(map(float, box)) for box in boxes]
    assert [x["area"] for x in content["annotations"]] == areas


def test_a_size_is_that_of_the_image_as_it_is_seen(tmp_path):
    entry = _entry(tmp_path, _edited(_drop("images", "height", "width")))
    path = tmp_path / "images" / "000000.jpg"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert [(x["height"], x["width"]) for x in _records(entry)] == [(128, 64), (64, 128)]


# What has no single meaning -> (the change, what the error says)
ERRORS = {
    "a file that isn't there": (_update("images", file_name=lambda x: "other_" + x), "other_000000.jpg"),
    "two files of one name": (
        lambda c: [x.update(file_name=f"{i}\\000000.jpg") for i, x in enumerate(c["images"])],
        "0\\000000.jpg",
    ),
    "a category that isn't there": (_set_in_turn("annotations", "category_id", "7.5"), "7.5"),
    "half an id": (_set_in_turn("images", "id", 0.5, 1.5), r"images[0].id"),
    "a box elsewhere": (_update("annotations", bbox=lambda x: [x[0] + 60, *x[1:]]), "bbox is"),
    "a box beyond any number": (
        _update("annotations", bbox=lambda x: [10**400, *x[1:]]),
        "it must be a list of numbers",
    ),
    "a box around everything": (_set_in_turn("annotations", "bbox", [0, 0, 128, 64]), "bbox is"),
    "only two points": (_set_in_turn("annotations", "segmentation", [[1, 1, 9, 9]]), "it has 2 points"),
    "a crowd of 2": (_set_in_turn("annotations", "iscrowd", 2), "iscrowd"),
    "a negative size": (_set_in_turn("images", "width", "-3"), "width"),
    "two images with one id": (_set_in_turn("images", "id", 1), "image 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_anything_else_is_an_error_that_names_file_and_place(tmp_path, name):
    change, what = ERRORS[name]
    entry = _entry(tmp_path, _edited(change))
    report = check_datasets(data_cfg("instance", custom=(entry,), resolve=False))
    assert report.failed and what in report.text()
    assert not any(fault.kind == "read as meant" for fault in report.faults)


def test_a_missing_key_is_named_in_training(tmp_path):
    content = instances_json()
    del content["annotations"][3]["image_id"]
    entry = _entry(tmp_path, content)
    with pytest.raises(DataError, match=r"instances.json: annotations\[3\] \(id 4\): lacks 'image_id'"):
        _records(entry)


@pytest.mark.parametrize("content", [None, [], 3, {"images": 3}, {"images": [1, None], "annotations": [[]]}])
def test_values_of_any_type_stay(content):
    before = json.dumps(content)
    assert mend_coco(content, "nowhere") == [] and json.dumps(content) == before


# ---- the program


def _program(tmp_path, entry, *options, task="instance"):
    config = tmp_path / "config.yaml"
    content = {"MODEL": {"KNET": {"TASK": task}}, "DATASETS": {"CUSTOM": [entry], "TRAIN": [entry["name"]]}}
    config.write_text(yaml.safe_dump({**content, "DATASETS": {**content["DATASETS"], "TEST": []}}))
    args = check_dataset.get_parser().parse_args(["--config-file", str(config), *options])
    assert isinstance(args, argparse.Namespace)
    return check_dataset.main(args)


def _all_at_once():
    content = instances_json(first_id=0)
    del content["images"][0]["width"]
    for name in ("iscrowd", "category ids as text", "boxes with margins", "Windows paths", "polygons of two points"):
        MEANT[name][0](content)
    for annotation in content["annotations"]:
        annotation.pop("area")
    return content


def test_the_fixed_file_is_right_for_pycocotools(tmp_path, capsys):
    fixed = tmp_path / "fixed.json"
    entry = _entry(tmp_path, _all_at_once(), "utf-16")
    before = (tmp_path / "instances.json").read_bytes()
    assert _program(tmp_path, entry, "--fix", str(fixed)) == 0
    assert f"Wrote {fixed}" in capsys.readouterr().out and (tmp_path / "instances.json").read_bytes() == before
    assert mend_coco(json.loads(fixed.read_text()), entry["images"]) == []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(fixed))
        expected = COCO()
        expected.dataset = instances_json()
        expected.createIndex()
        for i, annotation in expected.anns.items():
            same = truth.anns[i]
            assert {**same, "segmentation": 0} == {**annotation, "segmentation": 0}
            assert np.array_equal(truth.annToMask(same), expected.annToMask(annotation))
        results = [
            {k: x[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0, "segmentation": truth.annToRLE(x)}
            for x in truth.anns.values()
            if not x["iscrowd"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == 1


def test_a_fixed_file_replaces_no_other(tmp_path):
    entry = _entry(tmp_path)
    with pytest.raises(Exception, match="this would replace"):
        _program(tmp_path, entry, "--fix", entry["json"])


def test_fixed_panoptic_file(tmp_path, capsys):
    from panopticapi.evaluation import pq_compute

    write_images(tmp_path / "images")
    write_panoptic(tmp_path, (1, 2, 3, 4))
    content = json.loads((tmp_path / "panoptic.json").read_text())
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment.update(category_id=float(segment["category_id"]), iscrowd=bool(segment["iscrowd"]))
    _update("images", height=str)(content)
    (tmp_path / "panoptic.json").write_bytes(_text(content, "utf-8-sig"))
    entry = {"name": unique_name("meant"), "type": "coco_panoptic", "images": str(tmp_path / "images")}
    entry.update(panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(tmp_path / "panoptic"))
    fixed = str(tmp_path / "fixed.json")
    assert _program(tmp_path, entry, "--fix", fixed, task="panoptic") == 0
    assert "4 warnings" in capsys.readouterr().out
    folder = str(tmp_path / "panoptic")
    with contextlib.redirect_stdout(io.StringIO()):
        assert pq_compute(fixed, fixed, folder, folder)["All"]["pq"] == 1
    assert_perfect(scores("panoptic", entry["name"], (entry,)), "panoptic_seg")


def test_good_images_are_drawn_although_others_have_errors(tmp_path, capsys):
    content = instances_json()
    content["annotations"][0]["segmentation"] = [[1, 2, "x", 4, 5, 6]]
    entry = _entry(tmp_path, content)
    output = str(tmp_path / "out")
    assert _program(tmp_path, entry, "--output", output) == 1
    assert not os.path.exists(os.path.join(output, f"{entry['name']}.jpg"))
    assert _program(tmp_path, entry, "--output", output, "--draw") == 1
    sheet = Image.open(os.path.join(output, f"{entry['name']}.jpg"))
    assert sheet.width == 128 * 5 + 16  # one picture, enlarged 5 times, between two margins
    assert "bad polygon" in capsys.readouterr().out


def test_a_damaged_image_has_one_fault_and_a_missing_one_is_mended(tmp_path, capsys):
    entry = _entry(tmp_path, instances_json())
    output, fixed = str(tmp_path / "out"), str(tmp_path / "fixed.json")
    first, *_ = sorted(os.listdir(entry["images"]))
    path = os.path.join(entry["images"], first)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:100])
    assert _program(tmp_path, entry, "--output", output, "--draw", "--fix", fixed) == 1
    assert "1 error," in capsys.readouterr().out and os.path.isfile(os.path.join(output, f"{entry['name']}.jpg"))
    os.remove(path)
    os.remove(fixed)
    assert _program(tmp_path, entry, "--output", output, "--draw", "--fix", fixed) == 0
    assert "1 error," in capsys.readouterr().out
    assert first not in [x["file_name"] for x in json.loads(Path(fixed).read_text())["images"]]


def test_a_box_at_the_tolerance_is_the_same_for_the_check_and_for_the_reader(tmp_path):
    """The box of a polygon's pixels may be a pixel smaller than the polygon's."""
    polygon = [302.0, 326.0, 388.0, 326.0, 388.0, 399.0, 345.2, 399.2, 345.1, 400.0, 345.0, 399.2, 302.0, 399.0]
    pixels = mask_util.toBbox(mask_util.merge(mask_util.frPyObjects([polygon], 820, 900))).tolist()
    assert pixels[3] == 73 and box_of([polygon], 820, 900)[3] == 74  # 9 pixels from the stated box, and 8
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [polygon], "area": 6300}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 820, "width": 900}],
        "annotations": [{"id": 1, "bbox": [295, 319, 101, 89], **common}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    Image.new("RGB", (900, 820)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    entry = {"name": unique_name("boxes"), "type": "coco_instance", "json": str(tmp_path / "a.json")}
    report = check_datasets(data_cfg("instance", custom=({**entry, "images": str(tmp_path)},)))
    assert "wrong bbox" not in {fault.kind for fault in report.faults} and not report.failed
