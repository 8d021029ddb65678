"""The command ``knet``: finding annotations in a folder, and training on them with one line."""

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_helpers import custom_entry, data_cfg, unique_name
from dataset_trees import CLASSES, NUM_IMAGES, instances_json, write_images, write_labels, write_panoptic
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from program_helpers import NUM_IMAGES as NUM_SHAPES
from program_helpers import ROOT, TINY_MODEL, shapes  # noqa: F401
from tool_formats import TOOLS, masks, stem, write_color_labels, write_tool, yolo_seg

import knet_command
from knet_d2.config import get_knet_cfg
from knet_d2.config.files import find_config_file, get_config_file
from knet_d2.config.merging import merge_config
from knet_d2.data import load_dataset
from knet_d2.data.check import check_datasets
from knet_d2.data.classes import ClassTable
from knet_d2.data.discovery import Found, find_annotations
from knet_d2.data.files import files_below
from knet_d2.engine import Trainer
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation.report import recommended_threshold
from knet_d2.evaluation.report.page import RECOMMENDED
from knet_d2.inference.from_file import threshold_options
from knet_d2.programs import NAMES, check_dataset, parse, run_program, train
from knet_d2.programs.own_data import choose_recipe, use_data, write_config
from knet_d2.setup.dependencies import VERSION
from knet_d2.tasks import TASKS


def _root(tmp_path):
    """A folder whose name is the name of no other data set in this process."""
    root = tmp_path / unique_name("found")
    root.mkdir()
    return root


