"""Evaluators: their selection, and their metrics compared with closed forms and panopticapi."""

import contextlib
import io
import json
import math
import os
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data_helpers import custom_entry, data_cfg, unique_name
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import CityscapesSemSegEvaluator, COCOEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from panopticapi.evaluation import pq_compute
from panopticapi.utils import id2rgb
from PIL import Image

from knet_d2.data import load_dataset, register_custom_datasets, resolve_classes
from knet_d2.data.classes import class_table
from knet_d2.data.coco_json import check_for_evaluation
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES, write_shapes
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import (
    InstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
    best_metric,
    build_evaluators,
)
from knet_d2.evaluation.semantic import SegmentClassEvaluator, mean_iou


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=10, seed=58, size=64)
    return folder


@pytest.fixture(scope="module")
def panoptic(root):
    entry = custom_entry("coco_panoptic", root, instances_json=os.path.join(root, "instances.json"))
    cfg = data_cfg("panoptic", custom=(entry,))
    return cfg, entry["name"]


def _ids(record):
    png = np.array(Image.open(record["pan_seg_file_name"])).astype(np.int64)
    return png @ [1, 256, 65536]


def _panoptic_output(ids, segments):
    info = [{key: segment[key] for key in ("id", "isthing", "category_id")} for segment in segments]
    return {"panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), info)}


def _damaged(record, rng):
    """Shift a segment map, and lose segments, merge segments and change classes."""
    ids, segments = np.roll(_ids(record), 3, axis=1), [dict(segment) for segment in record["segments_info"]]
    for segment in segments:
        chance = rng.random()
        if chance < 0.2:
            segment["category_id"] = int(rng.integers(7))
            segment["isthing"] = segment["category_id"] < 4
        elif chance < 0.4:
            ids[ids == segment["id"]] = rng.choice([0, segments[0]["id"]])
    return ids, [segment for segment in segments if (ids == segment["id"]).any()]


# ---- panoptic ----


def test_ground_truth_as_prediction_is_perfect(panoptic):
    _, name = panoptic
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    crowds = 0
    for record in load_dataset(name):
        crowds += sum(segment["iscrowd"] for segment in record["segments_info"])
        evaluator.process([record], [_panoptic_output(_ids(record), record["segments_info"])])
    results = evaluator.evaluate()["panoptic_seg"]
    assert set(results) == {f"{q}Q{part}" for q in "PSR" for part in ("", "_th", "_st")}
    assert results == dict.fromkeys(results, 100.0)
    assert crowds > 0


def test_damaged_predictions_have_panopticapis_own_figures(panoptic, tmp_path):
    _, name = panoptic
    metadata, rng = MetadataCatalog.get(name), np.random.default_rng(0)
    contiguous = {**metadata.thing_dataset_id_to_contiguous_id, **metadata.stuff_dataset_id_to_contiguous_id}
    dataset_ids = {v: k for k, v in contiguous.items()}
    evaluator = PanopticEvaluator(name, str(tmp_path / "out"))
    evaluator.reset()
    annotations = []
    for record in load_dataset(name):
        ids, segments = _damaged(record, rng)
        output = _panoptic_output(ids, segments)
        before = repr(output)
        evaluator.process([record], [output])
        assert repr(output) == before, "the evaluator changed the model's output"
        file_name = f"{record['image_id']}.png"
        Image.fromarray(id2rgb(ids)).save(tmp_path / file_name)
        info = [{"id": x["id"], "category_id": dataset_ids[x["category_id"]]} for x in segments]
        annotations.append({"image_id": record["image_id"], "file_name": file_name, "segments_info": info})
    ours = evaluator.evaluate()["panoptic_seg"]
    with open(metadata.panoptic_json) as f:
        truth = json.load(f)
    (tmp_path / "predictions.json").write_text(json.dumps({**truth, "annotations": annotations}))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pq_compute(
            metadata.panoptic_json, str(tmp_path / "predictions.json"), metadata.panoptic_root, str(tmp_path)
        )
    for part, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            assert ours[key.upper() + suffix] == pytest.approx(100 * expected[part][key], abs=1e-9)
    assert 5 < ours["PQ"] < 95
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["annotations"]) == 10 and written["categories"] == truth["categories"]


