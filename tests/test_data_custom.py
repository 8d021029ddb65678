"""Data sets from the config, and errors for bad data, which name the file and the key."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from data_helpers import custom_entry, data_cfg, edit_json, unique_name
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from knet_d2.config import get_knet_cfg
from knet_d2.data import (
    ClassTable,
    build_mapper,
    build_test_loader,
    build_train_loader,
    coco_json,
    custom,
    load_dataset,
    register_custom_datasets,
    resolve_classes,
)
from knet_d2.data.check import check_datasets
from knet_d2.data.files import files_below, read_labels
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES, write_shapes
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import build_evaluators
from knet_d2.tasks import TASKS

DOCS = os.path.join(os.path.dirname(__file__), "..", "docs", "DATASETS.md")
CLASSES = [*THING_CLASSES, *STUFF_CLASSES]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=4, seed=33, size=48)
    return folder


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, str(tmp_path / "copy"))


def _read(task, entry, index=0):
    """What training does to get one example."""
    cfg = data_cfg(task, custom=(entry,))
    return build_mapper(cfg, is_train=True)(load_dataset(entry["name"])[index])


# ---- data sets in the config ----


def test_from_a_yaml_file_and_back(root, tmp_path):
    entries = [custom_entry(kind, root) for kind in ("coco_instance", "coco_panoptic", "sem_seg")]
    cfg = data_cfg("semantic", custom=tuple(entries), resolve=False)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_knet_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.DATASETS.CUSTOM == entries
    register_custom_datasets(again)
    register_custom_datasets(again)
    assert [len(load_dataset(entry["name"])) for entry in entries] == [4] * 3
    types = [MetadataCatalog.get(entry["name"]).evaluator_type for entry in entries]
    assert types == ["coco", "coco_panoptic_seg", "sem_seg"]


def test_classes_come_from_the_files(root):
    counts = {
        "coco_instance": ("instance", (4, 0)),
        "coco_panoptic": ("panoptic", (4, 3)),
        "sem_seg": ("semantic", (0, 7)),
    }
    for kind, (task, expected) in counts.items():
        knet = data_cfg(task, custom=(custom_entry(kind, root),)).MODEL.KNET
        assert (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES) == expected


def test_panoptic_categories_in_any_order_and_images_of_any_type(root):
    def edit(content):
        content["categories"] = content["categories"][::-1]
        content["categories"].append({"id": 2000, "name": "late", "isthing": 1})
        for image in content["images"]:
            path = os.path.join(root, "images", image["file_name"])
            image["file_name"] = image["file_name"].replace(".jpg", ".bmp")
            Image.open(path).save(os.path.join(root, "images", image["file_name"]))
            os.remove(path)

    before = _read("panoptic", custom_entry("coco_panoptic", root))
    edit_json(os.path.join(root, "panoptic.json"), edit)
    entry = custom_entry("coco_panoptic", root)
    after = _read("panoptic", entry)
    table = ClassTable.from_metadata(MetadataCatalog.get(entry["name"]), TASKS["panoptic"])
    assert table.thing_names == [*THING_CLASSES, "late"] and table.stuff_names == list(STUFF_CLASSES)
    # One more thing class: stuff moves on by one.
    stuff = (before["sem_seg"] >= 4) & (before["sem_seg"] != 255)
    assert torch.equal(after["sem_seg"], before["sem_seg"] + stuff.long())
    assert after["file_name"].endswith(".bmp")


def test_label_values_ignored_values_and_a_file_of_classes(root, tmp_path):
    """Values 10, 11, ... with 0 ignored; the same list as one start value and as a list; unused ones are no problem."""
    plain = _read("semantic", custom_entry("sem_seg", root))["sem_seg"]
    for name in os.listdir(os.path.join(root, "semantic")):
        path = os.path.join(root, "semantic", name)
        labels = np.array(Image.open(path)).astype(np.int32)
        Image.fromarray(np.where(labels == 255, 0, labels + 300).astype(np.uint16)).save(path)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n\n")
    classes = str(tmp_path / "classes.txt")
    for values in (300, list(range(300, 307))):
        entry = custom_entry("sem_seg", root, classes=classes, ignore=[0, 9], label_values=values)
        assert torch.equal(_read("semantic", entry)["sem_seg"], plain)
        assert MetadataCatalog.get(entry["name"]).stuff_classes == CLASSES
    order = [306, 305, 304, 303, 302, 301, 300]
    entry = custom_entry("sem_seg", root, classes=CLASSES[::-1], ignore=[0], label_values=order)
    assert torch.equal(_read("semantic", entry)["sem_seg"], plain.where(plain == 255, 6 - plain))


def test_records_are_those_of_detectron2(root):
    """The JSON has annotations of all kinds in random order; the polygons of one annotation have no area."""

    def edit(content):
        first = content["annotations"][0]
        first.update(keypoints=[1, 2, 2, 3, 4, 1], segmentation=[[1, 2, 3, 4]])
        content["annotations"][1].pop("segmentation")
        content["annotations"] += [{**first, "id": 7000, "segmentation": [[0, 0, 9, 0, 9, 9], [1, 1]]}]
        content["annotations"] += [{**first, "id": 7001, "image_id": 999}]
        for key in content:
            content[key] = content[key] if key == "info" else content[key][::-1]

    path = os.path.join(root, "instances.json")
    edit_json(path, edit)
    ours = load_dataset(data_cfg("instance", custom=(custom_entry("coco_instance", root),)).DATASETS.TRAIN[0])
    name = unique_name("detectron2")
    assert ours == load_coco_json(path, os.path.join(root, "images"), name)
    assert MetadataCatalog.get(name).thing_classes == list(THING_CLASSES)


def test_files_are_parsed_once_until_they_change(root, monkeypatch):
    parsed = []

    def mend(content, image_root):
        parsed.append("panoptic.json" if "segments_info" in content["annotations"][0] else "instances.json")
        return []

    monkeypatch.setattr("knet_d2.data.coco_json.mend_coco", mend)
    entry = custom_entry("coco_panoptic", root, instances_json=os.path.join(root, "instances.json"))
    cfg = data_cfg("panoptic", custom=(entry,))
    cfg.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg", "instances"]
    for _ in range(2):
        build_train_loader(cfg)
        build_test_loader(cfg, entry["name"])
        for evaluator in build_evaluators(cfg, entry["name"]):
            evaluator.reset()
        check_datasets(cfg)
    assert sorted(parsed) == ["instances.json", "panoptic.json"]
    edit_json(os.path.join(root, "panoptic.json"), lambda content: content["images"][0].update(width=49))
    assert load_dataset(entry["name"])[0]["width"] == 49


def test_large_files_are_kept_until_the_training_loader_is_made(root, monkeypatch):
    monkeypatch.setattr(coco_json, "_KEPT_BYTES", os.path.getsize(os.path.join(root, "panoptic.json")))
    coco_json.forget_large_files()
    read = [coco_json.read_coco_json(os.path.join(root, f"{x}.json")) for x in ("panoptic", "instances", "panoptic")]
    assert read[0] is not read[2]
    monkeypatch.setattr(coco_json, "_KEPT_BYTES", 10)
    assert coco_json.read_coco_json(os.path.join(root, "panoptic.json")) is read[2]
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    build_train_loader(cfg)
    assert not coco_json._files


def test_links_that_lead_in_circles_are_followed_once(root):
    os.symlink(root, os.path.join(root, "images", "again"))
    os.symlink(os.path.join(root, "semantic"), os.path.join(root, "semantic", "here"))
    os.makedirs(os.path.join(root, "other"))
    os.symlink(os.path.join(root, "other"), os.path.join(root, "images", "other"))
    os.symlink(os.path.join(root, "images"), os.path.join(root, "other", "back"))
    found = dict(files_below(os.path.join(root, "images"), (".jpg",)))
    assert sorted(found) == [f"{i:06d}" for i in range(4)]


def test_palette_images_count_by_index(root):
    plain = _read("semantic", custom_entry("sem_seg", root))["sem_seg"]
    path = os.path.join(root, "semantic", "000000.png")
    image = Image.fromarray(np.array(Image.open(path)), mode="P")
    image.putpalette([(i * 7 + 1) % 256 for i in range(768)])
    image.save(path)
    assert Image.open(path).mode == "P"
    assert torch.equal(_read("semantic", custom_entry("sem_seg", root))["sem_seg"], plain)


def test_label_maps_whose_values_are_no_class_ids(tmp_path):
    labels = np.arange(12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "a.tif")
    assert np.array_equal(read_labels(str(tmp_path / "a.tif")), labels)
    for wrong in (0.5, np.nan):
        labels[1, 1] = wrong
        Image.fromarray(labels).save(tmp_path / "b.tif")
        with pytest.raises(DataError, match="b.tif has values that are no whole numbers"):
            read_labels(str(tmp_path / "b.tif"))
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20).save(tmp_path / "c.png", "JPEG")
    with pytest.raises(DataError, match="c.png can't be read .a JPEG has other values than were saved"):
        read_labels(str(tmp_path / "c.png"))


def test_ignore_value_of_the_config(root):
    cfg = data_cfg("semantic", custom=(custom_entry("sem_seg", root),))
    record = next(r for r in load_dataset(cfg.DATASETS.TRAIN[0]))
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 200
    labels = np.array(Image.open(record["sem_seg_file_name"]))
    labels[:5] = 255
    Image.fromarray(labels).save(record["sem_seg_file_name"])
    assert (build_mapper(cfg, True)(record)["sem_seg"][:5] == 200).all()
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 6
    with pytest.raises(ConfigError, match="IGNORE_VALUE is 6"):
        build_mapper(cfg, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"CUSTOM\[0\]: add the key 'labels'"),
        ({"lables": "x"}, r"CUSTOM\[0\]: unknown key 'lables'"),
        ({"type": "coc"}, r"CUSTOM\[0\]\.type = 'coc'.*coco_instance, coco_panoptic, yolo_seg.*sem_seg"),
        ({"name": ""}, r"CUSTOM\[0\]\.name"),
        ({"images": 3}, r"CUSTOM\[0\]\.images = 3: .*str"),
        ({"classes": []}, "one or more different names"),
        ({"classes": ["a", "a"]}, "one or more different names"),
        ({"classes": [f"c{i}" for i in range(256)]}, "256 names"),
        ({"ignore": [7], "label_values": 1}, r"ignore = \[7\]: use each value only once"),
        ({"label_values": [1, 2]}, "2 values: use one for each of 7 classes"),
        ({"label_values": -1}, "label_values = .*: use integers from 0"),
        ({"name": "coco_2017_val"}, "coco_2017_val.*other content exists"),
    ],
)
def test_wrong_entries_are_config_errors(root, change, message):
    entry = {**custom_entry("sem_seg", root), **change}
    cfg = data_cfg("semantic", resolve=False)
    cfg.DATASETS.CUSTOM = [{key: value for key, value in entry.items() if value is not None}]
    with pytest.raises(ConfigError, match=message):
        register_custom_datasets(cfg)


@pytest.mark.parametrize(
    "task, kind",
    [("instance", "sem_seg"), ("panoptic", "sem_seg"), ("panoptic", "coco_instance"), ("semantic", "coco_instance")],
)
def test_a_data_set_of_another_form_than_the_task_needs(root, task, kind):
    with pytest.raises(ConfigError, match=f"MODEL.KNET.TASK '{task}' needs.*DATASETS.TRAIN"):
        data_cfg(task, custom=(custom_entry(kind, root),))


def test_one_name_for_two_data_sets_is_an_error(root):
    entry = custom_entry("sem_seg", root)
    cfg = data_cfg("semantic", custom=(entry,))
    cfg.DATASETS.CUSTOM = [{**entry, "ignore": [254]}]
    with pytest.raises(ConfigError, match=entry["name"]):
        register_custom_datasets(cfg)
    cfg.DATASETS.CUSTOM = "no list"
    with pytest.raises(ConfigError, match="list of mappings"):
        register_custom_datasets(cfg)


def test_a_model_with_given_classes_needs_no_files(root, caplog):
    entry = custom_entry("coco_instance", os.path.join(root, "gone"))
    cfg = data_cfg("instance", custom=(entry,), resolve=False)
    with pytest.raises(DataError, match="gone/instances.json does not exist"):
        resolve_classes(cfg)
    cfg.MODEL.KNET.NUM_THING_CLASSES = 4
    resolve_classes(cfg)
    assert cfg.MODEL.KNET.THING_CATEGORY_IDS == [0, 1, 2, 3]
    assert "gone/instances.json does not exist" in caplog.text


def test_a_wrong_number_of_classes_is_found_in_custom_data(root):
    cfg = data_cfg("panoptic", custom=(custom_entry("coco_panoptic", root),), resolve=False)
    cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.NUM_STUFF_CLASSES = 4, 2
    with pytest.raises(ConfigError, match="NUM_STUFF_CLASSES is 2, but data set .* has 3"):
        resolve_classes(cfg)


def test_what_the_docs_say_about_entries_is_true():
    with open(DOCS) as f:
        text = f.read()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    configs = [block.get("DATASETS", {}).get("CUSTOM", []) if isinstance(block, dict) else block for block in blocks]
    entries = [entry for config in configs for entry in config]
    assert {entry["type"] for entry in entries} == set(custom.FORMATS)
    for entry in entries:
        custom.checked_entry(entry, "docs")
    rows = [line.split("|")[1:4] for line in text.splitlines() if re.match(r"\|[^|]*\| `\w+` \| (req|opt)", line)]
    documented: dict[str, dict[str, bool]] = {}
    for kind, key, necessity in ([cell.strip(" `") for cell in row] for row in rows):
        kind = kind or next(reversed(documented))
        documented.setdefault(kind, {})[key] = necessity == "required"
    expected = {"all": custom.COMMON_KEYS, **{kind: of_type.keys for kind, of_type in custom.FORMATS.items()}}
    assert documented == {
        kind: {key: required for key, (required, _) in keys.items()} for kind, keys in expected.items()
    }


# ---- bad data ----


def _damage_png(path, edit):
    array = np.array(Image.open(path))
    Image.fromarray(edit(array)).save(path)


def _truncate(path):
    size = os.path.getsize(path)
    with open(path, "r+b") as f:
        f.truncate(size // 2)


def _remove_segment(content):
    content["annotations"][0]["segments_info"].pop()


def _add_segment(content):
    content["annotations"][0]["segments_info"].append({"id": 77, "category_id": 11, "iscrowd": 0})


def _other_size(content):
    content["images"][0]["width"] = 50


def _unknown_category(content):
    annotation = content["annotations"][0]
    annotation.get("segments_info", [annotation])[0]["category_id"] = 999


def _overwrite(path):
    with open(path, "w") as f:
        f.write("no image")


INSTANCE, PANOPTIC, SEMANTIC = ("instance", "coco_instance"), ("panoptic", "coco_panoptic"), ("semantic", "sem_seg")
IMAGE, SEGMENTS, LABELS = "images/000000.jpg", "panoptic/000000.png", "semantic/000000.png"
# What is damaged -> (task and type of data set, file, damage, what is said).
DAMAGES = {
    "missing image": (INSTANCE, IMAGE, os.remove, "Image .*000000.jpg does not exist"),
    "truncated image": (SEMANTIC, IMAGE, _truncate, "Image .*000000.jpg can't be read"),
    "image that is none": (PANOPTIC, IMAGE, _overwrite, "Image .*000000.jpg can't be read"),
    "image of another size": (INSTANCE, "instances.json", _other_size, "000000.jpg.*48, 48.*50, 48"),
    "missing instances": (INSTANCE, "instances.json", os.remove, "annotation file .*instances.json does not exist"),
    "truncated instances": (INSTANCE, "instances.json", _truncate, "instances.json: is not valid JSON"),
    "no categories": (INSTANCE, "instances.json", lambda c: c.pop("categories"), "instances.json: lacks"),
    "category of an instance": (INSTANCE, "instances.json", _unknown_category, "instances.json: .*category_id 999"),
    "missing panoptic JSON": (PANOPTIC, "panoptic.json", os.remove, "annotation file .*panoptic.json does not exist"),
    "truncated panoptic JSON": (PANOPTIC, "panoptic.json", _truncate, "panoptic.json: is not valid JSON"),
    "category of a segment": (PANOPTIC, "panoptic.json", _unknown_category, "panoptic.json: .*category_id 999"),
    "no isthing": (
        PANOPTIC,
        "panoptic.json",
        lambda c: c["categories"][0].pop("isthing"),
        "panoptic.json: .*'isthing'",
    ),
    "unknown image": (PANOPTIC, "panoptic.json", lambda c: c["images"].pop(0), "panoptic.json: .* has image_id 1,"),
    "missing PNG": (PANOPTIC, SEGMENTS, os.remove, "Panoptic PNG .*000000.png does not exist"),
    "truncated PNG": (PANOPTIC, SEGMENTS, _truncate, "Panoptic PNG .*000000.png can't be read"),
    "PNG of another size": (PANOPTIC, SEGMENTS, lambda a: a[:40], "000000.png is 48 x 40 .*000000.jpg is 48 x 48"),
    "id not in JSON": (PANOPTIC, "panoptic.json", _remove_segment, "000000.png has segment id [0-9]+, which its JSON"),
    "id not in PNG": (PANOPTIC, "panoptic.json", _add_segment, "000000.png has segment id 77, which the PNG lacks"),
    "missing labels": (SEMANTIC, LABELS, os.remove, "1 of 4 images .*no label map.*000000.jpg.*000000.png"),
    "missing label folder": (SEMANTIC, "semantic", shutil.rmtree, "semantic: .*does not exist"),
    "labels of another size": (SEMANTIC, LABELS, lambda a: a[:, :40], "000000.png is 40 x 48 .*000000.jpg is 48 x 48"),
    "label out of range": (SEMANTIC, LABELS, lambda a: np.where(a == a[0, 0], 9, a), "000000.png holds the value 9"),
    "labels in colour": (SEMANTIC, LABELS, lambda a: np.stack([a] * 3, -1), "000000.png is a colour image"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_data_error_that_names_the_file(root, damage):
    (task, kind), name, change, message = DAMAGES[damage]
    path = os.path.join(root, name)
    if change in (os.remove, shutil.rmtree, _truncate, _overwrite):
        change(path)
    elif name.endswith(".json"):
        edit_json(path, change)
    else:
        _damage_png(path, change)
    with pytest.raises(DataError, match=message):
        _read(task, custom_entry(kind, root))


@pytest.mark.parametrize("segmentation", [None, [], {"size": [48, 48]}, {"size": [48, 40], "counts": [48 * 40]}, "x"])
def test_unusable_segmentations_name_image_and_annotation(root, segmentation):
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    record["annotations"] = [{"category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": segmentation}]
    with pytest.raises(DataError, match=r"000000\.jpg.*category_id 2, bbox \[1, 2, 3, 4\]"):
        build_mapper(cfg, True)(record)


def test_bitmask_annotations(root):
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    mask = np.zeros((48, 48), bool)
    mask[3:9, 5:20] = True
    record = {**load_dataset(cfg.DATASETS.TRAIN[0])[0], "annotations": [{"category_id": 1, "segmentation": mask}]}
    assert torch.equal(build_mapper(cfg, True)(record)["instances"].gt_masks.tensor, torch.from_numpy(mask[None]))


def test_a_category_outside_the_models_range(root):
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    record["annotations"] = [{"category_id": 4, "segmentation": [[0, 0, 9, 0, 9, 9]]}]
    with pytest.raises(DataError, match=r"000000\.jpg have category_id 4 .*NUM_THING_CLASSES"):
        build_mapper(cfg, True)(record)


def test_a_data_set_of_another_kind_than_the_task(root):
    cfg = data_cfg("semantic", custom=(custom_entry("sem_seg", root),))
    cfg.MODEL.KNET.TASK = "panoptic"
    with pytest.raises(DataError, match="000000.jpg has no ground truth for MODEL.KNET.TASK 'panoptic'"):
        build_mapper(cfg, True)(load_dataset(cfg.DATASETS.TRAIN[0])[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_raise_the_same_error_with_and_without_workers(root, workers):
    entry = custom_entry("coco_instance", root)
    cfg = data_cfg("instance", custom=(entry,))
    cfg.DATALOADER.NUM_WORKERS = workers
    os.remove(os.path.join(root, IMAGE))
    for build in (build_train_loader, lambda cfg: build_test_loader(cfg, entry["name"])):
        with pytest.raises(DataError) as caught:
            for _, _ in zip(range(4), build(cfg), strict=False):
                pass
        message = str(caught.value)
        assert message.startswith("Image ") and "000000.jpg does not exist" in message and "\n" not in message


def test_an_error_of_a_strangers_loader_names_the_data_set():
    name = unique_name("stranger")

    def load():
        raise RuntimeError("out of luck")

    DatasetCatalog.register(name, load)
    with pytest.raises(DataError, match=f"{name} can't be read: RuntimeError: out of luck"):
        load_dataset(name)
    empty = unique_name("stranger")
    DatasetCatalog.register(empty, list)
    with pytest.raises(DataError, match=f"{empty} has no images"):
        load_dataset(empty)
