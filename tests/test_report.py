"""The report of an evaluation: its metrics, matrices and intervals, and the page."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg, edit_json
from detectron2.data import MetadataCatalog
from helpers import RESNET, TASKS, set_options, small, spread_scores
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_evaluation import _damaged, _decode, _instances, _one_hot, _panoptic_output, _squares, _tiny_panoptic

from knet_d2.config import get_knet_cfg
from knet_d2.data import load_dataset
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import Trainer
from knet_d2.engine.output_dir import save_config
from knet_d2.evaluation import InstanceEvaluator, PanopticEvaluator, build_evaluators, write_report
from knet_d2.evaluation.report import recommended_threshold, report_name
from knet_d2.evaluation.report.average_precision import match_classes
from knet_d2.evaluation.report.bootstrap import MOST_GROUPS, groups_of, interval, resample
from knet_d2.evaluation.report.matches import Matches, confusion_matrix
from knet_d2.evaluation.report.page import DatasetReport, Picture, merge_rare, page, training_charts
from knet_d2.evaluation.report.panoptic import panoptic_section
from knet_d2.evaluation.report.section import Thresholds
from knet_d2.evaluation.report.semantic import PixelCounts, semantic_section

HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror='alert(2)'>", "a & b </td>", "half \ud800"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=12, seed=3, size=64)
    return folder


def quiet(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def evaluated(evaluator, records, outputs):
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [output])
    results = quiet(evaluator.evaluate)
    (section,) = evaluator.sections
    return results, section


# ---- metrics ----


def random_instances(record, rng):
    """Objects, moved, some lost, some twice, some of another class; scores in 1/16, so that some are equal."""
    masks, classes = [], []
    for x in record["annotations"]:
        for _ in range(int(rng.integers(3))):
            mask = np.roll(_decode(x, record), rng.integers(-2, 3, 2), axis=(0, 1))
            masks.append(mask)
            classes.append(x["category_id"] if rng.random() < 0.8 else int(rng.integers(4)))
    return _instances(record, masks, classes, (rng.integers(1, 16, len(masks)) / 16).tolist())


@pytest.fixture(scope="module")
def instances(root):
    """A data set with crowds, and the results and section of random predictions."""
    path = f"{root}/instances.json"
    edit_json(path, lambda x: [a.update(iscrowd=1) for a in x["annotations"][::7]])
    name = data_cfg("instance", custom=(custom_entry("coco_instance", root),)).DATASETS.TRAIN[0]
    rng, records = np.random.default_rng(1), load_dataset(name)
    outputs = [random_instances(record, rng) for record in records]
    return name, outputs, *evaluated(InstanceEvaluator(name, report=True), records, outputs)


def test_instance_metrics_are_those_of_pycocotools(instances):
    _, _, results, section = instances
    found = {x.name: x.value for x in section.metrics}
    assert 5 < found["AP"] < 95
    assert found == pytest.approx({key: results["segm"][key] for key in ("AP", "AP50")}, abs=1e-9)
    for row in section.rows:
        assert row.values[0] == pytest.approx(results["segm"][f"AP-{row.name}"], abs=1e-9)
        assert row.interval[0] <= row.values[0] <= row.interval[1]
    assert section.metrics[0].interval[0] < found["AP"] < section.metrics[0].interval[1]


def as_coco(name, outputs, repeats):
    """The ground truth and the predictions, with every image as often as ``repeats`` tells; COCO's objects."""
    evaluator = InstanceEvaluator(name)
    evaluator.reset()
    evaluator.process(load_dataset(name), outputs)
    with open(MetadataCatalog.get(name).json_file) as f:
        content = json.load(f)
    images, annotations, found = [], [], []
    for image, number in zip(content["images"], repeats, strict=True):
        for _ in range(number):
            new = {"image_id": len(images)}
            images.append({**image, "id": len(images)})
            annotations += [{**x, **new} for x in content["annotations"] if x["image_id"] == image["id"]]
            of_image = next(x for x in evaluator._predictions if x["image_id"] == image["id"])["instances"]
            found += [{**{k: v for k, v in x.items() if k != "bbox"}, **new} for x in of_image]
    truth = COCO()
    truth.dataset = {
        **content,
        "images": images,
        "annotations": [{**x, "id": i + 1} for i, x in enumerate(annotations)],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def test_weighted_images_count_as_copies_of_them(instances):
    """This is what the bootstrap computes: pycocotools' own AP of the images that were drawn."""
    name, outputs, _, _ = instances
    once = quiet(as_coco, name, outputs, [1] * 12)
    params = once.params
    truth, found = once.cocoGt.dataset["annotations"], once.cocoDt.dataset["annotations"]
    classes = match_classes(truth, found, once.ious, params.imgIds, params.catIds, 100)
    for seed in range(3):
        weights = np.random.default_rng(seed).multinomial(12, [1 / 12] * 12)
        precision = quiet(as_coco, name, outputs, weights).eval["precision"][:, :, :, 0, 2]
        for i, matches in enumerate(classes):
            expected = np.where((precision[:, :, i] > -1).all(axis=1), precision[:, :, i].mean(axis=1), np.nan)
            ours = matches.average_precision(weights[None].astype(np.float32))[0]
            np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_sums_of_the_instance_matrix(instances):
    name, outputs, _, section = instances
    threshold = section.thresholds.scores[section.thresholds.best]
    labels = np.concatenate([x["instances"].pred_classes[x["instances"].scores >= threshold].numpy() for x in outputs])
    records = load_dataset(name)
    objects = [x["category_id"] for record in records for x in record["annotations"] if not x["iscrowd"]]
    matrix, number = section.confusion, 0
    for note in section.notes:
        number += int((re.match(r"(\d+) predictions on crowd", note) or [0, 0])[1])
    assert matrix[:-1].sum() + number == len(labels)
    np.testing.assert_array_equal(matrix.sum(axis=0)[:-1], np.bincount(objects, minlength=4))
    assert (matrix.sum(axis=1)[:-1] <= np.bincount(labels, minlength=4)).all()
    assert matrix[-1, -1] == 0 and np.trace(matrix) > 0 and matrix[:-1, -1].sum() > 0


def one_image(tmp_path, masks, scores, classes=None):
    """One square object at the top left (mask 0 is the square, 1 is elsewhere), and predictions."""
    entry = _squares(tmp_path, 1)
    name = data_cfg("instance", custom=(entry,)).DATASETS.TRAIN[0]
    squares = np.zeros((2, 64, 64), bool)
    squares[0, :3, :3], squares[1, 30:40, 30:40] = True, True
    records = load_dataset(name)
    outputs = [_instances(records[0], [squares[i] for i in masks], classes or [0] * len(masks), scores)]
    return evaluated(InstanceEvaluator(name, report=True), records, outputs)[1]


@pytest.mark.parametrize(
    "masks, expected",
    [
        ([0], [[1, 0], [0, 0]]),
        ([1], [[0, 1], [1, 0]]),  # far away: one is missed, one is false
        ([0, 0], [[1, 1], [0, 0]]),  # a twin is false
        ([], [[0, 0], [1, 0]]),
    ],
)
def test_matrix_of_one_object(tmp_path, masks, expected):
    section = one_image(tmp_path, masks, [0.9] * len(masks))
    assert section.confusion.tolist() == expected


def test_false_predictions_on_an_image_without_objects_count(tmp_path):
    entry = _squares(tmp_path, 1)
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    empty = {"id": 2, "file_name": "b.png", "height": 64, "width": 64}
    edit_json(str(tmp_path / "instances.json"), lambda x: x["images"].append(empty))
    name = data_cfg("instance", custom=(entry,)).DATASETS.TRAIN[0]
    records, mask = load_dataset(name), np.zeros((64, 64), bool)
    mask[:3, :3] = True
    outputs = [_instances(record, [mask], [0], [0.9]) for record in records]
    section = evaluated(InstanceEvaluator(name, report=True), records, outputs)[1]
    assert section.confusion.tolist() == [[1, 1], [0, 0]]
    assert section.rows[0].values[2:4] == (50, 100)  # precision and recall
    assert section.qualities == {1: 1.0, 2: 0.0}


def test_a_pair_of_two_classes_is_counted_once():
    matches = Matches.of([0, 1, 1], [1, 1, 2], [0.9, 0.8, 0.7], [(0, 0, 0.6), (1, 1, 0.75)])
    matrix = confusion_matrix([matches], 3)
    assert matrix.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert matches.quality() == pytest.approx(0.75 / 3)
    assert matches.counts(3).tolist() == [[0, 0, 0, 1], [0.75, 1, 1, 1], [0, 0, 1, 0]]


def test_panoptic_metrics_are_those_of_panopticapi(root):
    entry = custom_entry("coco_panoptic", root)
    data_cfg("panoptic", custom=(entry,))
    rng, records = np.random.default_rng(0), load_dataset(entry["name"])
    outputs, predicted = [], 0
    for record in records:
        ids, segments = _damaged(record, rng)
        ids[20:30, 20:30] = 0
        segments = [x for x in segments if (ids == x["id"]).any()]
        predicted += len(segments)
        outputs.append(_panoptic_output(ids, segments))
    results, section = evaluated(PanopticEvaluator(entry["name"], report=True), records, outputs)
    expected = [results["panoptic_seg"][key] for key in ("PQ", "PQ_th", "PQ_st")]
    assert [x.value for x in section.metrics] == pytest.approx(expected, abs=1e-9)
    assert 5 < expected[0] < 95
    for metric in section.metrics:
        assert metric.interval[0] < metric.value < metric.interval[1]
    objects = [x for record in records for x in record["segments_info"] if not x["iscrowd"]]
    matrix = section.confusion
    assert matrix.sum(axis=0)[:-1].sum() == len(objects) == sum(row.values[5] for row in section.rows)
    assert matrix[:-1].sum() == sum(row.values[6] for row in section.rows) <= predicted
    assert sum(len(record["segments_info"]) for record in records) > len(objects)  # there are crowds


def test_segments_in_void_are_left_out_unless_right(tmp_path):
    """A prediction of which 60% are void: right if it covers its object, else it is neither false nor confused."""
    truth = np.zeros((8, 8), int)
    truth[:4, :4] = 1
    categories = [{"id": i, "name": f"c{i}", "isthing": 1} for i in (3, 4)]
    name = _tiny_panoptic(tmp_path, categories, [(truth, [(1, 3)])])
    predicted = np.zeros((8, 8), int)
    predicted[:5, :8] = 9
    for category, expected in ((0, [[1, 0, 0], [0, 0, 0], [0, 0, 0]]), (1, [[0, 0, 0], [0, 0, 0], [1, 0, 0]])):
        output = _panoptic_output(predicted, [{"id": 9, "isthing": True, "category_id": category}])
        results, section = evaluated(PanopticEvaluator(name, report=True), load_dataset(name), [output])
        assert section.confusion.tolist() == expected
        assert section.metrics[0].value == pytest.approx(results["panoptic_seg"]["PQ"])


def test_semantic_metrics_are_those_of_the_evaluator(root):
    entry = custom_entry("sem_seg", root)
    cfg = data_cfg("semantic", custom=(entry,))
    rng, records = np.random.default_rng(2), load_dataset(entry["name"])
    maps = [_one_hot(rng.integers(7, size=(64, 64)), 7) for _ in records]
    results, section = evaluated(build_evaluators(cfg, entry["name"])[0], records, maps)
    (metric,) = section.metrics
    assert metric.value == pytest.approx(results["sem_seg"]["mIoU"]) and metric.interval[0] < metric.interval[1]
    for row in section.rows:
        expected = [results["sem_seg"][f"{key}-{row.name}"] for key in ("IoU", "ACC")]
        assert [row.values[0], row.values[2]] == pytest.approx(expected)
    predicted = np.bincount(np.concatenate([x["sem_seg"].argmax(0).numpy().ravel() for x in maps]), minlength=7)
    assert (section.confusion.sum(axis=1)[:-1] <= predicted).all() and section.confusion[-1].sum() == 0
    total = section.confusion.sum()
    assert total == sum(row.values[5] for row in section.rows) > 0.9 * predicted.sum()
    shares = [[row.values[3], row.values[4]] for row in section.rows]
    counts = np.stack([section.confusion[:, :-1].sum(axis=0), section.confusion[:-1].sum(axis=1)], axis=1)
    assert shares == pytest.approx(100 * counts / total)


# ---- intervals ----


def test_interval_of_two_images_that_differ():
    """A quarter of the draws have the bad image twice, a quarter the good one twice; else PQ is 1 / (1 + 1 / 2)."""
    found, lost = Matches.of([0], [0], [0.9], [(0, 0, 1.0)]), Matches.of([0], [], [], [])
    section = panoptic_section(["a"], [True], {1: found, 2: lost})
    assert section.metrics[0].value == pytest.approx(200 / 3)
    assert section.metrics[0].interval == (0, 100)
    alike = panoptic_section(["a"], [True], {1: found, 2: found})
    assert alike.metrics[0].interval == (100, 100)


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = interval(resample(400, 4000) @ values / 400)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)
    groups = groups_of(3 * MOST_GROUPS + 1)
    assert groups.max() == MOST_GROUPS - 1 and np.bincount(groups).tolist() == [4] + [3] * (MOST_GROUPS - 1)


