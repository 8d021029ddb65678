"""Class tables, the mapper and the loaders."""

import itertools
import json
import os
import random

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg, unique_name
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_panoptic, register_coco_panoptic_separated
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils import comm
from PIL import Image

from knet_d2.data import (
    ClassTable,
    KNetDatasetMapper,
    build_mapper,
    build_test_loader,
    build_train_loader,
    load_dataset,
    resolve_classes,
    with_classes,
)
from knet_d2.data.augmentation import QuarterTurns, build_augmentations
from knet_d2.data.classes import class_table, has_classes
from knet_d2.data.repeat_factors import repeat_factors
from knet_d2.data.sampler import TrainingBatchSampler
from knet_d2.data.segmentation import segment_index
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES, write_shapes
from knet_d2.errors import ConfigError, DataError
from knet_d2.tasks import TASKS

T_NUM, S_NUM = len(THING_CLASSES), len(STUFF_CLASSES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=13, seed=21, size=64)
    return folder


@pytest.fixture(scope="module")
def entries(root):
    return {kind: custom_entry(kind, root) for kind in ("coco_instance", "coco_panoptic", "sem_seg")}


@pytest.fixture(scope="module")
def separated(root):
    """The shapes as Detectron2's "separated" registration: instances, and a label map with 0 = things."""
    folder = os.path.join(root, "separated")
    os.makedirs(folder)
    for name in os.listdir(os.path.join(root, "semantic")):
        labels = np.array(Image.open(os.path.join(root, "semantic", name))).astype(int)
        labels = np.where(labels == 255, 255, (labels - T_NUM + 1).clip(min=0))
        Image.fromarray(labels.astype(np.uint8)).save(os.path.join(folder, name))
    name = unique_name("shapes")
    metadata = {
        "thing_classes": list(THING_CLASSES),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(T_NUM)},
        "stuff_classes": ["things", *STUFF_CLASSES],
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{11 + i: 1 + i for i in range(S_NUM)}},
    }
    paths = [os.path.join(root, x) for x in ("images", "panoptic", "panoptic.json", "separated", "instances.json")]
    register_coco_panoptic_separated(name, metadata, *paths)
    return name + "_separated"


# ---- classes ----


@pytest.mark.parametrize(
    ("name", "task", "things", "stuff", "stuff_ids"),
    [
        ("coco_2017_val", "instance", 80, 0, []),
        ("coco_2017_val_panoptic", "instance", 80, 0, []),
        ("coco_2017_val_panoptic", "panoptic", 80, 53, list(range(80, 133))),
        ("coco_2017_val_panoptic_separated", "panoptic", 80, 53, list(range(1, 54))),
        ("coco_2017_val_panoptic", "semantic", 0, 133, list(range(133))),
        ("ade20k_sem_seg_val", "semantic", 0, 150, list(range(150))),
        ("cityscapes_fine_panoptic_val", "panoptic", 8, 11, list(range(11))),
        ("cityscapes_fine_instance_seg_val", "instance", 8, 0, []),
        ("shapes_panoptic_val", "panoptic", 4, 3, [4, 5, 6]),
        ("shapes_semantic_val", "semantic", 0, 7, list(range(7))),
    ],
)
def test_class_table_of_built_in_data_sets(name, task, things, stuff, stuff_ids):
    table = ClassTable.from_metadata(MetadataCatalog.get(name), TASKS[task])
    assert (len(table.thing_names), len(table.stuff_names)) == (things, stuff)
    assert table.stuff_category_ids == stuff_ids
    first_thing = {"cityscapes_fine_panoptic_val": 11}.get(name, 0)
    assert table.thing_category_ids == list(range(first_thing, first_thing + things))


def test_class_table_names_belong_to_their_ids():
    standard = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val_panoptic"), TASKS["panoptic"])
    assert standard.thing_names[0] == "person" and standard.thing_names[79] == "toothbrush"
    assert standard.stuff_names[0] == "banner" and standard.stuff_names[-1] == "rug-merged"
    separated = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val_panoptic_separated"), TASKS["panoptic"])
    assert separated.stuff_names[0] == "banner" and "things" not in separated.stuff_names
    cityscapes = ClassTable.from_metadata(MetadataCatalog.get("cityscapes_fine_panoptic_val"), TASKS["panoptic"])
    assert cityscapes.thing_names[0] == "person" and cityscapes.stuff_names[0] == "road"


def test_class_table_with_ids_out_of_order():
    metadata = Metadata(
        name="x",
        thing_classes=["a", "b", "c", "d"],
        stuff_classes=["a", "b", "c", "d"],
        thing_dataset_id_to_contiguous_id={9: 3, 4: 1},
        stuff_dataset_id_to_contiguous_id={7: 2, 5: 0},
    )
    assert ClassTable.from_metadata(metadata, TASKS["panoptic"])[:2] == (["b", "d", "a", "c"], [1, 3, 0, 2])


def test_class_table_says_which_classes_are_missing():
    with pytest.raises(ConfigError, match=r"coco_2017_val .*stuff_classes.*'semantic'"):
        ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val"), TASKS["semantic"])


