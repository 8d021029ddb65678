"""Fine-tuning by the recipes in configs/finetune, from weights for other classes, with one command."""

import json
import shutil

import pytest
import torch
import yaml
from data_helpers import custom_entry, edit_json
from detectron2.engine import default_argument_parser
from program_helpers import TINY_MODEL

from knet_d2.checkpoint.zoo import zoo_entry
from knet_d2.config.files import get_config_file
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import Trainer, load_config
from knet_d2.errors import ConfigError
from knet_d2.programs import train

TYPES = {"instance": "coco_instance", "panoptic": "coco_panoptic", "semantic": "sem_seg"}


def stated(name):
    """A config as it is written, with its base files, but without a data set to take the classes from."""
    counts = ["MODEL.KNET.NUM_THING_CLASSES", "3", "MODEL.KNET.NUM_STUFF_CLASSES", "2"]
    return load_config(get_config_file(name), [*counts, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])


@pytest.mark.parametrize("task", TYPES)
def test_recipes(task):
    """The learning rate is the official one for the batch, the weights are published and for the same model."""
    cfg = stated(f"finetune/{task}.yaml")
    name = cfg.MODEL.WEIGHTS.removeprefix("knet://")
    assert zoo_entry(name).url
    official = stated(f"{name}.yaml")
    assert cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH == official.SOLVER.BASE_LR / official.SOLVER.IMS_PER_BATCH
    scaled = Trainer.auto_scale_workers(cfg, 4)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER) == (32, 0.0002, 250)
    for cfg_ in (cfg, official):
        for key in ("RESNETS", "SEM_SEG_HEAD"):
            cfg_.MODEL[key].NORM = "BN"
        cfg_.MODEL.WEIGHTS = ""
    assert cfg.MODEL == official.MODEL
    assert cfg.TEST.EVAL_PERIOD < cfg.SOLVER.MAX_ITER and cfg.TEST.VALIDATION_LOSS and cfg.SOLVER.EMA_DECAY > 0
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def test_a_recipe_without_data_says_so():
    with pytest.raises(ConfigError, match="DATASETS.TRAIN and DATASETS.TEST are empty. Name a data set"):
        load_config(get_config_file("finetune/instance.yaml"))


@pytest.mark.parametrize("task", TYPES)
def test_other_classes_with_one_command(tmp_path, task):
    """A data set with fewer classes, divided for validation, given on the command line."""
    write_shapes(str(tmp_path / "data"), num_images=5, seed=8, size=64)
    config = tmp_path / "tiny.yaml"
    content = {
        "_BASE_": get_config_file(f"finetune/{task}.yaml"),
        "MODEL": TINY_MODEL,
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TRAIN_SAMPLING": "choice", "MIN_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 4, "ACCUMULATE_GRADIENTS": 2, "MAX_ITER": 2, "WARMUP_ITERS": 0},
        "TEST": {"EVAL_PERIOD": 2, "NUM_PICTURES": 0},
    }
    if task == "semantic":
        content["INPUT"]["CROP"] = {"SIZE": [64, 64]}
    config.write_text(yaml.safe_dump(content))

    def classes(cfg):
        return cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.KNET.NUM_STUFF_CLASSES

    entry = custom_entry(TYPES[task], str(tmp_path / "data"))
    own = load_config(str(config), ["DATASETS.CUSTOM", str([entry]), "DATASETS.TRAIN", f"('{entry['name']}',)"])
    torch.manual_seed(0)
    weights = Trainer.build_model(own).state_dict()
    torch.save({"model": weights}, tmp_path / "own.pth")

    less = shutil.copytree(tmp_path / "data", tmp_path / "less")
    changes = {"validation": 0.4}
    if task == "semantic":
        changes.update(classes=["circle", "square", "triangle", "star"], ignore=[4, 5, 6, 255])
    else:
        for name in ("instances.json", "panoptic.json"):
            edit_json(str(less / name), _without_stars)
    entry = custom_entry(TYPES[task], str(less), **changes)
    names = (f"('{entry['name']}_{part}',)" for part in ("train", "val"))
    opts = ["DATASETS.CUSTOM", str([entry]), "DATASETS.TRAIN", next(names), "DATASETS.TEST", next(names)]
    opts += ["MODEL.WEIGHTS", str(tmp_path / "own.pth"), "OUTPUT_DIR", str(tmp_path / "out")]
    train.train(default_argument_parser().parse_args(["--config-file", str(config), *opts]))

    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    expected = {"instance": ((4, 0), (3, 0)), "panoptic": ((4, 3), (3, 3)), "semantic": ((0, 7), (0, 4))}[task]
    assert (classes(own), classes(cfg)) == expected
    tuned = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert list(tuned) == list(weights)
    changed = {name for name in tuned if tuned[name].shape != weights[name].shape}
    assert changed and not any(name.startswith("backbone.") for name in changed)
    # two small steps away from the weights that were loaded
    kept = [name for name in set(tuned) - changed if name.endswith("weight") and tuned[name].dim() > 1]
    assert max(float((tuned[name] - weights[name]).abs().max()) for name in kept) < 1e-3
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert metrics[-1]["validation/total_loss"] > 0


def _without_stars(content):
    """Remove the last thing class; its objects become the one before."""
    star = next(x["id"] for x in content["categories"] if x["name"] == "star")
    content["categories"] = [x for x in content["categories"] if x["id"] != star]
    for annotation in content["annotations"]:
        for part in annotation.get("segments_info", [annotation]):
            if part["category_id"] == star:
                part["category_id"] -= 1