# ---- thresholds and matrices ----


def test_recommended_threshold():
    """Right at 0.9 and 0.6, wrong at 0.8 and 0.3; 3 objects."""
    thresholds = Thresholds.of(np.array([0.3, 0.9, 0.8, 0.6]), np.array([False, True, False, True]), 3)
    row = dict(zip(thresholds.scores.round(2).tolist(), zip(thresholds.precision, thresholds.recall, thresholds.f1)))
    assert row[0.3] == pytest.approx((1 / 2, 2 / 3, 4 / 7))
    assert row[0.31] == pytest.approx((2 / 3, 2 / 3, 2 / 3)) == row[0.6]
    assert row[0.61] == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert row[0.9] == pytest.approx((1, 1 / 3, 1 / 2))
    assert np.isnan(row[0.91][0]) and row[0.91][1:] == (0, 0)
    assert thresholds.scores[thresholds.best] == 0.45  # in the middle of 0.31 to 0.60
    assert Thresholds.of(np.array([0.5]), np.array([False]), 1) is None
    assert Thresholds.of(np.array([0.5]), np.array([True]), 1, 0.405).scores[0] == 0.4
    assert Thresholds.of(np.array([1.0]), np.array([True]), 1, 1.0).scores.tolist() == [0.99]


def test_merged_classes_keep_all_sums():
    matrix = np.random.default_rng(0).integers(0, 9, (41, 41))
    matrix[-1, -1] = 0
    merged, names = merge_rare(matrix, [f"c{i}" for i in range(40)], most=10)
    assert merged.shape == (11, 11) and len(names) == 10 and names[-1] == "31 other classes"
    kept = [int(x[1:]) for x in names[:-1]]
    np.testing.assert_array_equal(merged[:9, :9], matrix[np.ix_(kept, kept)])
    for axis in (0, 1):
        sums, all_sums = merged.sum(axis=axis), matrix.sum(axis=axis)
        np.testing.assert_array_equal(sums[:9], all_sums[kept])
        assert sums[10] == all_sums[40] and sums.sum() == all_sums.sum()
    assert merge_rare(matrix, ["x"] * 40, most=40)[0] is matrix