def test_resolve_classes_fills_and_is_idempotent(entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],), resolve=False)
    for _ in range(2):
        resolve_classes(cfg)
        knet = cfg.MODEL.KNET
        assert (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES) == (T_NUM, S_NUM)
        assert (knet.THING_CATEGORY_IDS, knet.STUFF_CATEGORY_IDS) == ([0, 1, 2, 3], [4, 5, 6])


def test_a_thing_and_a_stuff_class_with_one_id_are_told_apart():
    """As in Detectron2's "separated" registration, where "things" of the label map have the id 0."""
    table = ClassTable(["cup", "bowl", "table", "wall"], [1, 2, 1, 2], [(0, 0, 0)] * 4, 2)
    assert [table.label_of(i, isthing) for isthing in (True, False) for i in (1, 2)] == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        table.label_of(0, False)


def test_resolved_classes_stay_and_no_data_set_is_read(entries, monkeypatch):
    """The model, the trainer and the predictor resolve classes only if they are not resolved yet."""
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],), resolve=False)
    cfg.freeze()
    resolved = with_classes(cfg)
    assert not has_classes(cfg) and has_classes(resolved) and resolved.is_frozen()
    monkeypatch.setattr("knet_d2.data.classes.resolve_classes", None)
    assert with_classes(resolved) is resolved


