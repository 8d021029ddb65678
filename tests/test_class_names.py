"""Classes of a weights file are matched by name with those of the data set: order, other names, none."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg, edit_json, unique_name
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image
from program_helpers import write_config

import knet_d2
from knet_d2.checkpoint import Checkpointer, describe_model
from knet_d2.checkpoint.class_rows import class_parameters, match_rows, take_rows
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data.classes import ClassTable, class_table
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import load_config
from knet_d2.errors import CheckpointError
from knet_d2.inference.from_file import resolve_model
from knet_d2.programs import train
from knet_d2.results.prediction import Prediction
from knet_d2.results.segment import Segment
from knet_d2.tasks import TASKS

NAMES = {
    "instance": (["cup", "bowl", "fork"], []),
    "panoptic": (["cup", "bowl", "fork"], ["wall", "table"]),
    "semantic": ([], ["cup", "bowl", "fork", "wall", "table"]),
}
# The model's class at each place of the new order
ORDER = {"instance": [2, 0, 1], "panoptic": [2, 0, 1, 4, 3], "semantic": [3, 0, 4, 2, 1]}


def table(things, stuff, ids=None):
    names = [*things, *stuff]
    return ClassTable(names, list(range(len(names))), [(0, 0, 0)] * len(names), len(things), ids or ())


def reordered(classes, order):
    return classes._replace(names=[classes.names[i] for i in order])


def trained(task):
    """A model whose parameters and results all differ from class to class."""
    options = {"MODEL.KNET.TEST.THING_SCORE_THRESHOLD": 0.0, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0}
    model = tiny_model(task, options)
    if task != "semantic":
        spread_scores(model)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if "classifier" in name:
            value.add_(torch.rand(value.shape, generator=generator) * 0.2)
    return model.eval()


def written(folder, task, classes, model):
    path = str(folder / "model.pth")
    cfg = tiny_config(task)
    save_weights(path, model.state_dict(), describe_model(cfg, classes))
    return path


def test_the_classifier_of_pooled_features_has_a_row_per_class():
    names = tiny_model("panoptic", {"MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True}).state_dict()
    found = {name for name in class_parameters(names) if "pooled_classes" in name}
    assert found == {f"cascade.stages.{i}.pooled_classes.classifier.weight" for i in range(3)}


@pytest.mark.parametrize("task", NAMES)
def test_a_model_with_reordered_classes_gives_the_same(tmp_path, task, caplog):
    classes, order = table(*NAMES[task]), ORDER[task]
    model, target = trained(task), tiny_model(task, seed=5).eval()
    path = written(tmp_path, task, classes, model)
    with caplog.at_level(logging.WARNING, "fvcore.common.checkpoint"):
        Checkpointer(target, classes=reordered(classes, order)).load(path)
    told = [x for x in caplog.messages if "in another order" in x]
    assert len(told) == 1 and ", ".join(classes.names[i] for i in order) in told[0]
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.double(), target.double()  # sums over kernels are rounded by their order
    with torch.no_grad():
        expected, found = model.network(image), target.network(image)
    matched, kernels = model.bank.num_matched, list(range(model.bank.num_matched))
    kernels += [matched + model.bank.fixed_class_ids.index(i) for i in order if i in model.bank.fixed_class_ids]
    for a, b in zip([expected.state, *expected.stages], [found.state, *found.stages], strict=True):
        torch.testing.assert_close(b.mask_logits, a.mask_logits[:, kernels])
    for a, b in zip(expected.stages, found.stages, strict=True):
        if a.class_logits is not None:
            torch.testing.assert_close(b.class_logits, a.class_logits[:, kernels][..., order])
    if task != "semantic":
        torch.testing.assert_close(found.state.semantic_logits, expected.state.semantic_logits[:, order])
    else:
        assert torch.equal(
            target.auxiliary_head.classifier.conv.weight, model.auxiliary_head.classifier.conv.weight[order]
        )
    # what depends on the order is all there is: every other parameter is the file's
    changed = {name for name, value in target.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == set(class_parameters(model.state_dict()))


@pytest.mark.parametrize("task", NAMES)
def test_parameters_with_a_row_per_class(task):
    """They are those whose first dimension follows the number of classes."""
    more = {"MODEL.KNET.NUM_THING_CLASSES": 4 if task != "semantic" else 0, "MODEL.KNET.NUM_STUFF_CLASSES": 7}
    a, b = tiny_model(task).state_dict(), tiny_model(task, more).state_dict()
    assert set(class_parameters(a)) == {name for name in a if a[name].shape != b[name].shape}
    assert len(class_parameters(a)) == {"instance": 8, "panoptic": 8, "semantic": 4}[task]


def test_same_order_and_files_without_names_are_taken_as_they_are(tmp_path, caplog):
    classes, model = table(*NAMES["panoptic"]), trained("panoptic")
    unnamed = classes._replace(names=[str(i) for i in range(5)])
    others = classes._replace(names=["a", "b", "c", "d", "e"])
    for in_file, wanted in ((classes, classes), (unnamed, others), (classes, unnamed), (classes, None)):
        target = tiny_model("panoptic", seed=5)
        Checkpointer(target, classes=wanted).load(written(tmp_path, "panoptic", in_file, model))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in target.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    Checkpointer(target, classes=others).load(str(tmp_path / "bare.pth"))
    assert not [x for x in caplog.messages if "data set" in x]


def test_other_names_are_an_error_that_names_the_first(tmp_path):
    classes, model = table(*NAMES["panoptic"]), trained("panoptic")
    path = written(tmp_path, "panoptic", classes, model)
    for names, said in (
        (
            ["cup", "cat", "dog", "wall", "table"],
            "the data set has the thing class 'cat', which the weights file lacks",
        ),
        (["cup", "bowl", "fork", "wall", "sky"], "the data set has the stuff class 'sky'"),
        (["cup", "bowl", "wall", "fork", "table"], "the data set has the thing class 'wall'"),  # a thing, no stuff
    ):
        with pytest.raises(CheckpointError, match=f"{said}.*fine-tune"):
            Checkpointer(tiny_model("panoptic"), classes=classes._replace(names=names)).load(path)
    fewer = table(["cup", "bowl"], ["wall", "table"])
    target = tiny_model("panoptic", {"MODEL.KNET.NUM_THING_CLASSES": 2})
    with pytest.raises(CheckpointError, match="the weights file has the thing class 'fork', which the data set lacks"):
        Checkpointer(target, classes=fewer).load(path)


def test_fine_tuning_keeps_rows_of_the_same_name(tmp_path, caplog):
    classes, model = table(*NAMES["panoptic"]), trained("panoptic")
    path = written(tmp_path, "panoptic", classes, model)
    wanted = table(["fork", "cat", "cup", "dog"], ["table", "sea"])
    target = tiny_model("panoptic", {"MODEL.KNET.NUM_THING_CLASSES": 4}, seed=5)
    initial = {name: value.clone() for name, value in target.state_dict().items()}
    with caplog.at_level(logging.WARNING, "fvcore.common.checkpoint"):
        Checkpointer(target, partial=True, classes=wanted).load(path)
    told = [x for x in caplog.messages if "other classes" in x]
    assert len(told) == 1 and "kept, by name: fork, cup, table. Rows that start anew: cat, dog, sea." in told[0]
    names = class_parameters(initial)
    assert len(names) == 8
    for name in names:
        value, source = target.state_dict()[name], model.state_dict()[name]
        assert torch.equal(value[[0, 2, 4]], source[[2, 0, 4]])
        assert torch.equal(value[[1, 3, 5]], initial[name][[1, 3, 5]])


def test_classes_with_one_name_keep_their_order():
    twice = table(["a", "b", "a"], ["a"])
    assert match_rows(twice, twice) == [0, 1, 2, 3]
    assert match_rows(table(["a", "a", "c"], ["a"]), twice) == [0, 2, None, 3]


def test_taking_rows_changes_nothing_in_place():
    state = {"classifier.weight": torch.arange(6.0).view(3, 2), "other": torch.ones(1)}
    initial = {"classifier.weight": -torch.ones(4, 2)}
    found = take_rows(state, [2, None, 0, None], initial)
    assert found["classifier.weight"].tolist() == [[4, 5], [-1, -1], [0, 1], [-1, -1]]
    assert state["classifier.weight"].tolist() == [[0, 1], [2, 3], [4, 5]] and found["other"] is state["other"]
    assert (initial["classifier.weight"] == -1).all()


def test_a_list_of_classes_that_is_not_the_parameters(tmp_path):
    model = trained("instance")
    path = written(tmp_path, "instance", table(["a", "b", "c", "d"], []), model)
    with pytest.raises(CheckpointError, match=r"names 4 classes, but .* has 3 rows"):
        Checkpointer(tiny_model("instance"), classes=table(["c", "b", "a"], [])).load(path)
    content = torch.load(path, weights_only=True)
    for text in ("{", "[" * 100_000, "[1]", '[{"id": 1}]'):
        content["metadata"]["classes"] = text
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="list of classes"):
            Checkpointer(tiny_model("instance"), classes=table(["c", "b", "a"], [])).load(path)


# Whole programs


def other_order(folder, names=None):
    """A copy of the shapes whose things have their category ids the other way round, or other names."""
    write_shapes(str(folder), 4, seed=5, size=64)

    def change(content):
        things = sorted(x["id"] for x in content["categories"] if x["isthing"])
        other = dict(zip(things, things[::-1], strict=True))
        for x in content["categories"]:
            x["id"] = other.get(x["id"], x["id"])
            x["name"] = (names or {}).get(x["name"], x["name"])
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["category_id"] = other.get(segment["category_id"], segment["category_id"])

    edit_json(str(folder / "panoptic.json"), change)
    return folder


def evaluation(config, folder, *opts):
    arguments = ["--config-file", config, "--eval-only", "OUTPUT_DIR", str(folder / "out"), *opts]
    return train.train(default_argument_parser().parse_args(arguments))


@pytest.fixture
def runs(tmp_path):
    """Configs of the shapes: in their order, in another one, with other names; and weights for the first."""
    configs = {}
    for name, make in (
        ("own", lambda folder: write_shapes(str(folder), 4, seed=5, size=64)),
        ("reversed", other_order),
        ("animals", lambda folder: other_order(folder, {"circle": "cat", "square": "dog"})),
    ):
        (tmp_path / name).mkdir()
        data = tmp_path / unique_name(name)  # which also names the data set
        make(data)
        configs[name] = write_config(tmp_path / name, data, "panoptic", MAX_ITER=2, WARMUP_ITERS=0)
    cfg = load_config(configs["own"])
    torch.manual_seed(0)
    model = spread_scores(knet_d2.KNet(cfg))
    path = str(tmp_path / "model.pth")
    save_weights(path, model.state_dict(), describe_model(cfg))
    return configs, path


def test_evaluation_on_the_same_classes_in_another_order(tmp_path):
    data = tmp_path / unique_name("own")
    write_shapes(str(data), 4, seed=5, size=64)
    own = write_config(tmp_path, data, "semantic")
    other = tmp_path / unique_name("reversed")
    shutil.copytree(data, other)
    for path in (other / "semantic").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels < 7, 6 - labels, labels).astype(np.uint8)).save(path)
    edit_json(str(other / "panoptic.json"), lambda content: content["categories"].reverse())
    (tmp_path / "other").mkdir()
    reverse = write_config(tmp_path / "other", other, "semantic")

    cfg = load_config(own)
    torch.manual_seed(0)
    model = knet_d2.KNet(cfg)
    weights = str(tmp_path / "model.pth")
    save_weights(weights, model.state_dict(), describe_model(cfg))
    expected, found = (evaluation(c, tmp_path, "MODEL.WEIGHTS", weights)["sem_seg"] for c in (own, reverse))
    assert found == pytest.approx(expected, rel=1e-3) and expected["mIoU"] > 0
    assert list(expected) != list(found)  # IoU-<class>, in the order of the classes


def test_evaluation_on_other_classes_is_an_error(tmp_path, runs):
    configs, weights = runs
    with pytest.raises(CheckpointError, match="the data set has the thing class 'dog'"):
        evaluation(configs["animals"], tmp_path, "MODEL.WEIGHTS", weights)


def test_prediction_names_the_right_classes(runs, tmp_path):
    configs, weights = runs
    image = str(next(tmp_path.glob("own_*/images/*")))
    found = []
    for opts in ({"config_file": configs["own"]}, {"config_file": configs["reversed"]}, {}):
        outputs = ["MODEL.KNET.TEST.OUTPUTS", "['instances']"]
        predictor = knet_d2.load(weights, device="cpu", confidence_threshold=0.0, opts=outputs, **opts)
        found.append([(predictor.classes.names[x.label], x.area) for x in predictor(image).segments])
    assert found[0] == found[1] == found[2] and len({name for name, _ in found[0]}) > 1
    with pytest.raises(CheckpointError, match="other classes"):
        knet_d2.load(weights, device="cpu", config_file=configs["animals"])


def test_names_of_the_weights_stand_in_for_those_of_a_data_set_that_is_not_there(runs, tmp_path):
    configs, weights = runs
    cfg = load_config(configs["own"])
    expected = class_table(cfg)
    cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], ["gone_train"], ["gone_val"]
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(cfg.dump())
    assert not class_table(load_config(str(elsewhere))).has_names
    opts = ["MODEL.KNET.TEST.OUTPUTS", "['instances']"]
    args = {"device": "cpu", "confidence_threshold": 0.0, "opts": opts}
    predictor = knet_d2.load(weights, config_file=str(elsewhere), **args)
    assert predictor.classes.names == expected.names and predictor.classes.category_ids == expected.category_ids
    image = str(next(tmp_path.glob("own_*/images/*")))
    names = [x["category_name"] for x in predictor(image).to_coco()]
    assert names and set(names) <= set(expected.thing_names)
    # Names that fit another number of classes are not taken
    assert expected._replace(names=list("0123456")).named_like(expected._replace(num_things=3)).names == list("0123456")


def test_training_starts_from_rows_of_the_same_name_and_a_resumed_run_keeps_its_order(runs, tmp_path):
    configs, weights = runs
    out = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.BASE_LR", "1e-9", "MODEL.WEIGHTS", weights]
    train.train(default_argument_parser().parse_args(["--config-file", configs["reversed"], *out]))
    start = torch.load(weights, weights_only=True)["model"]
    tuned = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    for name in class_parameters(start):
        torch.testing.assert_close(tuned["model"][name], start[name][[3, 2, 1, 0, 4, 5, 6]], rtol=1e-4, atol=1e-6)
    names = [x["name"] for x in json.loads(tuned["metadata"]["classes"])]
    assert names[:4] == class_table(load_config(configs["own"])).names[3::-1]
    again = ["--config-file", configs["own"], "--resume", *out, "SOLVER.MAX_ITER", "3"]
    with pytest.raises(CheckpointError, match="another order than the data set has now"):
        train.train(default_argument_parser().parse_args(again))


# Ids


def test_to_coco_has_the_ids_of_the_data_sets_files(tmp_path):
    classes = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val"), TASKS["instance"])
    label = classes.names.index("toothbrush")
    assert (classes.category_ids[label], classes.dataset_ids[label]) == (79, 90)
    segment = Segment.from_mask(np.ones((4, 5), bool), label, 0.5)
    prediction = Prediction((4, 5), [segment], classes)
    assert prediction.to_coco()[0]["category_id"] == 90
    content = prediction.to_coco_file("a.jpg")
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