# ---- the page ----


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_text_of_the_data_is_escaped():
    found = Matches.of([0, 1, 2, 3], [0], [0.9], [(0, 0, 1.0)])
    confusion = np.diag([5, 6, 7, 8])
    counts = {"<script>.png": PixelCounts.of(confusion)}
    sections = [panoptic_section(HOSTILE, [True] * 4, {1: found}), semantic_section(HOSTILE, confusion, counts)]
    picture = Picture(HOSTILE[0], 0.5, b"jpeg")
    charts = training_charts([{"iteration": i, f"{HOSTILE[1]}/AP": 1.0 * i, "total_loss": 3.0 - i} for i in range(3)])
    content = page(HOSTILE[0], charts, [DatasetReport(HOSTILE[1], sections, [picture])], {HOSTILE[2]: 1.0})
    parsed = Tags(content.decode())
    assert not {"script", "iframe", "link", "object"} & set(parsed.tags) and parsed.tags.count("img") == 1
    assert not [key for key, _ in parsed.attributes if key.startswith("on")]
    links = [value for key, value in parsed.attributes if key in ("src", "href")]
    assert links == ["data:image/jpeg;base64,anBlZw=="]
    assert all(name in parsed.text for name in HOSTILE[:3]) and "half ?" in parsed.text