def test_names_are_of_a_data_set_that_has_the_models_ids(entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    assert class_table(cfg).names == [*THING_CLASSES, *STUFF_CLASSES]
    cfg.MODEL.KNET.STUFF_CATEGORY_IDS = [1, 2, 3]
    assert class_table(cfg).names == ["0", "1", "2", "3", "1", "2", "3"]


@pytest.mark.parametrize(
    ("task", "name", "key", "value"),
    [
        ("instance", "coco_2017_val", "NUM_THING_CLASSES", 81),
        ("panoptic", "coco_2017_val_panoptic", "NUM_STUFF_CLASSES", 54),
        ("panoptic", "coco_2017_val_panoptic", "STUFF_CATEGORY_IDS", list(range(1, 54))),
        ("semantic", "ade20k_sem_seg_val", "NUM_STUFF_CLASSES", 151),
        ("semantic", "ade20k_sem_seg_val", "NUM_THING_CLASSES", 1),
    ],
)
def test_numbers_that_disagree_with_the_data_are_errors(task, name, key, value):
    cfg = data_cfg(task, name, resolve=False)
    cfg.MODEL.KNET[key] = value
    with pytest.raises(ConfigError, match=rf"MODEL\.KNET\.{key} is .*{name}"):
        resolve_classes(cfg)


def test_data_sets_that_disagree_are_an_error():
    cfg = data_cfg("panoptic", "coco_2017_train_panoptic", resolve=False)
    cfg.DATASETS.TEST = ("shapes_panoptic_val",)
    with pytest.raises(ConfigError, match="coco_2017_train_panoptic has 80 .* shapes_panoptic_val has 4 thing"):
        resolve_classes(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val_panoptic_separated",)
    with pytest.raises(ConfigError, match="coco_2017_val_panoptic_separated"):
        resolve_classes(cfg)


def test_classes_without_a_data_set():
    cfg = data_cfg("panoptic", "a_data_set_of_another_machine", resolve=False)
    with pytest.raises(ConfigError, match="a_data_set_of_another_machine"):
        resolve_classes(cfg)
    cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.NUM_STUFF_CLASSES = 3, 2
    resolve_classes(cfg)
    assert (cfg.MODEL.KNET.THING_CATEGORY_IDS, cfg.MODEL.KNET.STUFF_CATEGORY_IDS) == ([0, 1, 2], [3, 4])
    empty = data_cfg("instance", resolve=False)
    with pytest.raises(ConfigError, match="NUM_THING_CLASSES.*DATASETS.TRAIN"):
        resolve_classes(empty)
    cfg.DATASETS.TEST = ({"name": "shapes"},)
    with pytest.raises(ConfigError, match="DATASETS.TEST has {'name': 'shapes'} in it"):
        resolve_classes(cfg)


# ---- panoptic PNGs ----


def test_segment_index_against_one_comparison_per_segment():
    rng = np.random.default_rng(0)
    ids = rng.choice(256**3, 12, replace=False)
    ids[0] = 0
    image = rng.choice(ids, (40, 30))
    known = [int(i) for i in ids[1:9]]
    rgb = np.stack([image % 256, image // 256 % 256, image // 65536], axis=-1).astype(np.uint8)
    index = segment_index(rgb, known)
    for position, segment in enumerate(known):
        np.testing.assert_array_equal(index == position, image == segment)
    np.testing.assert_array_equal(index == len(known), image == 0)
    np.testing.assert_array_equal(index == len(known) + 1, np.isin(image, ids[9:]))
    assert (segment_index(np.zeros((2, 3, 3), np.uint8), []) == 0).all()


def test_panoptic_examples_against_a_slow_reference(root, entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    mapper = build_mapper(cfg, is_train=True)
    with open(os.path.join(root, "panoptic.json")) as f:
        content = json.load(f)
    order = [category["id"] for category in content["categories"]]
    crowds = 0
    for record, annotation in zip(load_dataset(cfg.DATASETS.TRAIN[0]), content["annotations"], strict=True):
        example = mapper(record)
        png = np.array(Image.open(os.path.join(root, "panoptic", annotation["file_name"]))).astype(int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        sem_seg, masks, classes = np.full(ids.shape, 255), [], []
        for segment in annotation["segments_info"]:
            model_class = order.index(segment["category_id"])
            crowds += segment["iscrowd"]
            if not segment["iscrowd"]:
                sem_seg[ids == segment["id"]] = model_class
            if not segment["iscrowd"] and model_class < T_NUM:
                masks.append(ids == segment["id"])
                classes.append(model_class)
        np.testing.assert_array_equal(example["sem_seg"], sem_seg)
        assert example["instances"].gt_classes.tolist() == classes
        assert example["instances"].gt_classes.dtype == example["sem_seg"].dtype == torch.int64
        np.testing.assert_array_equal(example["instances"].gt_masks.tensor, np.array(masks).reshape(-1, *ids.shape))
        assert example["image"].shape == (3, *ids.shape) and example["image"].dtype == torch.uint8
        assert (example["height"], example["width"]) == ids.shape
    assert crowds > 0


# ---- mapper ----


def _mapper(cfg, augmentations, **changes):
    return KNetDatasetMapper(**{**KNetDatasetMapper.from_config(cfg, True), "augmentations": augmentations, **changes})


def _examples(cfg, augmentations, **changes):
    mapper = _mapper(cfg, augmentations, **changes)
    return [mapper(record) for name in cfg.DATASETS.TRAIN for record in load_dataset(name)]


@pytest.mark.parametrize("kind", ["coco_panoptic", "sem_seg", "coco_instance"])
def test_flip_and_crop_move_image_masks_and_labels_together(entries, kind):
    task = {"coco_panoptic": "panoptic", "sem_seg": "semantic", "coco_instance": "instance"}[kind]
    cfg = data_cfg(task, custom=(entries[kind],))
    plain = _examples(cfg, [T.NoOpTransform()])
    flipped = _examples(cfg, [T.HFlipTransform(64)])
    cropped = _examples(cfg, [T.CropTransform(9, 5, 40, 50)])
    compared = 0
    for a, b, c in zip(plain, flipped, cropped, strict=True):
        for key in {"image", "sem_seg"} & set(a):
            assert torch.equal(b[key], a[key].flip(-1))
            assert torch.equal(c[key], a[key][..., 5:55, 9:49])
        if "instances" not in a:
            continue
        masks = a["instances"].gt_masks.tensor
        # Polygons are drawn after they were moved, which can turn single pixels of their edges.
        tolerance = 0 if kind == "coco_panoptic" else 0.02
        _assert_masks_close(b["instances"].gt_masks.tensor, masks.flip(-1), tolerance)
        inside = masks[:, 5:55, 9:49]
        keep = inside.flatten(1).any(1)
        if kind == "coco_panoptic":
            assert torch.equal(c["instances"].gt_classes, a["instances"].gt_classes[keep])
            _assert_masks_close(c["instances"].gt_masks.tensor, inside[keep], tolerance)
            compared += int((~keep).sum())
        else:
            joint, expected = c["instances"].gt_masks.tensor.any(0), inside.any(0)
            assert (joint != expected).float().mean() <= 0.02
    assert kind != "coco_panoptic" or compared > 0, "no mask was emptied by the crop"


def _assert_masks_close(masks, expected, tolerance):
    assert masks.shape == expected.shape
    different = (masks != expected).flatten(1).sum(1)
    assert (different <= tolerance * 64 * 8).all(), different


def test_labels_and_segments_resize_with_the_image(entries):
    size = (96, 80)
    resize = T.ResizeTransform(64, 64, *size)
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    semantic = data_cfg("semantic", custom=(entries["sem_seg"],))
    for a, b in zip(_examples(cfg, [resize]), _examples(semantic, [resize]), strict=True):
        assert a["image"].shape[1:] == a["sem_seg"].shape == b["sem_seg"].shape == size
        assert a["instances"].image_size == size
        labelled = a["sem_seg"] != 255
        # The semantic labels have the crowds, which are void in panoptic training.
        assert torch.equal(a["sem_seg"][labelled], b["sem_seg"][labelled])
        for mask, label in zip(a["instances"].gt_masks.tensor, a["instances"].gt_classes, strict=True):
            assert (a["sem_seg"][mask] == label).all()


def test_instances_are_those_of_the_panoptic_segments(entries):
    """Polygons, compressed and uncompressed RLE, and panoptic PNGs give the same masks; crowds are left out."""
    panoptic = _examples(data_cfg("panoptic", custom=(entries["coco_panoptic"],)), [T.NoOpTransform()])
    instance = _examples(data_cfg("instance", custom=(entries["coco_instance"],)), [T.NoOpTransform()])
    for a, b in zip(panoptic, instance, strict=True):
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)
        assert "sem_seg" not in b


def test_separated_registration_equals_standard(entries, separated):
    standard = _examples(data_cfg("panoptic", custom=(entries["coco_panoptic"],)), [T.HFlipTransform(64)])
    cfg = data_cfg("panoptic", separated)
    assert cfg.MODEL.KNET.STUFF_CATEGORY_IDS == [1, 2, 3]
    for a, b in zip(standard, _examples(cfg, [T.HFlipTransform(64)]), strict=True):
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        _assert_masks_close(b["instances"].gt_masks.tensor, a["instances"].gt_masks.tensor, 0.02)
        expected = torch.where(a["sem_seg"] < T_NUM, torch.full_like(a["sem_seg"], 255), a["sem_seg"])
        assert torch.equal(b["sem_seg"], expected)


def test_semantic_and_instance_models_read_panoptic_data_sets(root, entries):
    panoptic, labels = entries["coco_panoptic"], entries["sem_seg"]
    from_png = _examples(data_cfg("semantic", custom=(panoptic,)), [T.NoOpTransform()])
    from_labels = _examples(data_cfg("semantic", custom=(labels,)), [T.NoOpTransform()])
    for a, b in zip(from_png, from_labels, strict=True):
        assert torch.equal(a["sem_seg"], b["sem_seg"])
    for example in _examples(data_cfg("instance", custom=(panoptic,)), [T.NoOpTransform()]):
        assert "sem_seg" not in example and len(example["instances"].gt_classes) == len(example["instances"])


def test_segments_that_do_not_say_what_they_are(entries):
    """The segments of Cityscapes have no "isthing"."""
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    silent = [{k: v for k, v in x.items() if k != "isthing"} for x in record["segments_info"]]
    a, b = (build_mapper(cfg, True)(x) for x in (record, {**record, "segments_info": silent}))
    assert torch.equal(a["sem_seg"], b["sem_seg"]) and len(a["instances"]) > 0
    assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


def test_instance_models_may_have_more_classes_than_a_label_map_holds(entries):
    cfg = data_cfg("instance", custom=(entries["coco_instance"],))
    cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.THING_CATEGORY_IDS = 365, list(range(365))
    assert len(build_mapper(cfg, True)(load_dataset(cfg.DATASETS.TRAIN[0])[0])["instances"]) > 0
    cfg.MODEL.KNET.TASK = "panoptic"
    with pytest.raises(ConfigError, match="365 classes: learn at most 255"):
        build_mapper(cfg, True)


@pytest.mark.parametrize("labels", [{0: 0, 1: 255}, {0: 255, 1: 0}])
def test_label_maps_of_one_class_are_told_when_training_starts(root, tmp_path, caplog, labels):
    """One case is masks with 0 and 255, where 255 is ignored; the other is one class with all other pixels ignored."""
    for name in os.listdir(os.path.join(root, "semantic")):
        is_thing = np.array(Image.open(os.path.join(root, "semantic", name))) < T_NUM
        Image.fromarray(np.where(is_thing, labels[1], labels[0]).astype(np.uint8)).save(tmp_path / name)
    entry = custom_entry("sem_seg", root, labels=str(tmp_path), classes=["background", "object"])
    build_train_loader(data_cfg("semantic", custom=(entry,)))
    assert f"All labelled pixels of {entry['name']} that were read are of the class background" in caplog.text
    caplog.clear()
    both = {**entry, "name": unique_name("both"), "label_values": [0, 255], "ignore": []}
    build_train_loader(data_cfg("semantic", custom=(both,)))
    assert "All labelled" not in caplog.text


def _add_category(root, file, folder):
    """A copy of a JSON with one more class, which nothing has; returns its path."""
    with open(os.path.join(root, file)) as f:
        content = json.load(f)
    content["categories"].append({"id": 500, "name": "unicorn", "isthing": 1})
    path = os.path.join(folder, file)
    with open(path, "w") as f:
        json.dump(content, f)
    return path


@pytest.mark.parametrize(
    ("kind", "key", "file", "task", "unit"),
    [
        ("coco_instance", "json", "instances.json", "instance", "instance"),
        ("coco_panoptic", "panoptic_json", "panoptic.json", "panoptic", "segment"),
        ("coco_panoptic", "panoptic_json", "panoptic.json", "instance", "instance"),
        ("coco_panoptic", "panoptic_json", "panoptic.json", "semantic", "pixel"),
        ("sem_seg", None, None, "semantic", "pixel"),
    ],
)
def test_classes_that_do_not_occur_are_told_when_training_starts(root, tmp_path, caplog, kind, key, file, task, unit):
    whole = custom_entry(kind, root)
    build_train_loader(data_cfg(task, custom=(whole,)))
    assert "is of the classes" not in caplog.text
    changes = {"classes": [*whole["classes"], "unicorn"]} if key is None else {key: _add_category(root, file, tmp_path)}
    entry = custom_entry(kind, root, **changes)
    build_train_loader(data_cfg(task, custom=(entry,)))
    told = [x.message for x in caplog.records if x.levelname == "WARNING" and "is of the classes" in x.message]
    assert told == [f"No {unit} of data set {entry['name']} is of the classes unicorn."]


def test_crowds_alone_are_no_instances_of_a_class(root, tmp_path, caplog):
    path = _add_category(root, "instances.json", tmp_path)
    with open(path) as f:
        content = json.load(f)
    content["annotations"].append({**content["annotations"][0], "id": 9999, "category_id": 500, "iscrowd": 1})
    with open(path, "w") as f:
        json.dump(content, f)
    build_train_loader(data_cfg("instance", custom=(custom_entry("coco_instance", root, json=path),)))
    assert "is of the classes unicorn." in caplog.text


def test_nothing_labelled_is_told_when_training_starts(root, tmp_path, caplog):
    for name in os.listdir(os.path.join(root, "semantic")):
        Image.new("L", (64, 64), 255).save(tmp_path / name)
    classes = [f"kind {i}" for i in range(12)]
    entry = custom_entry("sem_seg", root, labels=str(tmp_path), classes=classes)
    build_train_loader(data_cfg("semantic", custom=(entry,)))
    (told,) = [x for x in caplog.messages if "is of the classes" in x]
    assert "kind 0, kind 1" in told and "kind 9 and 2 more. Nothing is labelled" in told and "kind 10" not in told


def test_label_maps_are_read_until_all_classes_are_found(root, monkeypatch, caplog):
    """At most a stated number of them, from all parts of the data set; the warning says how many were read."""
    read = []
    from_file = KNetDatasetMapper.label_map_classes
    monkeypatch.setattr(
        KNetDatasetMapper, "label_map_classes", lambda self, x: read.append(x["file_name"]) or from_file(self, x)
    )
    monkeypatch.setattr("knet_d2.data.class_coverage._MOST_LABEL_MAPS", 3)
    names = [*THING_CLASSES, *STUFF_CLASSES, "unicorn"]
    entry = custom_entry("sem_seg", root, classes=names)
    build_train_loader(data_cfg("semantic", custom=(entry,)))
    assert [os.path.basename(x) for x in read] == ["000000.jpg", "000006.jpg", "000012.jpg"]
    (told,) = [x for x in caplog.messages if "is of the classes" in x]
    assert told.startswith(f"No pixel of data set {entry['name']} (3 of 13 label maps are read for this)")
    assert told.endswith("unicorn.")
    read.clear()
    caplog.clear()
    maps = [np.array(Image.open(os.path.join(root, "semantic", f"{i:06d}.png"))) for i in range(13)]
    number = next(n for n in range(1, 14) if len(set(np.concatenate(maps[:n]).flat) - {255}) == len(names) - 1)
    assert number < 13
    monkeypatch.setattr("knet_d2.data.class_coverage._MOST_LABEL_MAPS", 300)
    build_train_loader(data_cfg("semantic", custom=(custom_entry("sem_seg", root),)))
    assert len(read) == number and "is of the classes" not in caplog.text


def test_stuff_is_no_thing_of_a_model_of_many_classes(entries):
    """A model for instances leaves out the stuff of panoptic PNGs, even if 255 is one of its classes."""
    cfg = data_cfg("instance", custom=(entries["coco_panoptic"],))
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    expected = build_mapper(cfg, True)(record)["instances"].gt_classes
    knet = cfg.MODEL.KNET
    knet.NUM_THING_CLASSES, knet.THING_CATEGORY_IDS = 365, [*knet.THING_CATEGORY_IDS, *range(1000, 1365 - T_NUM)]
    assert not all(x["isthing"] for x in record["segments_info"])
    assert torch.equal(build_mapper(cfg, True)(record)["instances"].gt_classes, expected)


def test_an_image_without_instances_has_empty_masks(entries):
    cfg = data_cfg("instance", custom=(entries["coco_instance"],))
    record = {**load_dataset(cfg.DATASETS.TRAIN[0])[0], "annotations": []}
    instances = build_mapper(cfg, True)(record)["instances"]
    assert instances.gt_masks.tensor.shape == (0, 64, 64) and instances.gt_classes.shape == (0,)


def test_the_record_stays_as_it_is(entries):
    for kind, task in (("coco_panoptic", "panoptic"), ("coco_instance", "instance"), ("sem_seg", "semantic")):
        cfg = data_cfg(task, custom=(entries[kind],))
        cfg.INPUT.MIN_SIZE_TRAIN = (80,)
        record = load_dataset(cfg.DATASETS.TRAIN[0])[3]
        before = repr(record)
        build_mapper(cfg, True)(record)
        assert repr(record) == before


def test_test_examples_have_no_ground_truth_and_the_original_size(entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    cfg.INPUT.MIN_SIZE_TEST = 48
    (example,) = next(iter(build_test_loader(cfg, cfg.DATASETS.TRAIN[0])))
    assert example["image"].shape == (3, 48, 48) and (example["height"], example["width"]) == (64, 64)
    assert not {"instances", "sem_seg", "segments_info", "annotations"} & set(example)


def test_images_too_long_to_be_resized_and_wrong_sizes_are_named():
    cfg = data_cfg("semantic", resolve=False)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 8, 16
    (resize,) = build_augmentations(cfg, False)
    assert resize.get_transform(np.zeros((30, 1, 3), np.uint8)).new_w == 1
    with pytest.raises(DataError, match="1 x 40 pixels .* resized to 0 x 16"):
        resize.get_transform(np.zeros((40, 1, 3), np.uint8))
    for sizes in ((), (8, -1), ([8],)):
        cfg.INPUT.MIN_SIZE_TRAIN = sizes
        with pytest.raises(ConfigError, match="INPUT.MIN_SIZE_TRAIN is"):
            build_augmentations(cfg, True)


def test_semantic_padding_and_crop_constraint(entries):
    cfg = data_cfg("semantic", custom=(entries["sem_seg"],))
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [48, 96]
    mapper = build_mapper(cfg, is_train=True)
    example = mapper(load_dataset(cfg.DATASETS.TRAIN[0])[0])
    assert example["image"].shape == (3, 48, 96) and example["sem_seg"].shape == (48, 96)
    assert (example["sem_seg"][:, 64:] == 255).all() and (example["sem_seg"][:, :64] != 255).any()
    mean = torch.tensor([round(x) for x in cfg.MODEL.PIXEL_MEAN], dtype=torch.uint8)[:, None, None]
    assert (example["image"][:, :, 64:] == mean).all()


def test_crop_constraint_keeps_one_class_from_filling_the_crop(entries):
    cfg = data_cfg("semantic", custom=(entries["sem_seg"],))
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [16, 16]
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:] = 1
    image = np.zeros((64, 64, 3), np.uint8)

    def largest_parts(max_area):
        cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = max_area
        (crop,) = (x for x in build_augmentations(cfg, True) if "Crop" in type(x).__name__)
        np.random.seed(0)
        crops = [T.AugInput(image, sem_seg=labels) for _ in range(60)]
        for x in crops:
            crop(x)
        return np.array([np.bincount(x.sem_seg.reshape(-1)).max() / 256 for x in crops])

    assert np.mean(largest_parts(1.0) > 0.75) > 0.5
    # Ten tries find such a crop nearly always.
    assert np.mean(largest_parts(0.75) > 0.75) < 0.3
    cfg.MODEL.KNET.TASK = "panoptic"
    with pytest.raises(ConfigError, match="SINGLE_CATEGORY_MAX_AREA"):
        build_augmentations(cfg, True)


def test_color_augmentation_changes_colours_only(entries):
    pytest.importorskip("detectron2.projects.point_rend")
    cfg = data_cfg("semantic", custom=(entries["sem_seg"],))
    plain = next(iter(build_train_loader(cfg)))
    cfg.INPUT.COLOR_AUG_SSD = True
    colored = next(iter(build_train_loader(cfg)))
    pairs = list(zip(plain, colored, strict=True))
    assert all(torch.equal(a["ground_truth"].labels, b["ground_truth"].labels) for a, b in pairs)
    assert not any(torch.equal(a["image"], b["image"]) for a, b in pairs)


@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_move_pixels_labels_and_polygons_alike(turns):
    turn = QuarterTurns(5, 8, turns)
    image = np.arange(5 * 8 * 6, dtype=np.float32).reshape(5, 8, 6)
    assert np.array_equal(turn.apply_image(image), np.rot90(image, turns))
    box = np.array([[1.0, 2.0], [4.0, 2.0], [4.0, 5.0], [1.0, 5.0]])  # columns 1 to 3, rows 2 to 4
    mask = np.zeros((5, 8), bool)
    mask[2:5, 1:4] = True
    (polygon,) = turn.apply_polygons([box])
    height, width = np.rot90(mask, turns).shape
    turned = polygons_to_bitmask([polygon.flatten()], height, width)
    assert np.array_equal(turned, np.rot90(mask, turns)) and np.array_equal(turn.apply_segmentation(mask), turned)


def test_training_sees_all_quarter_turns_and_testing_none(entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.AUGMENTATIONS = [{"name": "Default"}, {"name": "RandomQuarterTurns"}]
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    mapper = build_mapper(cfg, True)
    np.random.seed(0)
    examples = [mapper(record) for _ in range(40)]
    assert not any("Quarter" in type(x).__name__ for x in build_augmentations(cfg, False))
    cfg.INPUT.AUGMENTATIONS = [{"name": "Default"}]
    plain = build_mapper(cfg, True)(record)
    seen = set()
    for x in examples:
        same = [k for k in range(4) if torch.equal(x["image"], plain["image"].rot90(k, (1, 2)))]
        seen.update(same)
        assert torch.equal(x["sem_seg"], plain["sem_seg"].rot90(same[0]))
        assert torch.equal(x["instances"].gt_masks.tensor, plain["instances"].gt_masks.tensor.rot90(same[0], (1, 2)))
    assert seen == {0, 1, 2, 3}


def test_channel_order_follows_input_format(entries):
    cfg = data_cfg("instance", custom=(entries["coco_instance"],))
    record = load_dataset(cfg.DATASETS.TRAIN[0])[0]
    rgb = build_mapper(cfg, False)(record)["image"]
    cfg.INPUT.FORMAT = "BGR"
    assert torch.equal(build_mapper(cfg, False)(record)["image"], rgb.flip(0))


# ---- sampler and loaders ----


def _batches(sampler, number):
    return list(itertools.islice(sampler, number))


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 1, 1, 1]])
def test_batches_are_a_pure_function_of_seed_and_iteration(groups):
    def sampler(**changes):
        return TrainingBatchSampler(**{"size": 7, "batch_size": 4, "seed": 3, "groups": groups, **changes})

    whole = _batches(sampler(), 20)
    assert _batches(sampler(start_iter=13), 7) == whole[13:]
    assert [sampler().batch(i) for i in reversed(range(20))] == whole[::-1]
    first, second = (_batches(sampler(rank=rank, world_size=2), 20) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert _batches(sampler(seed=4), 20) != whole
    assert [key.position for batch in whole for key in batch] == list(range(80))


def test_every_epoch_has_every_sample_once_in_a_new_order():
    stream = [key.index for batch in _batches(TrainingBatchSampler(size=7, batch_size=2, seed=0), 35) for key in batch]
    epochs = [tuple(stream[i : i + 7]) for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 5


def test_groups_are_not_mixed_and_get_their_share():
    groups = [0] * 9 + [1] * 3 + [2] * 4
    batches = _batches(TrainingBatchSampler(size=16, batch_size=4, seed=0, groups=groups), 160)
    of_batch = []
    for batch in batches:
        (group,) = {groups[key.index] for key in batch}
        of_batch.append(group)
    assert np.abs(np.bincount(of_batch) - 160 * np.array([9, 3, 4]) / 16).max() <= 1
    counts = np.bincount([key.index for batch in batches for key in batch])
    assert np.abs(counts - 40).max() <= 4, "a sample is used more often than others"


FACTORS = np.array([1.0, 2.25, 1.0, 3.0, 1.5, 1.0, 1.0])


@pytest.mark.parametrize("groups", [None, [0, 1, 0, 1, 0, 1, 0]])
def test_repeated_samples_are_a_pure_function_of_seed_and_iteration(groups):
    def sampler(**changes):
        options = {"size": 7, "batch_size": 4, "seed": 3, "groups": groups, "repeat_factors": FACTORS}
        return TrainingBatchSampler(**{**options, **changes})

    whole = _batches(sampler(), 40)
    assert _batches(sampler(start_iter=33), 7) == whole[33:]
    assert [sampler().batch(i) for i in reversed(range(40))] == whole[::-1]
    parts = [_batches(sampler(rank=rank, world_size=4), 40) for rank in range(4)]
    assert [a + b + c + d for a, b, c, d in zip(*parts, strict=True)] == whole
    # Factors of 1 change nothing
    assert _batches(sampler(repeat_factors=np.ones(7)), 40) == _batches(sampler(repeat_factors=None), 40)


@pytest.mark.parametrize("groups", [None, [0, 1, 0, 1, 0, 1, 0]])
def test_samples_are_drawn_as_often_as_their_factors_say(groups):
    sampler = TrainingBatchSampler(size=7, batch_size=5, seed=0, groups=groups, repeat_factors=FACTORS)
    number = 2150  # 1,000 epochs of 10.75 samples on average
    counts = np.bincount([key.index for batch in _batches(sampler, number) for key in batch])
    # One fractional factor has a standard deviation of at most 0.016; the shares of groups are rounded.
    assert np.abs(counts / 1000 - FACTORS).max() < (0.06 if groups is None else 0.15)


def test_repeat_factors_are_detectron2s(entries):
    """Of instances to the last digit; panoptic and semantic data have the same for the same classes."""
    expected = {}
    for task, kind in (("instance", "coco_instance"), ("panoptic", "coco_panoptic"), ("semantic", "sem_seg")):
        cfg = data_cfg(task, custom=(entries[kind],))
        cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.9
        records = load_dataset(entries[kind]["name"])
        factors = repeat_factors(records, cfg)
        examples = [build_mapper(cfg, True)(record) for record in records]
        present = [
            {*x.get("sem_seg", torch.tensor([255])).unique().tolist()} - {255}
            | ({*x["instances"].gt_classes.tolist()} if "instances" in x else set())
            for x in examples
        ]
        share = [np.mean([k in x for x in present]) for k in range(T_NUM + S_NUM)]
        expected = [max([max(1, (0.9 / share[k]) ** 0.5) for k in x], default=1) for x in present]
        assert factors == pytest.approx(expected, rel=1e-6) and factors.max() > 1.1 and factors.min() >= 1
        if task == "instance":
            plain = [{"annotations": [x for x in record["annotations"] if not x["iscrowd"]]} for record in records]
            theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(plain, 0.9)
            assert np.array_equal(factors, theirs.double().numpy())
        indices = [x.index for x in build_train_loader(cfg).batch_sampler.batch(0)]
        direct = TrainingBatchSampler(size=len(records), batch_size=4, seed=7, repeat_factors=factors)
        assert indices == [x.index for x in direct.batch(0)]


def _augmented_cfg(entries, **changes):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (48, 56, 64), "horizontal"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "relative_range", [0.6, 0.6]
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def _digests(batches):
    return [
        [
            (x["file_name"], x["image"].numpy().tobytes(), x["ground_truth"].packed_masks.numpy().tobytes())
            for x in batch
        ]
        for batch in batches
    ]


def _generator_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_training_batches_do_not_depend_on_workers_or_where_the_run_starts(entries):
    cfg = _augmented_cfg(entries)
    states = _generator_states()
    whole = _digests(itertools.islice(build_train_loader(cfg), 6))
    assert _generator_states() == states, "loading disturbs the generators of the training process"
    assert _digests(itertools.islice(build_train_loader(cfg, start_iter=2), 4)) == whole[2:]
    parallel = _digests(itertools.islice(build_train_loader(_augmented_cfg(entries, DATALOADER__NUM_WORKERS=2)), 4))
    assert parallel == whole[:4]
    assert _digests(itertools.islice(build_train_loader(_augmented_cfg(entries, SEED=8)), 1)) != whole[:1]


def test_an_image_is_augmented_differently_in_every_epoch(entries):
    batches = _digests(itertools.islice(build_train_loader(_augmented_cfg(entries)), 13))
    views = {}
    for file_name, image, _ in itertools.chain.from_iterable(batches):
        views.setdefault(file_name, []).append(image)
    assert [len(x) for x in views.values()] == [4] * 13
    assert all(len(set(x)) == 4 for x in views.values())


def test_a_range_of_one_size_is_this_size(entries):
    cfg = data_cfg("panoptic", custom=(entries["coco_panoptic"],))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (48,), "range"
    assert {min(x["image"].shape[1:]) for x in _examples(cfg, build_augmentations(cfg, True))} == {48}


@pytest.mark.parametrize(("option", "axis"), [("horizontal", -1), ("vertical", -2), ("none", None)])
def test_random_flip_flips_half_of_the_images(entries, option, axis):
    cfg = data_cfg("semantic", custom=(entries["sem_seg"],))
    cfg.INPUT.RANDOM_FLIP = option
    plain = {x["file_name"]: x["sem_seg"] for x in _examples(cfg, [T.NoOpTransform()])}
    flipped = []
    for example in itertools.chain.from_iterable(itertools.islice(build_train_loader(cfg), 15)):
        labels = plain[example["file_name"]]
        found = example["ground_truth"].labels
        flipped.append(not torch.equal(found.long(), labels))
        assert found.dtype == torch.uint8 and (not flipped[-1] or torch.equal(found.long(), labels.flip(axis)))
    assert (15 < sum(flipped) < 45) if axis else not any(flipped)


def test_two_processes_share_out_one_batch(entries, monkeypatch):
    cfg = _augmented_cfg(entries)
    whole = _digests(itertools.islice(build_train_loader(cfg), 3))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(_digests(itertools.islice(build_train_loader(cfg), 3)))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(ConfigError, match="IMS_PER_BATCH = 3"):
        build_train_loader(cfg)


def test_aspect_ratio_grouping_uses_the_sizes_in_the_panoptic_json(root):
    """Detectron2's own loader of panoptic data sets leaves the sizes unread."""
    with open(os.path.join(root, "panoptic.json")) as f:
        content = json.load(f)
    content["images"], content["annotations"] = content["images"][:12], content["annotations"][:12]
    for i, image in enumerate(content["images"]):
        image["width"], image["height"] = (100, 60) if i % 3 else (60, 100)
    path = os.path.join(root, "other_sizes.json")
    with open(path, "w") as f:
        json.dump(content, f)
    metadata = MetadataCatalog.get("shapes_panoptic_val").as_dict()
    keys = [f"{a}_{b}" for a in ("thing", "stuff") for b in ("classes", "dataset_id_to_contiguous_id")]
    name = unique_name("panoptic")
    folders = os.path.join(root, "images"), os.path.join(root, "panoptic")
    register_coco_panoptic(name, {key: metadata[key] for key in keys}, *folders, path)
    assert "width" not in DatasetCatalog.get(name)[0]
    cfg = data_cfg("panoptic", name)

    def widths():
        loader = build_train_loader(cfg, mapper=dict)
        return [{x.get("width") for x in batch} for batch in itertools.islice(loader, 9)]

    assert sorted(map(sorted, widths())) == [[60]] * 3 + [[100]] * 6
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert widths() == [{None}] * 9


def test_filter_empty_annotations(root):
    with open(os.path.join(root, "instances.json")) as f:
        content = json.load(f)
    kept = {x["image_id"] for x in content["annotations"] if not x["iscrowd"]} - {1, 2}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    path = os.path.join(root, "some_without.json")
    with open(path, "w") as f:
        json.dump(content, f)
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root, json=path),))
    assert len(build_train_loader(cfg).dataset) == 13
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert len(build_train_loader(cfg).dataset) == len(kept) < 13


def test_unsupported_sampler_and_missing_names(entries, caplog):
    cfg = data_cfg("instance", custom=(entries["coco_instance"],))
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ConfigError, match="DATALOADER.SAMPLER_TRAIN"):
        build_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ConfigError, match="DATALOADER.REPEAT_THRESHOLD = 0.0: use a share"):
        build_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "TrainingSampler", 0.1
    build_train_loader(cfg)
    assert "REPEAT_THRESHOLD = 0.1 has no influence" in caplog.text
    cfg.DATASETS.TRAIN = ("shapes_instance_trian",)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN.*shapes_instance_trian.*shapes_instance_train"):
        build_train_loader(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        build_train_loader(cfg)
