"""What knet_d2.data.check finds in damaged data sets, and that it finds nothing in whole ones."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml
from data_helpers import custom_entry, data_cfg, unique_name
from dataset_damages import DAMAGES, ERROR, IMAGE, SIZE, make_damage
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from knet_d2.data.check import KINDS, check_datasets
from knet_d2.data.shapes import write_shapes
from knet_d2.programs import check_dataset

TASKS = {"coco_instance": "instance", "coco_panoptic": "panoptic", "sem_seg": "semantic"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=6, seed=30, size=SIZE)
    return folder


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, str(tmp_path / "copy"))


def check(*entries, test=(), task=None):
    cfg = data_cfg(task or TASKS[entries[0]["type"]], custom=(*entries, *test), resolve=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (tuple(x["name"] for x in part) for part in (entries, test))
    return check_datasets(cfg)


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
    assert report.failed == (damage.level == ERROR)
    assert {fault.kind for fault in report.faults} <= {kind, *damage.also}


def test_names_of_damages_are_kinds_of_faults():
    assert {name.split(":")[0] for name in DAMAGES} <= set(KINDS)


@pytest.mark.parametrize("kind", TASKS)
def test_whole_data_has_no_faults(pristine, kind):
    report = check(custom_entry(kind, pristine))
    assert report.faults == [] and not report.failed


def test_counts(pristine):
    """Counts equal those computed from the annotations of the JSON and from the pixels of the label maps."""
    with open(os.path.join(pristine, "instances.json")) as f:
        content = json.load(f)
    instances, panoptic, labels = (check(custom_entry(kind, pristine)).datasets[0] for kind in TASKS)
    assert instances.num_images == panoptic.num_images == labels.num_images == 6
    for row, category in zip(instances.table, content["categories"], strict=True):
        of_class = [x for x in content["annotations"] if x["category_id"] == category["id"]]
        plain = [x for x in of_class if not x["iscrowd"]]
        assert row == {
            "class": category["name"],
            "images": len({x["image_id"] for x in plain}),
            "instances": len(plain),
            "small": sum(x["area"] < 1024 for x in plain),
            "medium": sum(1024 <= x["area"] < 9216 for x in plain),
            "large": 0,
            "crowds": len(of_class) - len(plain),
        }
        same = next(x for x in panoptic.table if x["class"] == category["name"])
        assert {**same, **row, "instances": same["segments"]} == {**same, "instances": len(plain)}
    assert sum(row["crowds"] for row in instances.table) == 1
    maps = [np.array(Image.open(os.path.join(pristine, "semantic", f"{i:06d}.png"))) for i in range(6)]
    for i, row in enumerate(labels.table):
        assert row["images"] == sum((x == i).any() for x in maps)
        assert row["% of pixels"] == pytest.approx(
            100 * sum((x == i).sum() for x in maps) / sum((x < 255).sum() for x in maps)
        )
    ignored = 100 * np.mean(np.stack(maps) == 255)
    assert labels.summary == f"{ignored:.1f} % of the pixels ignored" and ignored > 1


def test_masks_of_0_and_255(root):
    """The usual masks of one object class: 255 is ignored unless the config says otherwise."""
    for name in os.listdir(os.path.join(root, "semantic")):
        path = os.path.join(root, "semantic", name)
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels < 4, 255, 0).astype(np.uint8)).save(path)
    entry = custom_entry("sem_seg", root, classes=["background", "object"])
    assert [fault.kind for fault in check(entry).faults] == ["only one class"]
    single = custom_entry("sem_seg", root, classes=["object"], label_values=[255], ignore=[0])
    assert [fault.kind for fault in check(single).faults] == ["only one class"]
    assert not check({**entry, "name": "masks_as_they_are", "ignore": [], "label_values": [0, 255]}).faults


def test_what_is_wrong_between_training_and_validation(root, tmp_path):
    other = str(tmp_path / "other")
    write_shapes(other, num_images=6, seed=34, size=SIZE)
    train, test = custom_entry("sem_seg", root), custom_entry("sem_seg", other)
    assert check(train, test=[test]).faults == []
    names = [*test["classes"][1:], test["classes"][0]]
    (fault,) = check(train, test=[custom_entry("sem_seg", other, classes=names)]).faults
    assert fault.kind == "other classes" and "class 0 is 'circle' in one and 'square' in the other" in fault.what
    shutil.copyfile(os.path.join(root, IMAGE), os.path.join(other, "images", "000003.jpg"))
    (fault,) = check(train, test=[test]).faults
    assert fault.kind == "training image in validation"
    assert fault.file.endswith("other/images/000003.jpg") and IMAGE in fault.what
    # Two of Roboflow's versions of one photo, with other pixels and other labels
    names = ["p_jpg.rf.0123456789abcdef.jpg", "p_jpg.rf.fedcba9876543210.jpg"]
    for folder, name in zip((root, other), names):
        for kind, ending in (("images", ".jpg"), ("semantic", ".png")):
            new = os.path.splitext(name)[0] + ending
            os.rename(os.path.join(folder, kind, "000004" + ending), os.path.join(folder, kind, new))
    (fault,) = [x for x in check(train, test=[test]).faults if "version of the same photo" in x.what]
    assert fault.file.endswith(names[1]) and names[0] in fault.what
    # To try out whether a model can learn its training set is no mistake
    assert check(train, test=[train]).faults == []


def test_test_data_may_lack_classes_and_annotations(root):
    for kind, key in (("coco_instance", "json"), ("coco_panoptic", "panoptic_json")):
        train = custom_entry(kind, root)
        with open(train[key]) as f:
            content = json.load(f)
        content["images"] = [{"id": 1, "file_name": "new.jpg", "height": 10, "width": 20}]
        Image.new("RGB", (20, 10)).save(os.path.join(root, "images", "new.jpg"))
        test = {**train, "name": unique_name("test"), key: os.path.join(root, "test.json")}
        for left_out in ("annotations", "categories"):
            content.pop(left_out)
            with open(test[key], "w") as f:
                json.dump(content, f)
            faults = check(train, test=[test]).faults
            assert [fault.kind for fault in faults] == ([] if left_out == "annotations" else ["missing key"]), faults


def _edit(path, edit):
    with open(path) as f:
        content = json.load(f)
    edit(content)
    with open(path, "w") as f:
        json.dump(content, f)


@pytest.mark.parametrize("kind, file", [("coco_instance", "instances.json"), ("coco_panoptic", "panoptic.json")])
def test_nothing_annotated(root, kind, file):
    """In training and in validation; a JSON that lists images for prediction only has no list of annotations."""
    train, key = custom_entry(kind, root), "json" if kind == "coco_instance" else "panoptic_json"
    empty = shutil.copyfile(os.path.join(root, file), os.path.join(root, "empty.json"))
    _edit(empty, lambda content: content.update(annotations=[]))
    alone, beside = ({**train, "name": unique_name("empty"), key: empty} for _ in range(2))
    for report in (check(alone), check(train, test=[beside])):
        faults = [x for x in report.faults if x.kind != "training image in validation"]
        assert [(x.kind, x.file) for x in faults] == [("no annotations", empty)]


def test_panoptic_maps_without_a_segment(root):
    def paint_void(content):
        for annotation in content["annotations"]:
            annotation["segments_info"] = []
            Image.new("RGB", (SIZE, SIZE)).save(os.path.join(root, "panoptic", annotation["file_name"]))

    _edit(os.path.join(root, "panoptic.json"), paint_void)
    (fault,) = check(custom_entry("coco_panoptic", root)).faults
    assert fault.kind == "no annotations" and fault.what == "has no segment of any class"


def test_rle_whose_size_is_swapped(tmp_path):
    """Without a box that tells which mask is meant, this is an error: the counts fit both sizes."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100, "bbox": [0, 0, 4, 4]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 20}],
        "annotations": [{**annotation, "segmentation": {"size": [20, 10], "counts": [50, 100, 50]}}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (fault,) = check(custom_entry("coco_instance", str(tmp_path))).faults
    assert fault.kind == "bad RLE" and "size is [20, 10], but the image has [10, 20]" in fault.what
    content["annotations"][0]["bbox"] = [5, 0, 10, 10]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (fault,) = check(custom_entry("coco_instance", str(tmp_path))).faults
    assert fault.kind == "read as meant" and "its size is swapped" in fault.what
    content["annotations"][0]["segmentation"]["size"] = [10, 20]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert check(custom_entry("coco_instance", str(tmp_path))).faults == []


def test_label_maps_without_a_label(root):
    for name in os.listdir(os.path.join(root, "semantic")):
        Image.new("L", (SIZE, SIZE), 255).save(os.path.join(root, "semantic", name))
    assert {x.kind for x in check(custom_entry("sem_seg", root)).faults} == {"nothing labelled", "no annotations"}


def test_classes_that_validation_lacks(root, tmp_path):
    other = str(tmp_path / "other")
    write_shapes(other, num_images=6, seed=34, size=SIZE)
    labels = [np.array(Image.open(os.path.join(other, "semantic", f"{i:06d}.png"))) for i in range(6)]
    for i, x in enumerate(labels):
        Image.fromarray(np.where(x == 2, 255, x).astype(np.uint8)).save(os.path.join(other, "semantic", f"{i:06d}.png"))
    _edit(
        os.path.join(other, "instances.json"),
        lambda content: content.update(annotations=[x for x in content["annotations"] if x["category_id"] != 1]),
    )
    train, test = custom_entry("sem_seg", root), custom_entry("sem_seg", other)
    (fault,) = check(train, test=[test]).faults
    assert (fault.kind, fault.where, fault.level) == ("class that is not evaluated", "class 2", "warning")
    assert fault.what == f"{train['classes'][2]!r} has no pixel"
    train, test = custom_entry("coco_instance", root), custom_entry("coco_instance", other)
    (fault,) = check(train, test=[test]).faults
    assert (fault.kind, fault.where) == ("class that is not evaluated", "category 1")


@pytest.mark.parametrize("kind, most", [("coco_instance", 7), ("coco_panoptic", 7)])
def test_more_instances_than_kernels(pristine, kind, most):
    cfg = data_cfg(TASKS[kind], custom=(custom_entry(kind, pristine),), resolve=False)
    report = check_datasets(cfg)
    assert f"at most {most} instances in an image" in report.datasets[0].summary
    cfg.MODEL.KNET.NUM_KERNELS = most - 1
    (fault,) = check_datasets(cfg).faults
    assert fault.kind == "more instances than kernels" and f"{most} instances" in fault.what


def test_photos_turned_by_exif(root):
    """The JSON must state the size after the EXIF rotation; if both sides are equal, only a warning is possible."""
    path = os.path.join(root, IMAGE)
    image = Image.open(path).crop((0, 0, SIZE, SIZE - 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)

    def kinds(height, width):
        entry = custom_entry("coco_instance", root)
        with open(entry["json"]) as f:
            content = json.load(f)
        content["images"][0].update(height=height, width=width)
        content["annotations"] = [x for x in content["annotations"] if x["image_id"] != 1]
        with open(entry["json"], "w") as f:
            json.dump(content, f)
        return [(fault.kind, "before its EXIF tag rotates it" in fault.what) for fault in check(entry).faults]

    assert kinds(SIZE, SIZE - 8) == []
    assert kinds(SIZE - 8, SIZE) == [("image size", True)]
    assert kinds(SIZE, SIZE) == [("image size", False)]


def test_all_faults_are_found_at_once(root):
    names = ("missing image", "bad polygon: odd", "bad RLE: counts", "empty mask", "unused class", "image file twice")
    for name in names:
        make_damage(root, DAMAGES[name])
    report = check(custom_entry("coco_instance", root))
    assert {fault.kind for fault in report.faults} == {name.split(":")[0] for name in names}


def test_a_data_set_registered_in_python_is_read_as_in_training(root):
    name = unique_name("stranger")
    records = [
        {"file_name": os.path.join(root, "images", f"{i:06d}.jpg"), "height": SIZE, "width": SIZE, "annotations": []}
        for i in range(2)
    ]
    records[1]["annotations"] = [{"category_id": 0, "segmentation": [], "bbox": [0, 0, 9, 9]}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["thing"]
    report = check_datasets(data_cfg("instance", name))
    (fault,) = report.faults
    assert (fault.kind, fault.file) == ("unusable", records[1]["file_name"]) and "missing, empty" in fault.what
    records[1]["annotations"] = []
    (fault,) = check_datasets(data_cfg("instance", name)).faults
    assert (fault.kind, fault.file, fault.what) == ("no annotations", name, "has no instance of any class")
    records[1]["annotations"] = [{"category_id": 0, "segmentation": [[1, 1, 9, 1, 9, 9]], "bbox": [1, 1, 8, 8]}]
    MetadataCatalog.get(name).__dict__.pop("thing_classes")
    MetadataCatalog.get(name).thing_classes = ["thing", "unicorn"]
    (fault,) = check_datasets(data_cfg("instance", name)).faults
    assert (fault.kind, fault.where) == ("unused class", "class 1") and "'unicorn' has no instance" in fault.what


def test_text_lists_each_kind_once_and_json_has_everything(root):
    path = os.path.join(root, "instances.json")
    with open(path) as f:
        content = json.load(f)
    for annotation in content["annotations"]:
        annotation["area"] = 0
    content["categories"].append({"id": 9, "name": "unicorn"})
    with open(path, "w") as f:
        json.dump(content, f)
    number = len(content["annotations"])
    report = check(custom_entry("coco_instance", root))
    text = report.text(most=3)
    assert text.count("error: wrong area") == 1 and f"wrong area ({number})" in text
    assert text.count(": annotation ") == 3 and f"... and {number - 3} more" in text
    assert text.index("error:") < text.index("warning: unused class (1)") and KINDS["wrong area"].advice in text
    assert text.endswith(f"{number} errors, 1 warning.")
    listed = json.loads(json.dumps(report.as_json()))
    assert len(listed["faults"]) == number + 1 and listed["faults"][0]["level"] == "error"
    assert listed["datasets"][0]["classes"] == report.datasets[0].table


def test_program(root, tmp_path, capsys):
    """Sheets of ground truth and the report, then exit code 1 and the fault on the console."""
    entry = custom_entry("coco_panoptic", root)
    config = tmp_path / "config.yaml"
    content = {"MODEL": {"KNET": {"TASK": "panoptic"}}, "DATASETS": {"CUSTOM": [entry], "TRAIN": [entry["name"]]}}
    config.write_text(yaml.safe_dump({**content, "DATASETS": {**content["DATASETS"], "TEST": []}}))
    args = check_dataset.get_parser().parse_args(["--config-file", str(config), "--output", str(tmp_path / "out")])
    assert check_dataset.main(args) == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / f"{entry['name']}.jpg"))
    assert sheet.shape[1] == 4 * (336 + 8) + 8 and sheet.std() > 20
    assert json.loads((tmp_path / "out" / "report.json").read_text())["faults"] == []
    assert "0 errors, 0 warnings." in capsys.readouterr().out
    os.remove(os.path.join(root, IMAGE))
    assert check_dataset.main(args) == 1
    assert "missing image (1)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["faults"][0]["kind"] == "missing image"