def _tiny_panoptic(tmp_path, categories, images):
    """A data set of 8 x 8 images; images: list of (ids, [(segment id, category id), ...])."""
    (tmp_path / "images").mkdir(parents=True)
    (tmp_path / "panoptic").mkdir()
    content = {"images": [], "annotations": [], "categories": categories}
    for i, (ids, segments) in enumerate(images):
        Image.new("RGB", ids.shape[::-1]).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(id2rgb(ids)).save(tmp_path / "panoptic" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": 8, "width": 8})
        info = [{"id": a, "category_id": c} for a, c in segments]
        content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": info})
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    entry = custom_entry("coco_panoptic", str(tmp_path))
    data_cfg("semantic", custom=(entry,))
    return entry["name"]


def _evaluate_panoptic(name, predictions):
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    for record, (ids, segments) in zip(load_dataset(name), predictions, strict=True):
        info = [{"id": i, "isthing": isthing, "category_id": category} for i, category, isthing in segments]
        evaluator.process([record], [{"panoptic_seg": (torch.from_numpy(ids).int(), info)}])
    return evaluator.evaluate()["panoptic_seg"]


def test_panoptic_quality_closed_form(tmp_path):
    """Things: one match of IoU 12 / 16, one missed, one invented. The JSON has no iscrowd, area and colours."""
    truth = np.full((8, 8), 3)
    truth[:4, :4], truth[7, 7] = 1, 2
    categories = [{"id": 40, "name": "grass", "isthing": 0}, {"id": 7, "name": "cow", "isthing": 1}]
    name = _tiny_panoptic(tmp_path, categories, [(truth, [(1, 7), (2, 7), (3, 40)])])
    predicted = np.full((8, 8), 9)
    predicted[:4, :3], predicted[6:, 6:] = 5, 6
    results = _evaluate_panoptic(name, [(predicted, [(5, 0, True), (6, 0, True), (9, 1, False)])])
    stuff_iou = 44 / 51  # 47 true and 48 predicted pixels, 44 in both
    assert results["PQ_th"] == pytest.approx(100 * 0.75 / (1 + 0.5 + 0.5))
    assert (results["SQ_th"], results["RQ_th"]) == pytest.approx((75, 50))
    assert results["PQ_st"] == pytest.approx(100 * stuff_iou)
    assert results["PQ"] == pytest.approx((results["PQ_th"] + results["PQ_st"]) / 2)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_classes_of_pixels_from_panoptic_segments(tmp_path, task):
    """A quarter of a cow is taken for grass: IoU 12 / 16 and 47 / 51; one pixel is void."""
    truth = np.full((8, 8), 3)
    truth[:4, :4], truth[7, 7] = 1, 0
    categories = [{"id": 40, "name": "grass", "isthing": 0}, {"id": 7, "name": "cow", "isthing": 1}]
    name = _tiny_panoptic(tmp_path, categories, [(truth, [(1, 7), (3, 40)])])
    cfg = data_cfg(task, resolve=False)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.MODEL.KNET.TEST.OUTPUTS = ["sem_seg"]
    resolve_classes(cfg)
    cow, grass = (class_table(cfg).names.index(x) for x in ("cow", "grass"))
    predicted = torch.full((8, 8), grass)
    predicted[:4, :3] = cow
    (evaluator,) = build_evaluators(cfg, name, str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(load_dataset(name), [{"sem_seg": torch.nn.functional.one_hot(predicted, 2).movedim(-1, 0)}])
    metrics = evaluator.evaluate()["sem_seg"]
    assert (metrics["IoU-cow"], metrics["IoU-grass"]) == pytest.approx((75, 100 * 47 / 51))
    assert metrics["mIoU"] == pytest.approx((75 + 100 * 47 / 51) / 2)
    (section,) = evaluator.sections
    assert sorted(section.names) == ["cow", "grass"] and section.confusion.sum() == 63
    written = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    assert [(x["category_id"], int(mask_util.area(x["segmentation"]))) for x in sorted(written, key=str)] == [
        (40, 52),
        (7, 12),
    ]


@pytest.mark.parametrize("isthing", [0, 1])
def test_data_sets_without_things_or_without_stuff(tmp_path, isthing):
    ids = np.arange(64).reshape(8, 8) // 32 + 1
    categories = [{"id": 5 + i, "name": f"c{i}", "isthing": isthing} for i in range(3)]
    name = _tiny_panoptic(tmp_path, categories, [(ids, [(1, 5), (2, 6)])])
    results = _evaluate_panoptic(name, [(ids, [(1, 0, bool(isthing)), (2, 1, bool(isthing))])])
    there, absent = ("_th", "_st") if isthing else ("_st", "_th")
    assert results["PQ"] == results["PQ" + there] == 100
    assert all(math.isnan(results[key + absent]) for key in ("PQ", "SQ", "RQ"))


def test_panoptic_without_any_segment_is_nan_not_a_crash(tmp_path, caplog):
    empty = np.zeros((8, 8), int)
    name = _tiny_panoptic(tmp_path, [{"id": 1, "name": "a", "isthing": 1}], [(empty, [])])
    assert all(math.isnan(x) for x in _evaluate_panoptic(name, [(empty, [])]).values())
    assert f"No segment of data set {name} is of the classes a. Nothing is labelled" in caplog.text


def test_a_class_with_crowds_alone_has_no_segment(tmp_path, caplog):
    ids, categories = np.ones((8, 8), int), [{"id": i, "name": f"kind {i}", "isthing": 1} for i in (1, 2)]
    ids[4:] = 2
    name = _tiny_panoptic(tmp_path, categories, [(ids, [(1, 1), (2, 2)])])
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["annotations"][0]["segments_info"][1]["iscrowd"] = 1
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    assert _evaluate_panoptic(name, [(ids * (ids == 1), [(1, 0, True)])])["PQ"] == 100
    assert f"No segment of data set {name} is of the classes kind 2." in caplog.text


def test_equal_file_names_in_two_folders(tmp_path):
    ids = np.ones((8, 8), int)
    name = _tiny_panoptic(tmp_path, [{"id": 1, "name": "a", "isthing": 0}], [(ids, [(1, 1)]), (ids * 2, [(2, 1)])])
    for i in range(2):
        os.makedirs(tmp_path / "images" / str(i))
        os.rename(tmp_path / "images" / f"{i}.png", tmp_path / "images" / str(i) / "same.png")
    content = json.loads((tmp_path / "panoptic.json").read_text())
    for i, image in enumerate(content["images"]):
        image["file_name"] = f"{i}/same.png"
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    assert _evaluate_panoptic(name, [(ids, [(1, 0, False)]), (ids * 2, [(2, 0, False)])])["PQ"] == 100


def test_images_without_a_prediction_and_damaged_ground_truth_are_named(tmp_path):
    ids = np.ones((8, 8), int)
    name = _tiny_panoptic(tmp_path, [{"id": 1, "name": "a", "isthing": 0}], [(ids, [(1, 1)])] * 2)
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    evaluator.process([load_dataset(name)[0]], [_panoptic_output(ids, [{"id": 1, "isthing": False, "category_id": 0}])])
    with pytest.raises(DataError, match="panoptic.json: 1 images have no prediction; the first has the id 1"):
        evaluator.evaluate()
    png = tmp_path / "panoptic" / "0.png"
    Image.open(png).crop((0, 0, 8, 5)).save(png)
    damages = ((lambda: None, "0.png is 8 x 5 pixels"), (png.unlink, "Panoptic PNG .*0.png does not exist"))
    for damage, message in damages:
        damage()
        evaluator.reset()
        output = _panoptic_output(ids, [{"id": 1, "isthing": False, "category_id": 0}])
        evaluator.process([load_dataset(name)[0]], [output])
        with pytest.raises(DataError, match=message):
            evaluator.evaluate()


def test_two_processes_together_give_the_figures_of_one(panoptic, monkeypatch):
    _, name = panoptic
    records, rng = load_dataset(name), np.random.default_rng(1)
    outputs = [_panoptic_output(*_damaged(record, rng)) for record in records]

    def evaluate(chosen):
        evaluator = PanopticEvaluator(name, report=True)
        evaluator.reset()
        for i in chosen:
            evaluator.process([records[i]], [outputs[i]])
        results = evaluator.evaluate()
        sections = [
            (
                x.confusion.tolist(),
                sorted(x.qualities.items()),
                np.array([row.values for row in x.rows]).round(9).tolist(),
            )
            for x in evaluator.sections
        ]
        return results, repr(sections) if results else sections

    whole, sent = evaluate(range(10)), []
    assert "[[" in whole[1]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda data: sent.append(data) or [])
    assert evaluate(range(0, 10, 2)) == (None, [])
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    monkeypatch.setattr(comm, "gather", lambda data: [data, *sent])
    assert evaluate(range(1, 10, 2)) == whole


# ---- semantic ----


def _one_hot(labels, number):
    return {"sem_seg": torch.nn.functional.one_hot(torch.from_numpy(labels).long(), number).permute(2, 0, 1).float()}


def _tiny_semantic(tmp_path, labels, **options):
    for folder, image in (("images", Image.new("RGB", labels.shape[::-1])), ("semantic", Image.fromarray(labels))):
        (tmp_path / folder).mkdir(parents=True)
        image.save(tmp_path / folder / "a.png")
    entry = custom_entry("sem_seg", str(tmp_path), **options)
    return data_cfg("semantic", custom=(entry,)), entry["name"]


def _evaluate_semantic(cfg, name, predicted, number):
    (evaluator,) = build_evaluators(cfg, name)
    evaluator.reset()
    evaluator.process([{"file_name": load_dataset(name)[0]["file_name"]}], [_one_hot(predicted, number)])
    return evaluator.evaluate()["sem_seg"]


def test_mean_iou_closed_form(tmp_path):
    """4 x 4 pixels: 8 of class a, 6 of b, 2 ignored; c and d not in the ground truth, c predicted once."""
    labels = np.array([[1] * 4, [1] * 4, [2] * 4, [2, 2, 0, 0]], np.uint8)
    cfg, name = _tiny_semantic(tmp_path, labels, classes=list("abcd"), ignore=[0], label_values=1)
    predicted = np.array([[0] * 4, [0, 0, 1, 2], [1] * 4, [1, 1, 3, 3]])
    results = _evaluate_semantic(cfg, name, predicted, 4)
    assert results["IoU-a"] == pytest.approx(100 * 6 / 8) and results["IoU-b"] == pytest.approx(100 * 6 / 7)
    # c counts as 0; d was predicted on ignored pixels only and does not count.
    assert results["mIoU"] == pytest.approx(100 * (6 / 8 + 6 / 7 + 0) / 3)
    assert results["pACC"] == pytest.approx(100 * 12 / 14) and results["mACC"] == pytest.approx(100 * (6 / 8 + 1) / 2)
    assert all(type(value) is float for value in results.values())


def test_mean_iou_of_a_confusion_matrix():
    assert mean_iou(np.array([[3, 1, 0], [1, 5, 0], [0, 0, 0]])) == pytest.approx((3 / 5 + 5 / 7) / 2)


def test_classes_without_a_pixel_are_told(tmp_path, caplog):
    for i, (pixels, message) in enumerate((([0, 1], "No pixel of .* classes c"), ([1, 255], "All labelled .*class b"))):
        cfg, name = _tiny_semantic(tmp_path / str(i), np.array([pixels], np.uint8), classes=["a", "b", "c"])
        _evaluate_semantic(cfg, name, np.array([pixels]) % 255, 3)
        assert re.search(message, caplog.text)
        assert ("All labelled" in caplog.text) == (i == 1)


def test_predictions_are_written_with_a_folder_only(tmp_path):
    labels = np.array([[0, 1], [1, 1]], np.uint8)
    cfg, name = _tiny_semantic(tmp_path, labels, classes=["a", "b"])
    (evaluator,) = build_evaluators(cfg, name, str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(load_dataset(name), [_one_hot(labels.astype(int), 2)])
    evaluator.evaluate()
    assert len(json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())) == 2


def test_semantic_ground_truth_of_another_size_or_without_labels(tmp_path):
    labels = np.full((4, 4), 255, np.uint8)
    cfg, name = _tiny_semantic(tmp_path, labels, classes=["a", "b"])
    with pytest.raises(DataError, match=f"{name} has no labelled pixel"):
        _evaluate_semantic(cfg, name, np.zeros((4, 4), int), 2)
    with pytest.raises(DataError, match="a.png is 4 x 4 pixels"):
        _evaluate_semantic(cfg, name, np.zeros((5, 4), int), 2)


def test_panoptic_models_are_evaluated_on_separated_label_maps(root):
    """In these label maps all things are class 0, and stuff classes start at 1."""
    name = unique_name("separated")
    labels = np.array([[0, 0, 1], [2, 3, 255]], np.uint8)
    folder = os.path.join(root, name)
    os.makedirs(folder)
    Image.fromarray(labels).save(os.path.join(folder, "000000.png"))
    Image.new("RGB", (3, 2)).save(os.path.join(folder, "image.png"))
    record = {
        key: os.path.join(folder, file)
        for key, file in (("file_name", "image.png"), ("sem_seg_file_name", "000000.png"))
    }
    DatasetCatalog.register(name, lambda: [dict(record)])
    MetadataCatalog.get(name).set(
        thing_classes=list(THING_CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(4)},
        stuff_classes=["things", *STUFF_CLASSES],
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1, 12: 2, 13: 3},
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        sem_seg_root=folder,
    )
    cfg = data_cfg("panoptic", name)
    cfg.MODEL.KNET.TEST.OUTPUTS = ["sem_seg"]
    predicted = np.array([[0, 3, 4], [5, 5, 1]])  # model classes: 4 things, 3 stuff
    results = _evaluate_semantic(cfg, name, predicted, 7)
    assert results["mIoU"] == pytest.approx(100 * (1 + 1 + 1 / 2 + 0) / 4)