def test_numbers_of_the_page(instances, tmp_path):
    section = instances[3]
    content = page("a", [], [DatasetReport("set", [section], [])], {}).decode()
    parsed = Tags(content)
    score = section.thresholds.scores[section.thresholds.best]
    (tmp_path / "report.html").write_text(content)
    assert recommended_threshold(str(tmp_path)) == pytest.approx(score) and recommended_threshold("nowhere") is None
    assert f"Recommended: {score:.2f} (MODEL.KNET.TEST.SCORE_THRESHOLD)" in parsed.text
    values = sorted((row.values[0] for row in section.rows), reverse=True)
    places = [parsed.text.index(row.name) for value in values for row in section.rows if row.values[0] == value]
    assert places == sorted(places)  # the classes, best first
    for metric in section.metrics:
        low, high = metric.interval
        assert f"{metric.name}{metric.value:.1f}95% interval {low:.1f} to {high:.1f}" in parsed.text
    total = section.confusion[:-1].sum(axis=1)
    assert f"{section.names[0]}{''.join(map(str, section.confusion[0].tolist()))}{total[0]}" in parsed.text
    assert parsed.tags.count("polyline") == 3 + 4  # three IoUs, four classes


def tiny_report_config(task, root, tmp_path, **options):
    kind = {"instance": "coco_instance", "panoptic": "coco_panoptic", "semantic": "sem_seg"}[task]
    cfg = data_cfg(task, custom=(custom_entry(kind, root),))
    counts = {f"MODEL.KNET.NUM_{x}_CLASSES": cfg.MODEL.KNET[f"NUM_{x}_CLASSES"] for x in ("THING", "STUFF")}
    names = cfg.DATASETS.TRAIN
    set_options(cfg, {**small(task), **RESNET, **TASKS[task], **counts, "MODEL.BACKBONE.FREEZE_AT": 0})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = names
    cfg.MODEL.KNET.TEST.THING_SCORE_THRESHOLD = cfg.MODEL.KNET.TEST.OVERLAP_THRESHOLD = 0.0
    cfg.OUTPUT_DIR = str(tmp_path)
    return set_options(cfg, options)