def _number_of_images(found):
    """Check what was found without errors; returns the numbers of images of DATASETS.TRAIN and DATASETS.TEST."""
    cfg = data_cfg(found.task, custom=tuple(found.entries), resolve=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(found.train), tuple(found.test)
    report = check_datasets(cfg)
    errors = [x for x in report.faults if x.level == "error"]
    assert not errors, report.text()
    return [len(load_dataset(name)) for name in (*found.train, *found.test)]


# ---- what is found


@pytest.mark.parametrize("tool", TOOLS)
def test_annotations_of_tools_are_found(tmp_path, tool):
    root = _root(tmp_path)
    entry = write_tool(root, tool, "x")
    task = "instance" if tool in ("instance PNG", "CVAT masks") else None
    found = find_annotations(str(root), task)
    (own,) = found.entries
    assert (found.task, own["type"]) == ("instance", entry["type"])
    if entry["type"] == "instance_png":  # what the values mean can't be seen
        own.update(class_divisor=entry["class_divisor"], classes=entry["classes"])
    if tool == "VIA project":
        own["attribute"] = "kind"
    if tool == "Pascal VOC":
        own["classes"] = entry["classes"]
    assert _number_of_images(found) == [1, 1] and NUM_IMAGES == 2


def test_coco_json_and_its_images(tmp_path):
    root = _root(tmp_path)
    write_images(root / "export" / "pictures")
    (root / "other").mkdir()
    (root / "other" / "settings.json").write_text('{"shapes": 3}')
    (root / "export" / "result.json").write_text(json.dumps(instances_json()))
    found = find_annotations(str(root))
    assert found.entries[0]["images"] == str(root / "export" / "pictures")
    assert _number_of_images(found) == [1, 1]


@pytest.mark.parametrize("layout", ["roboflow", "coco"])
def test_parts_are_told_by_names(tmp_path, layout):
    root = _root(tmp_path)
    for part in ("train", "valid"):
        folder = root / part if layout == "roboflow" else root / f"{part}2017"
        write_images(folder)
        path = folder / "_annotations.coco.json" if layout == "roboflow" else root / f"instances_{part}2017.json"
        for i in range(NUM_IMAGES):  # other pictures than those for training
            pixels = np.asarray(Image.open(folder / f"{i:06d}.jpg"))
            Image.fromarray(pixels // (1 if part == "train" else 2)).save(folder / f"{i:06d}.jpg")
        path.write_text(json.dumps(instances_json()))
    found = find_annotations(str(root))
    assert [x["name"].rsplit("_", 1)[1] for x in found.entries] == ["train", "val"]
    assert [os.path.basename(x["images"])[:5] for x in found.entries] == ["train", "valid"]
    assert _number_of_images(found) == [2, 2]


def test_yolo_with_parts_as_ultralytics_and_roboflow_write_them(tmp_path):
    for layout in ("images/{}", "{}/images"):
        root = _root(tmp_path)
        write_images(root / "all")
        yolo_seg(root)
        for part, i in (("train", 0), ("val", 1)):
            for source, ending in (("all", "jpg"), ("labels", "txt")):
                name = layout.format(part).replace("images", "images" if source == "all" else "labels")
                (root / name).mkdir(parents=True, exist_ok=True)
                shutil.move(root / source / f"{stem(i)}.{ending}", root / name)
        stated = {"train": layout.format("train"), "val": layout.format("val"), "names": {0: "car", 1: "person"}}
        if layout == "{}/images":
            stated.update(train="../train/images", val="../val/images")
        (root / "data.yaml").write_text(yaml.safe_dump({"path": ".", **stated}))
        found = find_annotations(str(root))
        assert _number_of_images(found) == [1, 1]
        assert [len(load_dataset(x)[0]["annotations"]) for x in (*found.train, *found.test)] == [3, 3]


def test_yolo_that_validates_on_its_training_images_holds_some_out(tmp_path):
    root = _root(tmp_path)
    write_images(root / "images")
    yolo_seg(root)
    stated = {"train": "images", "val": "images", "names": ["car", "person"]}
    (root / "data.yaml").write_text(yaml.safe_dump(stated))
    found = find_annotations(str(root))
    assert "val: the images of train, so left out" in found.what and found.entries[0]["validation"] == 0.2
    assert _number_of_images(found) == [1, 1]


@pytest.mark.parametrize("stated", [["a/images", "b/images"], "train.txt", "absent/images"])
def test_yolo_never_leaves_out_a_part_that_is_stated(tmp_path, stated):
    """Without its training set, the validation set would be trained on."""
    write_images(tmp_path / "val" / "images")
    content = {"train": stated, "val": "val/images", "test": "absent", "names": ["car", "person"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=r"data\.yaml: train = .*name one folder of images that exists"):
        find_annotations(str(tmp_path))


def test_panoptic_json(tmp_path):
    root = _root(tmp_path)
    write_images(root / "images")
    write_panoptic(root, (1, 2, 3, 4))
    for task in (None, "semantic"):
        found = find_annotations(str(root), task)
        assert found.task == (task or "panoptic") and found.entries[0]["panoptic_root"] == str(root / "panoptic")
        assert _number_of_images(found) == [1, 1]


def test_masks_of_two_values_are_semantic(tmp_path):
    root = _root(tmp_path)
    write_images(root / "images")
    write_labels(root / "masks", [255, 0, 0, 0], void=0)
    found = find_annotations(str(root))
    (entry,) = found.entries
    assert (found.task, entry["classes"], entry["label_values"]) == ("semantic", ["background", "object"], [0, 255])
    assert _number_of_images(found) == [1, 1]
    # knet annotate --format png writes these values again
    table = ClassTable.from_metadata(MetadataCatalog.get(found.train[0]), TASKS["semantic"])
    assert table.dataset_ids == [0, 255] and [table.is_background(i) for i in range(2)] == [True, False]
    # The label maps of the trees have class 0, here 255, in about a third of the pixels
    share = np.mean([np.asarray(Image.open(path)) == 255 for path in (root / "masks").iterdir()])
    assert 0.1 < share < 0.9 and found.what == (
        f"masks in {root}/masks: 0 is background ({1 - share:.1%} of the pixels); 255 is object ({share:.1%} of the "
        "pixels). For other names, in this order: --names background,object"
    )
    with pytest.raises(DataError, match="has no annotations for --task instance, but masks in .*task semantic"):
        find_annotations(str(root), "instance")
    named = find_annotations(str(root), names=["membrane", "cell"])
    assert named.entries[0]["classes"] == ["membrane", "cell"] and "255 is cell" in named.what
    with pytest.raises(DataError, match="--names a,b,c: name the 2 values of the masks, in this order: 0, 255"):
        find_annotations(str(root), names=["a", "b", "c"])


def _write_masks(folder, values_of_files):
    """Masks of 10 x 10 pixels with images beside them; each has its values in equal parts."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i, values in enumerate(values_of_files):
        mask = np.resize(np.array(values), (10, 10)).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
        Image.fromarray(np.full((10, 10, 3), i, np.uint8)).save(folder / "images" / f"{i}.png")


@pytest.mark.parametrize(
    "values, named",
    [
        ([[0, 255], [0, 255], [0, 255], [0, 1]], "3.png has 0, 1"),
        ([[0, 1], [0, 1], [0, 255], [0, 1]], "0.png has 0, 1; .*1.png has 0, 1; .*3.png has 0, 1"),
        ([[0, 255], [0, 255], [0, 255], range(256)], "3.png has 100 values"),
    ],
)
def test_masks_of_two_values_among_others_are_named(tmp_path, values, named):
    root = _root(tmp_path)
    _write_masks(root, values)
    with pytest.raises(DataError, match=f"masks have the values 0 and 255 alone, but .*{named}.*same two values"):
        find_annotations(str(root))
    (root / "classes.txt").write_text("a\nb\nc\n")  # then 255 is what has no class
    assert find_annotations(str(root)).entries[0]["classes"] == str(root / "classes.txt")


def test_255_is_what_has_no_class_where_it_is_beside_classes(tmp_path):
    root = _root(tmp_path)
    _write_masks(root, [[0, 1, 255], [0, 1, 255], [0, 255], [0, 1]])
    assert find_annotations(str(root)).entries[0]["label_values"] == [0, 1]


@pytest.mark.parametrize(
    "options, warmup",
    [
        ([], []),
        (["SOLVER.MAX_ITER", "200"], ["SOLVER.WARMUP_ITERS", "16"]),  # 50 of 600
        (["SOLVER.MAX_ITER", "900"], []),
        (["SOLVER.MAX_ITER", "200", "SOLVER.WARMUP_ITERS", "30"], []),
    ],
)
def test_the_warm_up_of_a_shorter_run_is_shorter(tmp_path, options, warmup):
    root = _root(tmp_path)
    _write_masks(root, [[0, 255]] * 4)
    arguments = ["--data", str(root), "--output", str(tmp_path / "run"), "--recipe", "finetune/semantic_lite0.yaml"]
    args = parse(train.get_parser(), [*arguments, *options])
    use_data(args, ("output", "no_check"))
    assert args.opts == [*options, *warmup]


def test_names_of_categories_follow_their_ids(tmp_path):
    root = _root(tmp_path)
    write_images(root)
    content = instances_json()
    content["categories"] = [{"id": 9, "name": "object"}, {"id": 3, "name": "thing"}]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = (9, 3)[i % 2]
    (root / "result.json").write_text(json.dumps(content))
    found = find_annotations(str(root), names=["moth", "butterfly"])
    assert sum(_number_of_images(found)) == NUM_IMAGES
    assert MetadataCatalog.get(found.train[0]).thing_classes == ["moth", "butterfly"]
    with pytest.raises(AssertionError, match=r"\(moth\) are not as many as the categories.*order: thing, object\."):
        _number_of_images(find_annotations(str(root.rename(tmp_path / "other")), names=["moth"]))


def test_names_are_for_annotations_without_them(tmp_path):
    root = _root(tmp_path)
    write_tool(root, "labelme", "x")
    with pytest.raises(DataError, match="--names a,b: .* have names already"):
        find_annotations(str(root), names=["a", "b"])


@pytest.mark.parametrize("tool", ["VIA 2", "numbers", "single masks"])
def test_the_name_of_objects_without_a_class(tmp_path, tool):
    root = _root(tmp_path)
    if tool == "VIA 2":
        write_tool(root, tool, "x")
        (path,) = root.glob("**/*.json")
        path.write_text(re.sub(r'"region_attributes": \{[^}]*\}', '"region_attributes": {}', path.read_text()))
    else:
        write_images(root / "images")
        write_labels(root / "masks", [1, 2, 3, 4], void=0)
        for path in (root / "masks").glob("*.png") if tool == "single masks" else ():
            path.with_suffix("").mkdir()
            path.rename(path.with_suffix("") / "1.png")
    found = find_annotations(str(root), "instance", ["butterfly"])
    assert sum(_number_of_images(found)) == NUM_IMAGES
    assert MetadataCatalog.get(found.train[0]).thing_classes == ["butterfly"]
    with pytest.raises(DataError, match="--names a,b: .* have names already"):
        find_annotations(str(root), "instance", ["a", "b"])


def test_masks_in_folders_of_folders(tmp_path):
    """As zhixuhao/unet has them: data/membrane/train/image and label."""
    root = _root(tmp_path)
    write_images(root / "data" / "membrane" / "train" / "image")
    write_labels(root / "data" / "membrane" / "train" / "label", [255, 0, 0, 0], void=0)
    (root / "data" / "membrane" / "test").mkdir()
    found = find_annotations(str(root))
    assert found.task == "semantic" and _number_of_images(found) == [1, 1]


def test_an_image_that_is_annotated_and_missing(tmp_path, capsys, monkeypatch):
    root = _root(tmp_path)
    write_tool(root, "VIA 2", "x")
    (path,) = root.glob("**/*.json")
    content = json.loads(path.read_text())
    content["lost"] = {**next(iter(content.values())), "filename": "lost.jpg"}
    path.write_text(json.dumps(content))
    arguments = ["check", "--data", str(root), "--output", str(tmp_path / "out")]
    assert knet_command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "lost.jpg: is annotated, but does not exist. Add the file" in printed and "1 error," in printed
    assert printed.endswith(
        "knet check --fix FILE.json writes annotations without these errors.\n--draw draws the good images.\n"
    )
    fixed, drawn = root / "fixed.json", []
    draw = check_dataset.ground_truth
    monkeypatch.setattr(check_dataset, "ground_truth", lambda cfg, x: (drawn.append(x["file_name"]), draw(cfg, x))[1])
    assert knet_command.main([*arguments, "--draw", "--fix", str(fixed)]) == 0  # the written file has no error
    printed = capsys.readouterr().out
    assert "1 error," in printed and f"The errors above are not in {fixed}: name it" in printed
    assert "--data takes it if it lies in the folder of the images." in printed
    assert {x.name for x in (tmp_path / "out").glob("*.jpg")} == {
        f"{root.name}_{part}.jpg" for part in ("train", "val")
    }
    assert sorted(map(os.path.basename, drawn)) == [f"{stem(i)}.jpg" for i in range(2)]  # each in one part
    with pytest.raises(DataError, match=r"annotations without them\. Correct or remove it\.$"):
        load_dataset(f"{root.name}_train")
    assert [x["file_name"] for x in json.loads(fixed.read_text())["images"]] == [f"{stem(i)}.jpg" for i in range(2)]
    assert f"COCO's {fixed} (not read: VIA's {path})" in find_annotations(str(root)).what
    with pytest.raises(DataError, match="Name one of them: --data FILE"):  # two files for one part
        (root / "copy.json").write_text(fixed.read_text())
        find_annotations(str(root))
    found = find_annotations(str(fixed))
    assert found.entries[0]["name"] == "fixed" and _number_of_images(found) == [1, 1]


@pytest.mark.parametrize(("program", "tool"), [(train, "VIA 2"), (train, "COCO"), (check_dataset, "VIA 2")])
def test_images_that_are_missing_are_left_out(tmp_path, capsys, program, tool):
    root, output = _root(tmp_path), tmp_path / "out"
    if tool == "COCO":
        write_images(root)
        (root / "result.json").write_text(json.dumps(instances_json()))
    else:
        write_tool(root, tool, "x")
    next(root.glob(f"**/{stem(0)}.jpg")).unlink()
    args = parse(program.get_parser(), ["--data", str(root), "--output", str(output), "--leave-out-missing"])
    before = find_annotations(str(root))
    use_data(args, ("output",))
    assert f"Left out 1 of the annotated images, which do not exist: {stem(0)}.jpg." in capsys.readouterr().out
    config = yaml.safe_load((output / "data_config.yaml").read_text())["DATASETS"]
    (entry,) = config["CUSTOM"]
    assert entry["type"] == "coco_instance" and entry.pop("validation") == before.entries[0]["validation"]
    content = json.loads((output / f"{root.name}.json").read_text())
    assert [x["file_name"] for x in content["images"]] == [f"{stem(i)}.jpg" for i in range(1, NUM_IMAGES)]
    assert {x["image_id"] for x in content["annotations"]} == {x["id"] for x in content["images"]}
    cfg = data_cfg("instance", custom=(entry,), resolve=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entry["name"],), ()
    report = check_datasets(cfg)
    assert not report.failed, report.text()


def test_leaving_out_missing_images_never_replaces_the_annotations(tmp_path):
    root = _root(tmp_path)
    write_images(root)
    path, text = root / f"{root.name}.json", json.dumps(instances_json())
    path.write_text(text)
    args = parse(train.get_parser(), ["--data", str(path), "--output", str(root), "--leave-out-missing"])
    with pytest.raises(ConfigError, match=rf"--output .*: this would replace .*{path.name}, which is read"):
        use_data(args, ("output",))
    assert path.read_text() == text


def test_missing_images_of_label_maps_are_not_left_out(tmp_path):
    root = _root(tmp_path)
    _write_masks(root, [[0, 255]] * 4)
    args = parse(train.get_parser(), ["--data", str(root), "--output", str(tmp_path / "run"), "--leave-out-missing"])
    with pytest.raises(ConfigError, match="--leave-out-missing: is for annotations of objects"):
        use_data(args, ("output",))


def test_label_maps_with_names(tmp_path):
    root = _root(tmp_path)
    write_images(root / "images")
    write_labels(root / "labels", [0, 1, 2, 3])
    assert find_annotations(str(root)).entries[0]["classes"] == [f"class_{i}" for i in range(4)]
    (root / "classes.txt").write_text("\n".join(CLASSES))
    found = find_annotations(str(root))
    assert _number_of_images(found) == [1, 1]
    data_cfg("semantic", custom=tuple(found.entries), resolve=False)


def test_masks_in_colour_with_their_table(tmp_path):
    root = _root(tmp_path)
    colors = [[250, 50, 83], [51, 221, 255], [0, 0, 10], [0, 10, 0]]
    os.rename(write_color_labels(root, colors, [0, 0, 0]), root / "SegmentationClass")
    write_images(root / "JPEGImages")
    rows = zip(["background", *CLASSES], [[0, 0, 0], *colors])
    (root / "labelmap.txt").write_text("".join(f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in rows))
    found = find_annotations(str(root))
    assert found.task == "semantic" and _number_of_images(found) == [1, 1]


def test_a_folder_for_each_image(tmp_path):
    root = _root(tmp_path)
    write_images(root / "all")
    for i in range(NUM_IMAGES):
        folder = root / f"cell{i}"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        shutil.move(root / "all" / f"{stem(i)}.jpg", folder / "images" / f"cell{i}.jpg")
        for number, (_, mask) in enumerate(masks(i)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")
    os.rmdir(root / "all")
    found = find_annotations(str(root))
    assert found.entries[0]["type"] == "png_per_instance" and _number_of_images(found) == [1, 1]


def test_masks_as_jpeg_are_refused(tmp_path):
    write_images(tmp_path / "images")
    write_images(tmp_path / "masks")
    with pytest.raises(DataError, match=r"masks/000000\.jpg: a mask as JPEG has other values .* as PNG"):
        find_annotations(str(tmp_path))


def test_masks_whose_values_do_not_tell_whether_255_is_a_class(tmp_path):
    root = _root(tmp_path)
    write_images(root / "images")
    write_labels(root / "masks", [128, 255, 0, 0], void=0)
    with pytest.raises(DataError, match="the masks have the values 0, 128, 255.*classes.txt.*shades of grey"):
        find_annotations(str(root))
    assert find_annotations(str(root), "instance").entries[0]["type"] == "instance_png"
    (root / "classes.txt").write_text("table\ncup\n")
    assert find_annotations(str(root)).task == "semantic"


def test_pipes_and_devices_are_no_files(tmp_path):
    """They would be read for ever. A broken link is an image that is missing."""
    (tmp_path / "a.json").write_text("{}")
    os.mkfifo(tmp_path / "b.json")
    (tmp_path / "c.json").symlink_to("/dev/zero")
    (tmp_path / "d.json").symlink_to("absent")
    assert [stem for stem, _ in files_below(str(tmp_path), (".json",))] == ["a", "d"]


def test_what_is_not_found(tmp_path):
    with pytest.raises(DataError, match="there is no such folder or file"):
        find_annotations(str(tmp_path / "nowhere"))
    write_images(tmp_path / "images")
    with pytest.raises(DataError, match="no annotations were found. knet docs DATASETS"):
        find_annotations(str(tmp_path))
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(instances_json()))
    with pytest.raises(DataError, match=r"b\.json: this and another annotation file are both for train"):
        find_annotations(str(tmp_path))


# ---- the command

TINY = {
    **{f"MODEL.RESNETS.{key}": value for key, value in TINY_MODEL["RESNETS"].items()},
    **{"MODEL.SEM_SEG_HEAD.CONVS_DIM": 32, "MODEL.FPN.OUT_CHANNELS": 32},
    **{"MODEL.KNET.NUM_KERNELS": 8, "MODEL.KNET.NUM_STAGES": 2},
    **{"MODEL.KNET.UPDATE_HEAD.FEATURE_DIM": 32, "MODEL.KNET.UPDATE_HEAD.FFN_DIM": 32},
    **{"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "DATALOADER.NUM_WORKERS": 0, "TEST.NUM_PICTURES": 0},
    **{"INPUT.MIN_SIZE_TRAIN": "(64,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice", "INPUT.MIN_SIZE_TEST": 64},
    **{"SOLVER.IMS_PER_BATCH": 2, "SOLVER.ACCUMULATE_GRADIENTS": 1, "SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0},
    **{"TEST.EVAL_PERIOD": 2},
}
OPTIONS = [str(x) for pair in TINY.items() for x in pair]


def test_from_a_folder_to_an_exported_model(shapes, tmp_path, capsys, monkeypatch):  # noqa: F811
    root, output = tmp_path / unique_name("my_photos"), str(tmp_path / "run")
    root.mkdir()
    shutil.copytree(shapes / "images", root / "images")
    shutil.copy(shapes / "instances.json", root)
    arguments = ["--data", str(root), "--task", "instance", "--output", output]
    logs = []
    monkeypatch.setattr("knet_d2.programs.setup_logger", lambda **options: logs.append(options))
    assert knet_command.main(["train", *arguments, "--recipe", "finetune/instance.yaml", *OPTIONS]) == 0
    assert not logs  # training sets up its own log
    printed = capsys.readouterr().out
    config = yaml.safe_load(open(os.path.join(output, "data_config.yaml")))
    assert "validation: 0.2" in printed and f"Wrote {output}/data_config.yaml" in printed
    assert config["_BASE_"] == get_config_file("finetune/instance.yaml")
    assert config["DATASETS"]["CUSTOM"][0]["json"] == str(root / "instances.json")
    assert f"knet predict {output} PHOTOS" in printed
    (photo,) = re.findall(rf"knet predict {output} (\S+) --output {output}/picture.png", printed)
    assert photo in {x["file_name"] for x in DatasetCatalog.get(f"{root.name}_val")}
    assert recommended_threshold(output) is None  # after 2 iterations, nothing is found
    final = os.path.join(output, "model_final.pth")
    assert torch.load(final, weights_only=True)["iteration"] == 1

    saved = Path(output, "config.yaml").read_text()
    assert knet_command.main(["eval", output, "TEST.DETECTIONS_PER_IMAGE", "3"]) == 0
    # The next evaluation, and a resumed run, have the options of training
    assert Path(output, "config.yaml").read_text() == saved
    assert "DETECTIONS_PER_IMAGE: 3" in Path(output, "inference", "config.yaml").read_text()
    page = Path(output, "report.html").read_bytes()
    assert knet_command.main(["eval", output, "DATASETS.TEST", f"('{root.name}_train',)"]) == 0
    assert Path(output, "report.html").read_bytes() == page
    assert f"{root.name}_train" in Path(output, f"report_{root.name}_train.html").read_text()
    for words in (["eval", output], ["predict", output, "x.jpg", "--opts"]):
        assert knet_command.main([*words, "MODEL.WEIGHTS", "other.pth"]) == 1
        assert "MODEL.WEIGHTS: the model is the first argument" in capsys.readouterr().err
    (page := Path(output, "report.html")).write_text(
        page.read_text().replace("<title>", RECOMMENDED.format("0.22") + "<title>")
    )
    assert threshold_options(None, ["MODEL.WEIGHTS", output])[1::2] == ["0.22", "0.22"]
    assert threshold_options(None, ["MODEL.WEIGHTS", final])[1::2] == ["0.22", "0.22"]
    assert threshold_options(None, ["MODEL.WEIGHTS", str(tmp_path)])[1::2] == ["0.3", "0.3"]
    with monkeypatch.context() as patch:
        patch.chdir(output)
        assert threshold_options(None, ["MODEL.WEIGHTS", "model_final.pth"])[1::2] == ["0.22", "0.22"]
        assert threshold_options(None, ["MODEL.WEIGHTS", "lite0_fruits"])[1::2] == ["0.3", "0.3"]
    target = str(tmp_path / "pictures")
    photo = str(root / "images" / "000000.jpg")
    result = str(tmp_path / "result.json")
    options = ["--confidence-threshold", "0", "--json", result]
    # The photo may also stand behind options
    assert knet_command.main(["predict", output, "--output", target, photo, *options]) == 0
    printed, found = capsys.readouterr().out, json.load(open(tmp_path / "result.json"))
    assert f"Wrote the results of 1 image to {target}, {result}." in printed
    number = len(found["images"][0]["instances"])
    threshold = "(--confidence-threshold 0; the training run's report recommends 0.22)"
    assert number > 1 and f"Found {number} objects in 1 image {threshold}." in printed
    assert os.listdir(target) == ["000000.jpg"] and found["images"]
    assert knet_command.main(["predict", output, photo, "--output", target, "--confidence-threshold", "0.99"]) == 0
    assert "Found 0 objects in 1 image, none in 1 of them (--confidence" in capsys.readouterr().out
    assert knet_command.main(["predict", output, photo, "--output", target]) == 0
    assert "(--confidence-threshold 0.22, as the training run's report recommends)" in capsys.readouterr().out
    assert knet_command.main(["check", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "0 errors" in printed and get_config_file("finetune/instance_lite0.yaml") in printed
    assert sorted(x for x in os.listdir(output) if x.endswith("_train.jpg"))
    called = {}
    monkeypatch.setattr("knet_d2.programs.export_model.main", lambda args: called.update(weights=args.weights))
    assert knet_command.main(["export", output, str(tmp_path / "model.onnx")]) == 0
    assert called["weights"] == output  # stands for the best weights, as for knet_d2.load
    assert NUM_SHAPES == 4


@pytest.mark.parametrize(
    "program, words, expected",
    [
        ("train", "--data X A.B 6 --resume", {"data": "X", "resume": True, "opts": ["A.B", "6"]}),
        ("train", "A.B 6 --num-gpus 2 --data X", {"data": "X", "num_gpus": 2, "opts": ["A.B", "6"]}),
        ("train", "--data X A.B --resume", {"resume": False, "opts": ["A.B", "--resume"]}),  # a value
        ("eval", "out A.B 6 --num-gpus 2", {"num_gpus": 2, "opts": ["A.B", "6"]}),
        ("predict", "out a.jpg --opts A.B 6 --output x", {"output": "x", "inputs": ["a.jpg"], "opts": ["A.B", "6"]}),
        ("check_dataset", "--data X --opts A.B 6 --draw", {"data": "X", "draw": True, "opts": ["A.B", "6"]}),
    ],
)
def test_options_may_stand_behind_the_pairs(program, words, expected):
    args = parse(importlib.import_module(f"knet_d2.programs.{program}").get_parser(), words.split())
    assert {key: getattr(args, key) for key in expected} == expected


def test_an_unknown_option_behind_the_pairs_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(train.get_parser(), ["--data", "X", "A.B", "6", "--rezume"])
    assert "unrecognized arguments: --rezume" in capsys.readouterr().err


def test_a_recipe_is_relative_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("SEED: 5\n")
    path = write_config(Found("x", "instance", [], [], []), "mine.yaml", "output/x")
    cfg = get_knet_cfg()
    merge_config(cfg, path)
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (5, "output/x")


def test_ctrl_c_saves_and_prints_the_command_that_continues(shapes, tmp_path, monkeypatch, capsys):  # noqa: F811
    root, output = tmp_path / unique_name("my_photos"), tmp_path / "a run"
    root.mkdir()
    shutil.copytree(shapes / "images", root / "images")
    shutil.copy(shapes / "instances.json", root)
    step = Trainer.run_step

    def press(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    arguments = ["--data", str(root), "--output", str(output), "--recipe", "finetune/instance.yaml", "--no-check"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Trainer, "run_step", press)
        knet_command.main(["train", *arguments, *OPTIONS])
    assert ended.value.code == 75 and (output / "last_checkpoint").read_text() == "model_0000000.pth"
    (command,) = re.findall("Continue with --resume: (.*)", (output / "log.txt").read_text())
    assert "What is next" not in capsys.readouterr().out
    assert knet_command.main(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out
    assert f"The model is in {output}. What is next:\n  open {output}/report.html in a browser" in printed
    assert f"\n  knet predict '{output}' PHOTOS --output '{output}'/pictures" in printed
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 1
    assert "Training from iteration 1 to 2" in (output / "log.txt").read_text()
    assert "The run had ended" not in (output / "log.txt").read_text()
    assert re.search(r"\nsegm/AP: \d+\.\d\d after 2 iterations\n", printed)
    assert knet_command.main([*shlex.split(command)[1:], "SOLVER.MAX_ITER", "3"]) == 0
    assert re.search(r"\nsegm/AP: \d+\.\d\d after 2, \d+\.\d\d after 3 iterations\n", capsys.readouterr().out)
    log = re.sub(r"\s+", " ", (output / "log.txt").read_text())
    assert re.search(r"The run had ended at iteration 2\. It goes on to 3, with a learning rate of \d", log)


def test_a_faulty_data_set_is_not_trained_on(shapes, tmp_path, capsys):  # noqa: F811
    root = tmp_path / unique_name("my_photos")
    root.mkdir()
    shutil.copytree(shapes / "images", root / "images")
    content = json.loads((shapes / "instances.json").read_text())
    content["annotations"][0]["category_id"] = 999
    (root / "instances.json").write_text(json.dumps(content))
    output = str(tmp_path / "run")
    recipe = ["--recipe", "finetune/instance.yaml"]
    assert knet_command.main(["train", "--data", str(root), "--output", output, *recipe, *OPTIONS]) == 1
    printed = capsys.readouterr().out
    assert "error: unknown category (1)" in printed and "Correct the errors above" in printed
    assert not os.path.exists(os.path.join(output, "log.txt"))


def test_recipes_exist_and_depend_on_the_device():
    for task in TASKS:
        for device, ending in (("cpu", "_lite0"), ("cuda", "")):
            recipe = choose_recipe(task, device)
            assert recipe == f"finetune/{task}{ending}.yaml" and get_config_file(recipe)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "nowhere"], "Error: --data nowhere: there is no such folder or file"),
        (["train", "--data", "x", "--config-file", "c.yaml"], "Error: --data x writes a config: leave out"),
        (["train", "--task", "semantic"], "Error: --task: only training on --data has this option"),
        (["train", "--no-check"], "Error: --no-check: only training on --data has this option"),
        (["check"], "Error: Name what to check: --data FOLDER, or --config-file FILE"),
        (["eval", "."], "Error: .: is not the folder of a training run, as it has no config.yaml"),
        (["predict", "m.pth", "--output", "x.png"], "Error: Name what to segment: either images, or --video-input"),
        (["demo", "--webcam", "--input", "x.jpg"], "Error: Name what to segment: either images, or --video-input"),
        (["predict", "m.pth", "x.jpg", "--opts", "MODEL.WEIGHTS", "n.pth"], "Error: MODEL.WEIGHTS: the model is the"),
        (["predict", ".", "photo.jpg"], "Error: .: this folder has no model_best.pth or model_final.pth"),
        (["export", ".", "x.onnx"], "Error: .: this folder has no model_best.pth"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert knet_command.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_the_installed_command_is_this_function(monkeypatch):
    made = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: made.update(options))
    runpy.run_path(os.path.join(os.path.dirname(__file__), "..", "setup.py"))
    assert made["package_dir"]["knet_d2.docs"] == "docs" and made["package_data"]["knet_d2.docs"] == ["**/*.md"]
    (command,) = made["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", command).groups()
    assert name == "knet" and getattr(importlib.import_module(module), function) is knet_command.main


def test_help_and_other_programs(capsys):
    assert knet_command.main([]) == knet_command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in ("train", "eval", "predict", "check", "export", "doctor"))
    short = {"check_dataset": "check", "export_model": "export"}
    assert [name for name in NAMES if not re.search(rf"^  .*\b{short.get(name, name)}\b", printed, re.MULTILINE)] == []
    with pytest.raises(SystemExit, match="there is no command 'fly'; knet --help lists them"):
        knet_command.main(["fly"])
    # Each has one help, with its options and its own name, whatever starts it
    expected = {
        "train": (
            "--data",
            "--task",
            "--output",
            "--resume",
            "--num-gpus",
            "--no-check",
            "knet train --data my_photos",
        ),
        "check": ("--data", "--task", "--config-file", "--fix", "knet check --data my_photos"),
        "eval": ("--num-gpus", "knet eval output/my_photos"),
        "predict": ("--json", "--masks", "--confidence-threshold", "knet predict output/my_photos photo.jpg"),
        "export": ("--int8", "knet export output/my_photos model.onnx"),
    }
    for name, texts in expected.items():
        with pytest.raises(SystemExit) as ended:
            knet_command.main([name, "--help"])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and printed.startswith(f"usage: knet {name} [-h]")
        assert [text for text in texts if text not in printed] == []


# What only a checkout has
CHECKOUT = re.compile(r"(?<![\w/])(docs|tools|demo|checks)/\w*|train_net|MODEL_ZOO")


@pytest.mark.parametrize("name", NAMES)
def test_help_names_no_file_of_a_checkout(name, capsys):
    with pytest.raises(SystemExit):
        run_program(name, ["--help"], f"knet {name}")
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: knet {name} ") and "%(" not in printed
    assert CHECKOUT.search(printed) is None


def test_messages_name_no_file_of_a_checkout():
    """All strings but docstrings; and the documents that any string names exist."""
    for path in Path(ROOT, "knet_d2").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        statements = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node in statements or CHECKOUT.search(node.value) is None, (path, node.value)
                assert set(re.findall(r"knet docs ([A-Z_]+)", node.value)) <= set(knet_command.documents()), path


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "knet_d2", "docs", "FAQ"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, Path(ROOT, "docs", "FAQ.md").read_text().strip())


def test_documents_are_printed_and_packed(capsys, monkeypatch):
    assert knet_command.main(["docs", "datasets"]) == 0
    assert capsys.readouterr().out.startswith("# Data sets")
    assert knet_command.main(["docs"]) == 0
    listed = capsys.readouterr().out
    assert os.path.join("docs", "CONFIG.md") in listed
    assert {line.split()[0] for line in listed.splitlines()[2:]} == set(knet_command.documents())
    with pytest.raises(SystemExit, match="there is no page 'fly'; the pages are ADVANCED_USAGE"):
        knet_command.main(["docs", "fly"])


def test_every_link_between_pages_names_a_page():
    """As a reader of an installed package types it."""
    pages = {path.resolve(): name for name, path in knet_command.documents().items()}
    assert {"README", "MODEL_ZOO", "demo/README", "demo/fruits_nuts/README", "FAQ"} <= set(pages.values())
    links = 0
    for page in pages:
        for target in re.findall(r"\]\((?!\w+://)([^)#\s]+\.md)(?:#[^)\s]*)?\)", page.read_text()):
            linked = (page.parent / target).resolve()
            if "checks" not in linked.parts:  # for developers of a checkout
                assert linked in pages, (page, target)
                assert knet_command.find_document(pages[linked].lower() + ".md#a-heading") == Path(linked)
                links += 1
    assert links > 50
    assert knet_command.find_document("../demo/README.md").parent.name == "demo"
    assert knet_command.find_document("docs/FAQ.md") == knet_command.find_document("faq")
    assert knet_command.find_document("fly.md") is None


def test_help_and_version_need_neither_torch_nor_detectron2(tmp_path):
    code = "import knet_command, sys; knet_command.main(sys.argv[1:]); print({'torch', 'knet_d2'} & set(sys.modules))"
    for option, expected in (("--help", "usage: knet COMMAND"), ("--version", VERSION)):
        command = [sys.executable, "-c", code, option]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert printed.startswith(expected) and printed.endswith("\nset()\n")


def test_custom_entry_is_not_needed_for_a_config(shapes, tmp_path, capsys):  # noqa: F811
    """``knet check --config-file`` is tools/check_dataset.py."""
    entry = custom_entry("coco_instance", str(shapes))
    content = {"MODEL": {"KNET": {"TASK": "instance"}}, "DATASETS": {"CUSTOM": [entry], "TRAIN": [entry["name"]]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "DATASETS": {**content["DATASETS"], "TEST": []}}))
    assert knet_command.main(["check", "--config-file", str(tmp_path / "config.yaml")]) == 0
    assert f"{entry['name']}: 4 images" in capsys.readouterr().out


def test_config_files_of_the_package_have_the_names_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config_file("configs/shapes/panoptic.yaml") == get_config_file("shapes/panoptic.yaml")
    with pytest.raises(ConfigError, match="configs/fly.yaml: there is no such config file. Those of"):
        find_config_file("configs/fly.yaml")
    own = Path("configs/shapes/panoptic.yaml")
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config_file(str(own)) == str(own)


def test_a_reader_that_ends_is_no_error():
    command = f"{sys.executable} -m knet_command docs CONFIG | head -1"
    found = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("# Config options\n", "")


def test_a_check_leaves_the_folder_of_a_training_run_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = _root(tmp_path)
    write_tool(root, "VIA 2", "x")
    arguments = ["--data", str(root)]
    run = use_data(parse(train.get_parser(), arguments))
    assert run == os.path.join("output", root.name) and os.listdir(run) == ["data_config.yaml"]
    Path(run, "data_config.yaml").write_text("as the run left it")
    assert knet_command.main(["check", *arguments]) == 0
    assert Path(run, "data_config.yaml").read_text() == "as the run left it"
    assert {"data_config.yaml", "report.json"} < set(os.listdir(os.path.join(run, "check")))