# ---- instance ----


def _instances(record, masks, classes, scores):
    instances = Instances((record["height"], record["width"]))
    instances.pred_masks = torch.from_numpy(np.array(masks)).reshape(-1, record["height"], record["width"])
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in map(np.nonzero, masks)]
    instances.pred_boxes = Boxes(torch.tensor(np.array(boxes, dtype=np.float32)).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    return {"instances": instances}


@pytest.mark.parametrize("points", [[], [2.0, 2.0, 6.0, 6.0]])
def test_instances_that_pycocotools_cant_read(points):
    box = {"bbox": [2, 2, 4, 4], "area": 16, "iscrowd": 0}
    polygons = [[2, 2, 6, 2, 6, 6], points]
    annotations = [{"id": 1, "image_id": 0, "category_id": 0, "segmentation": polygons, **box}]
    check_for_evaluation({"annotations": annotations}, "instances.json")
    annotations[0]["segmentation"] = polygons[::-1]
    with pytest.raises(DataError, match=r"instances.json: annotations\[0\].segmentation: begins with a polygon"):
        check_for_evaluation({"annotations": annotations}, "instances.json")


def test_instances_of_a_panoptic_data_set(panoptic):
    """Its list of thing_classes has the stuff, too. Every second instance found: precision 1 up to recall 1/2."""
    cfg, name = panoptic
    cfg = cfg.clone()
    cfg.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg", "instances"]
    evaluators = build_evaluators(cfg, name)
    assert [type(x) for x in evaluators] == [PanopticEvaluator, InstanceEvaluator]
    found, total = np.zeros(4), np.zeros(4)
    evaluators[1].reset()
    for record in load_dataset(name):
        ids, masks, classes = _ids(record), [], []
        for segment in record["segments_info"]:
            category = segment["category_id"]
            if segment["isthing"] and not segment["iscrowd"]:
                if total[category] % 2 == 0:
                    masks.append(ids == segment["id"])
                    classes.append(category)
                    found[category] += 1
                total[category] += 1
        evaluators[1].process([record], [_instances(record, masks, classes, [0.9] * len(masks))])
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluators[1].evaluate()
    recall_points = np.floor(found / total * 100 + 1e-9) + 1
    assert total.min() >= 3
    for category, class_name in enumerate(THING_CLASSES):
        assert results["segm"][f"AP-{class_name}"] == pytest.approx(100 * recall_points[category] / 101)
    assert results["segm"]["AP"] == pytest.approx(100 * recall_points.mean() / 101)
    assert results["bbox"]["AP"] == pytest.approx(results["segm"]["AP"])


def _random_instances(record, rng):
    """Ground truth boxes and masks, moved, of any class, with scores in 1/16 so that some are equal."""
    masks = [np.roll(_decode(x, record), rng.integers(-4, 5, 2), axis=(0, 1)) for x in record["annotations"]]
    masks = [x for x in masks if x.any() and rng.random() < 0.8]
    classes = [int(rng.integers(4)) if rng.random() < 0.3 else record["annotations"][0]["category_id"] for _ in masks]
    return _instances(record, masks, classes, (rng.integers(1, 16, len(masks)) / 16).tolist())


def _decode(annotation, record):
    segmentation = annotation["segmentation"]
    rles = segmentation if isinstance(segmentation, dict) else mask_util.frPyObjects(segmentation, 64, 64)
    return mask_util.decode(mask_util.merge(rles) if isinstance(rles, list) else rles).astype(bool)


def test_instances_and_semantic_maps_have_the_figures_and_files_of_detectron2(root, tmp_path):
    rng = np.random.default_rng(4)
    instance = data_cfg("instance", custom=(custom_entry("coco_instance", root),)).DATASETS.TRAIN[0]
    entry = custom_entry("sem_seg", root)
    cfg = data_cfg("semantic", custom=(entry,))
    outputs = [_random_instances(record, rng) for record in load_dataset(instance)]
    maps = [_one_hot(rng.integers(7, size=(64, 64)), 7) for _ in outputs]
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    pairs = (
        (InstanceEvaluator(instance, ours), COCOEvaluator(instance, ("bbox", "segm"), output_dir=theirs), outputs),
        (build_evaluators(cfg, entry["name"], ours)[0], SemSegEvaluator(entry["name"], output_dir=theirs), maps),
    )
    for our, their, predictions in pairs:
        results = []
        records = load_dataset(instance if predictions is outputs else entry["name"])
        for evaluator in (our, their):
            evaluator.reset()
            evaluator.process(records, predictions)
            results.append(evaluator.evaluate())
        assert results[0].keys() == results[1].keys()
        if predictions is outputs:
            assert results[0]["segm"].pop("masks_per_object") >= 1
        for kind, metrics in results[1].items():
            assert results[0][kind].keys() == metrics.keys()
            assert results[0][kind] == pytest.approx(metrics, abs=1e-9, nan_ok=True)
    assert 5 < results[0]["sem_seg"]["mIoU"] < 95
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in ("coco_instances_results.json", "sem_seg_predictions.json"):
        with open(os.path.join(ours, name)) as a, open(os.path.join(theirs, name)) as b:
            assert json.load(a) == json.load(b)


def _perfect(record):
    """The annotations of a record as predictions with falling scores, all below those of others."""
    masks = [_decode(x, record) for x in record["annotations"]]
    scores = np.linspace(1, 0.5, len(masks)).tolist()
    return _instances(record, masks, [x["category_id"] for x in record["annotations"]], scores)


def _evaluate_instances(name, predictions=_perfect, **options):
    evaluator = InstanceEvaluator(name, **options)
    evaluator.reset()
    for record in load_dataset(name):
        evaluator.process([record], [predictions(record)])
    return evaluator.evaluate()


def _squares(tmp_path, number, first_id=1):
    """A data set of one image of 64 x 64 pixels with squares of 3 x 3."""
    places = [(4 * (i % 15), 4 * (i // 15)) for i in range(number)]
    annotations = [
        {
            **{"id": first_id + i, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9, "bbox": [x, y, 3, 3]},
            "segmentation": [[x, y, x + 3, y, x + 3, y + 3, x, y + 3]],
        }
        for i, (x, y) in enumerate(places)
    ]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return custom_entry("coco_instance", str(tmp_path))


@pytest.mark.parametrize("maximum", [100, 200])
def test_more_instances_than_coco_counts_have_a_second_figure(tmp_path, caplog, maximum):
    """All 150 instances are found, but with at most 100 detections the recall is 2/3."""
    caplog.set_level("INFO", logger="knet_d2")
    entry = _squares(tmp_path, 150)
    cfg = data_cfg("instance", custom=(entry,))
    cfg.TEST.DETECTIONS_PER_IMAGE = maximum
    (evaluator,) = build_evaluators(cfg, entry["name"])
    evaluator.reset()
    evaluator.process(load_dataset(entry["name"]), [_perfect(x) for x in load_dataset(entry["name"])])
    results = evaluator.evaluate()["segm"]
    assert results["AP"] == pytest.approx(100 * 67 / 101)
    assert results.get("AP@200") == (100 if maximum == 200 else None)
    assert ("An image has 150 instances" in caplog.text) == (maximum == 200)


def test_masks_per_object_counts_twins_of_half_the_score(tmp_path):
    entry = _squares(tmp_path, 4)
    data_cfg("instance", custom=(entry,))

    def predictions(record):
        """Of the first object three masks (one with too low a score), of the second two, of the third a shifted one."""
        masks = [_decode(x, record) for x in record["annotations"]]
        chosen = [(0, 0.8, 0), (0, 0.4, 0), (0, 0.39, 0), (1, 0.1, 0), (1, 0.06, 0), (2, 0.9, 1), (3, 0.9, 0)]
        moved = [np.roll(masks[i], shift, axis=0) for i, _, shift in chosen]
        return _instances(record, moved, [0] * len(chosen), [score for _, score, _ in chosen])

    results = _evaluate_instances(entry["name"], predictions)
    assert results["segm"]["masks_per_object"] == pytest.approx((2 + 2 + 1) / 3)
    assert "masks_per_object" not in results["bbox"]
    assert _evaluate_instances(entry["name"])["segm"]["masks_per_object"] == 1


def test_annotation_ids_from_0_and_masks_of_another_size(tmp_path):
    entry = _squares(tmp_path, 3, first_id=0)
    data_cfg("instance", custom=(entry,))
    assert _evaluate_instances(entry["name"])["segm"]["AP"] == pytest.approx(100)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["images"][0]["width"], rle = 32, {"size": [32, 64], "counts": [32 * 64]}
    content["annotations"][0]["segmentation"] = rle
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\[0\].segmentation: is RLE of size \[32, 64\].*\[64, 32\]"):
        InstanceEvaluator(entry["name"])


def test_data_sets_registered_in_python(root):
    """Without evaluator_type and JSON, as Detectron2's tutorial registers one."""
    source = load_dataset(data_cfg("instance", custom=(custom_entry("coco_instance", root),)).DATASETS.TRAIN[0])
    labels = [{k: v for k, v in x.items() if k != "annotations"} for x in source]
    for i, record in enumerate(labels):
        record["sem_seg_file_name"] = os.path.join(root, "semantic", f"{i:06d}.png")
    instance, semantic = unique_name("python"), unique_name("python")
    DatasetCatalog.register(instance, lambda: source)
    MetadataCatalog.get(instance).thing_classes = list(THING_CLASSES)
    DatasetCatalog.register(semantic, lambda: labels)
    MetadataCatalog.get(semantic).stuff_classes = [*THING_CLASSES, *STUFF_CLASSES]
    (evaluator,) = build_evaluators(data_cfg("instance", instance), instance)
    assert type(evaluator) is InstanceEvaluator
    assert _evaluate_instances(instance)["segm"]["AP"] == pytest.approx(100, abs=0.5)
    predicted = np.array(Image.open(labels[0]["sem_seg_file_name"])).astype(int)
    results = _evaluate_semantic(data_cfg("semantic", semantic), semantic, np.where(predicted == 255, 0, predicted), 7)
    assert results["mIoU"] == 100
    source[0].pop("height")
    with pytest.raises(DataError, match=f"records of data set {instance} can't be evaluated .*height"):
        InstanceEvaluator(instance)


def test_the_best_metric_of_cityscapes_is_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    cfg = data_cfg("semantic", "cityscapes_fine_sem_seg_val")
    (evaluator,) = build_evaluators(cfg, "cityscapes_fine_sem_seg_val")
    monkeypatch.setattr(CityscapesSemSegEvaluator, "evaluate", lambda self: {"sem_seg": {"IoU": 61.0, "iIoU": 40.0}})
    group, metric = best_metric(cfg).split("/")
    assert evaluator.evaluate()[group][metric] == 61.0


def test_no_instances_at_all_still_has_the_metric(root):
    cfg = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    (evaluator,) = build_evaluators(cfg, cfg.DATASETS.TRAIN[0])
    evaluator.reset()
    for record in load_dataset(cfg.DATASETS.TRAIN[0]):
        evaluator.process([record], [_instances(record, [], [], [])])
    assert math.isnan(evaluator.evaluate()["segm"]["AP"])


# ---- the table ----


def test_evaluators_follow_the_data_set_and_the_outputs(root, panoptic, caplog):
    instance = data_cfg("instance", custom=(custom_entry("coco_instance", root),))
    semantic = data_cfg("semantic", custom=(custom_entry("sem_seg", root),))
    for cfg, expected in (
        (instance, InstanceEvaluator),
        (semantic, SemanticEvaluator),
        (panoptic[0], PanopticEvaluator),
    ):
        assert [type(x) for x in build_evaluators(cfg, cfg.DATASETS.TRAIN[0])] == [expected]
    both = panoptic[0].clone()
    both.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg", "sem_seg"]
    assert [type(x) for x in build_evaluators(both, panoptic[1])] == [PanopticEvaluator, SegmentClassEvaluator]
    both.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg", "instances"]
    alone = custom_entry("coco_panoptic", root)
    both.DATASETS.CUSTOM = (alone,)
    register_custom_datasets(both)
    assert [type(x) for x in build_evaluators(both, alone["name"])] == [PanopticEvaluator]
    assert "no ground truth for the model's output 'instances'" in caplog.text
    with pytest.raises(ConfigError, match=r"evaluator_type 'coco' can evaluate instances.*the outputs sem_seg"):
        build_evaluators(semantic, instance.DATASETS.TRAIN[0])


def test_unknown_evaluator_type_and_missing_files(root):
    name = unique_name("other")
    DatasetCatalog.register(name, lambda: [{"file_name": "x.jpg"}])
    MetadataCatalog.get(name).set(thing_classes=["a"], evaluator_type="pascal_voc")
    cfg = data_cfg("instance", name)
    with pytest.raises(ConfigError, match=f"{name}.*evaluator_type 'pascal_voc'"):
        build_evaluators(cfg, name)
    gone = custom_entry("coco_instance", os.path.join(root, "gone"))
    cfg = data_cfg("instance", custom=(gone,), resolve=False)
    MetadataCatalog.get(gone["name"]).set(thing_classes=["a"])
    with pytest.raises(DataError, match="gone/instances.json does not exist"):
        build_evaluators(cfg, gone["name"])


def test_classes_without_an_instance_are_told(tmp_path, caplog):
    entry = _squares(tmp_path, 2)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["categories"] += [{"id": 2 + i, "name": f"kind {i}"} for i in range(12)]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    data_cfg("instance", custom=(entry,))
    _evaluate_instances(entry["name"])
    (told,) = [x for x in caplog.messages if "No instance of data set " in x]
    assert "classes kind 0, kind 1" in told and "kind 9 and 2 more." in told and "kind 10" not in told


def test_classes_that_a_held_out_part_lacks_are_told(tmp_path, caplog):
    """The whole JSON has an instance of each class, the part that is evaluated has one of the first class."""
    entry = _squares(tmp_path, 1)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["categories"].append({"id": 2, "name": "rare"})
    content["images"] += [{**content["images"][0], "id": 2, "file_name": "b.png"}]
    content["annotations"] += [{**content["annotations"][0], "id": 2, "image_id": 2, "category_id": 2}]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "b.png")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    data_cfg("instance", custom=(entry,))
    _evaluate_instances(entry["name"])
    assert "is of the classes" not in caplog.text
    MetadataCatalog.get(entry["name"]).image_ids = [1]
    _evaluate_instances(entry["name"])
    assert f"No instance of data set {entry['name']} is of the classes rare." in caplog.text