@pytest.mark.parametrize("task, metric", [("instance", "AP"), ("panoptic", "PQ"), ("semantic", "mIoU")])
def test_report_of_a_model(root, tmp_path, task, metric, caplog):
    cfg = tiny_report_config(task, root, tmp_path)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    if task != "semantic":
        spread_scores(model)
    evaluators = [Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])]
    results = quiet(Trainer.test, cfg, model, evaluators)
    caplog.set_level("INFO")
    write_report(cfg, model, evaluators, results, [{"iteration": 4, "total_loss": 2.0}])
    text = (tmp_path / "report.html").read_text()
    parsed = Tags(text)
    assert parsed.tags.count("img") == 12 and "://" not in text and len(text) < 2_000_000
    assert "Confusion matrix" in parsed.text and "95% interval" in parsed.text and "Training run" in parsed.text
    assert any(x.startswith(f"{metric} of {cfg.DATASETS.TEST[0]}: ") and "95% interval" in x for x in caplog.messages)
    lowest = rf"Images of {cfg.DATASETS.TEST[0]} with the lowest quality: \w+\.\w+ [01]\.\d{{3}}, "
    assert any(re.match(lowest, x) for x in caplog.messages)
    assert not model.training


def test_other_data_sets_than_the_own_of_a_run_have_another_report(tmp_path):
    cfg = get_knet_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ("x_val",)
    assert report_name(cfg) == "report.html"  # before there is a training run
    save_config(cfg, str(tmp_path))
    assert report_name(cfg) == "report.html"
    cfg.DATASETS.TEST = ("x_train", "../y")
    assert report_name(cfg) == "report_x_train_.._y.html"


def test_no_report_if_it_is_switched_off(root, tmp_path):
    cfg = tiny_report_config("semantic", root, tmp_path, **{"TEST.REPORT": False})
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    records = load_dataset(cfg.DATASETS.TEST[0])
    evaluator.reset()
    evaluator.process(records, [_one_hot(np.zeros((64, 64), int), 7)] * len(records))
    results = evaluator.evaluate()
    assert evaluator.sections == []
    write_report(cfg, torch.nn.Identity(), [evaluator], results)
    assert not (tmp_path / "report.html").exists()
