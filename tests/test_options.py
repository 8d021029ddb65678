"""Options are in force, or refused: of a resumed run, in files and on command lines, and those that nothing reads."""

import logging
import re

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from program_helpers import ROOT, write_config
from toys import ToyNet, ToyTrainer, metrics_of, reset_toys, run, toy_cfg

import knet_d2
from knet_d2.checkpoint import changed_options, describe_model
from knet_d2.config import get_knet_cfg
from knet_d2.config.merging import load_config, merge_config
from knet_d2.config.unread import UNREAD, find_unread, warn_of_unread_options
from knet_d2.data.shapes import write_shapes
from knet_d2.engine.optimizer import load_optimizer_state
from knet_d2.engine.output_dir import release_output_dir, save_config
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.programs import train


@pytest.fixture(autouse=True)
def fresh_toys():
    reset_toys()
    yield
    reset_toys()


def rates(folder):
    return {x["iteration"]: x["lr"] for x in metrics_of(folder) if "lr" in x}


PLAIN = {"SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 0, "SOLVER__LOG_PERIOD": 1, "SOLVER__CHECKPOINT_PERIOD": 0}
CHANGES = {
    "BASE_LR": ({"SOLVER__BASE_LR": 0.5}, 0.5),
    "WEIGHT_DECAY": ({"SOLVER__WEIGHT_DECAY": 0.5}, 0.01),  # groups that were one are two
    "BACKBONE_MULTIPLIER": ({"SOLVER__BACKBONE_MULTIPLIER": 0.5}, None),
    "STEPS": ({"SOLVER__STEPS": (2,)}, 0.001),
    "MAX_ITER": ({"SOLVER__MAX_ITER": 12, "SOLVER__LR_SCHEDULER_NAME": "WarmupPolyLR"}, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_has_the_learning_rate_and_the_decay_of_its_options(tmp_path, change, caplog):
    """They are those of a run that had these options from its start; the optimiser's state is the earlier one."""
    options, rate = CHANGES[change]
    run(tmp_path / "run", **PLAIN, SOLVER__MAX_ITER=4)
    state = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"]
    options = {**PLAIN, "SOLVER__MAX_ITER": 8, **options}
    run(tmp_path / "fresh", **options)

    trainer = ToyTrainer(toy_cfg(tmp_path / "run", **options))
    with caplog.at_level(logging.WARNING, "knet_d2.engine.trainer"):
        trainer.resume_or_load(resume=True)
    told = [x for x in caplog.messages if "differ" in x]
    assert len(told) == 1 and all(f"{key.replace('__', '.')} " in told[0] for key in options if key not in PLAIN)
    moments = {name: value["exp_avg"] for name, value in by_name(trainer.optimizer.state_dict()).items()}
    assert moments.keys() == dict(ToyNet(None).named_parameters()).keys()
    for name, value in by_name(state).items():
        assert torch.equal(moments[name], value["exp_avg"])
    trainer.train()
    expected = {i: value for i, value in rates(tmp_path / "fresh").items() if i >= 4}
    assert expected and {i: value for i, value in rates(tmp_path / "run").items() if i >= 4} == expected
    if rate is not None:
        assert list(expected.values()) == pytest.approx([rate] * 4)
    files = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("run", "fresh")]
    saved, fresh = (settings(x["trainer"]["_trainer"]["optimizer"]) for x in files)
    assert saved == fresh


def by_name(state):
    return {
        name: state["state"][i]
        for group in state["param_groups"]
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }


def settings(state):
    return {
        name: (group["lr"], group["initial_lr"], group["weight_decay"])
        for group in state["param_groups"]
        for name in group["param_names"]
    }


def test_a_resumed_run_without_changes_says_nothing(tmp_path, caplog):
    run(tmp_path, SOLVER__MAX_ITER=4)
    with caplog.at_level(logging.WARNING, "knet_d2.engine.trainer"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__MAX_ITER=4)).resume_or_load(resume=True)
    assert not [x for x in caplog.messages if "differ" in x]


def test_a_resumed_run_refuses_another_optimiser(tmp_path):
    run(tmp_path, SOLVER__MAX_ITER=4)
    trainer = ToyTrainer(toy_cfg(tmp_path, SOLVER__MAX_ITER=8, SOLVER__OPTIMIZER="SGD"))
    with pytest.raises(CheckpointError, match="SOLVER.OPTIMIZER = 'SGD': the run was trained with 'ADAMW' so far"):
        trainer.resume_or_load(resume=True)


def test_state_of_other_parameters_is_refused():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    state = torch.optim.AdamW([("a", a)]).state_dict()
    with pytest.raises(CheckpointError, match="b is trained now, but was not.*FREEZE_AT"):
        load_optimizer_state(torch.optim.AdamW([("a", a), ("b", b)]), state)
    with pytest.raises(CheckpointError, match="b is not trained now, but was.*FREEZE_AT"):
        load_optimizer_state(torch.optim.AdamW([("a", a)]), torch.optim.AdamW([("a", a), ("b", b)]).state_dict())


def test_state_of_an_earlier_version_has_no_names():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    earlier = torch.optim.AdamW([a, b], lr=0.5)
    (a.sum() + 2 * b.sum()).backward()
    earlier.step()
    now = torch.optim.AdamW([("a", a), ("b", b)], lr=0.1)
    load_optimizer_state(now, earlier.state_dict())
    assert torch.equal(now.state[b]["exp_avg"], earlier.state[b]["exp_avg"]) and now.param_groups[0]["lr"] == 0.1
    with pytest.raises(CheckpointError, match="grouped otherwise"):
        load_optimizer_state(torch.optim.AdamW([{"params": [("a", a)]}, {"params": [("b", b)]}]), earlier.state_dict())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    write_shapes(str(folder / "options_data"), 3, seed=1, size=64)
    return write_config(folder, folder / "options_data", "instance", MAX_ITER=1, WARMUP_ITERS=0)


def arguments(config, *words):
    return train.get_parser().parse_args(["--config-file", config, *map(str, words)])


def test_config_file_of_a_resumed_run_says_what_is_in_force(tmp_path, config):
    out = ["OUTPUT_DIR", tmp_path]
    train.train(arguments(config, *out))

    def saved():
        return yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]

    before = saved()
    with pytest.raises(CheckpointError, match="SOLVER.OPTIMIZER"):
        train.train(arguments(config, "--resume", *out, "SOLVER.OPTIMIZER", "SGD", "SOLVER.MAX_ITER", 2))
    assert saved() == before
    train.train(arguments(config, "--resume", *out, "SOLVER.BASE_LR", "0.5", "SOLVER.MAX_ITER", 2))
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"]
    assert saved()["BASE_LR"] == 0.5 == state["param_groups"][0]["initial_lr"]


def test_evaluation_needs_weights(tmp_path, config):
    for words in ([], ["--resume"]):
        with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty.*name the weights to evaluate"):
            train.train(arguments(config, "--eval-only", *words, "OUTPUT_DIR", tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty: name the data sets"):
        train.train(arguments(config, "--eval-only", "OUTPUT_DIR", tmp_path / "empty", "DATASETS.TEST", "()"))


def test_a_resumed_run_with_another_model_names_its_options(tmp_path, config):
    train.train(arguments(config, "OUTPUT_DIR", tmp_path))
    with pytest.raises(CheckpointError, match=r"does not fit.*MODEL\.KNET\.NUM_STAGES 2 -> 1\. Set them back"):
        train.train(arguments(config, "--resume", "OUTPUT_DIR", tmp_path, "MODEL.KNET.NUM_STAGES", 1))


# Numbers and files


FLOATS = [
    ("SOLVER.EMA_DECAY", "0"),
    ("MODEL.KNET.LOSS.AUXILIARY_WEIGHT", "0"),
    ("MODEL.KNET.TEST.SCORE_THRESHOLD", "0"),
    ("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", "1"),
    ("SOLVER.POLY_LR_POWER", "1"),
    ("SOLVER.WEIGHT_DECAY", "0"),
    ("SOLVER.BASE_LR", "1"),
]


@pytest.mark.parametrize(("key", "value"), FLOATS)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_whole_numbers_are_floats_where_floats_are_meant(tmp_path, config, key, value, place):
    if place == "file":
        content = value
        for part in reversed(key.split(".")):
            content = {part: int(content) if content == value else content}
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({"_BASE_": config, **content}))
        cfg = load_config(str(path))
    else:
        cfg = load_config(config, [key, value])
    for part in key.split("."):
        cfg = cfg[part]
    assert type(cfg) is float and cfg == float(value)


def test_all_floats_take_whole_numbers_and_nothing_else_does(config):
    """Over every option: a whole number never is an error where the default is a float, nor a float for a whole one."""
    for key, value in leaves(get_knet_cfg()):
        cfg = get_knet_cfg()
        if type(value) is float:
            merge_config(cfg, "", [key, "0"])
        elif type(value) is int:
            with pytest.raises(ConfigError, match="Type mismatch"):
                merge_config(cfg, "", [key, "0.5"])


def test_zero_stands_for_none_as_documented(tmp_path):
    """Each row of CONFIG.md with a meaning of 0 is an option that 0 is accepted for, in a whole run."""
    text = (ROOT / "docs" / "CONFIG.md").read_text()
    keys = re.findall(r"^\| `([A-Z_.0-9]+)` .*\b0 = ", text, flags=re.MULTILINE)
    assert {"SOLVER.EMA_DECAY", "SOLVER.CHECKPOINTS_TO_KEEP", "MODEL.KNET.LOSS.AUXILIARY_WEIGHT"} <= set(keys)
    keys = [key for key in keys if not key.endswith("TEST.STAGE")]  # its 0 is a stage
    write_shapes(str(tmp_path / "zero_data"), 3, seed=1, size=64)
    config = write_config(tmp_path, tmp_path / "zero_data", "panoptic", MAX_ITER=1, WARMUP_ITERS=0)
    zeros = [word for key in keys for word in (key, "0")]
    train.train(arguments(config, "OUTPUT_DIR", tmp_path / "out", *zeros))
    assert (tmp_path / "out" / "model_final.pth").exists()


REPEATED = {
    "SOLVER:\n  BASE_LR: 1\n  MAX_ITER: 5\n  BASE_LR: 2\n": "c.yaml: SOLVER.BASE_LR stands twice, in line 2 and line 4",
    "SOLVER: {MAX_ITER: 5}\nSEED: 1\nSOLVER: {BASE_LR: 0.2}\n": "SOLVER stands twice, in line 1 and line 3",
    "DATASETS:\n  CUSTOM:\n  - name: a\n    type: b\n    name: c\n": "DATASETS.CUSTOM.0.name .*line 3 and line 5",
    "_BASE_: base.yaml\n": "base.yaml: SEED stands twice, in line 1 and line 2",
    "_BASE_: [base.yaml]\n": "base.yaml: SEED stands twice, in line 1 and line 2",
}


@pytest.mark.parametrize("text", REPEATED)
def test_a_key_that_stands_twice_is_an_error(tmp_path, text):
    (tmp_path / "base.yaml").write_text("SEED: 1\nSEED: 2\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=REPEATED[text]):
        merge_config(get_knet_cfg(), str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SEED", "1", "--resume"], "--resume is among the KEY VALUE pairs, which end the line: put it before them"),
        (["--num-gpus", "2", "SEED", "1"], "--num-gpus is among the KEY VALUE pairs"),
        (["SEED"], "Options come as KEY VALUE pairs; 'SEED' has no value"),
    ],
)
def test_options_that_are_no_pairs(opts, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("", opts)


def test_keys_of_several_mappings_may_be_equal(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER: &a {MAX_ITER: 5}\nDATASETS: {CUSTOM: [{a: 1}, {a: 1}, {a: [1, 2]}]}\n")
    merge_config(get_knet_cfg(), str(tmp_path / "c.yaml"))
    (tmp_path / "circle.yaml").write_text("_BASE_: circle.yaml\n")
    with pytest.raises(ConfigError):
        merge_config(get_knet_cfg(), str(tmp_path / "circle.yaml"))
    (tmp_path / "old.yaml").write_text("VERSION: 1\n")
    with pytest.raises(ConfigError, match="VERSION is 1: only configs of version 2"):
        merge_config(get_knet_cfg(), str(tmp_path / "old.yaml"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("QUARTER_TURNS: True", ["Default", "RandomQuarterTurns"]),
        ("QUARTER_TURNS: False", ["Default"]),
        (
            "{QUARTER_TURNS: True, AUGMENTATIONS: [{name: Default}, {name: RandomFlip}]}",
            ["Default", "RandomFlip", "RandomQuarterTurns"],
        ),
        (
            "{QUARTER_TURNS: True, AUGMENTATIONS: [{name: RandomFlip}]}",
            ["RandomFlip"],
        ),  # Without Default it had no effect
        ("{QUARTER_TURNS: False, AUGMENTATIONS: [{name: Default}, {name: RandomQuarterTurns}]}", ["Default"]),
    ],
)
def test_the_former_key_of_quarter_turns_is_translated(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(f"INPUT:\n  {text}\n")
    merge_config(cfg := get_knet_cfg(), str(tmp_path / "c.yaml"))
    assert [entry["name"] for entry in cfg.INPUT.AUGMENTATIONS] == expected
    with pytest.raises(ConfigError, match="INPUT.QUARTER_TURNS. Add {name: RandomQuarterTurns} to INPUT.AUGMENTATIONS"):
        merge_config(cfg, "", ["INPUT.QUARTER_TURNS", "True"])


# What nothing reads


def leaves(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nodes(cfg, prefix=""):
    yield prefix, cfg
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from nodes(value, f"{prefix}{key}.")


# Read in cases that the runs of the test below do not have; masks are bitmasks whatever the last one says
SOMETIMES = {
    *("CUDNN_BENCHMARK", "TEST.PRECISE_BN.NUM_ITER", "INPUT.MASK_FORMAT"),
    *("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS"),
}


def test_the_list_of_options_that_are_not_read_is_right(tmp_path, monkeypatch):
    """Record what training, evaluation and prediction read of Detectron2's options; all the rest is in the list."""
    places = {frozenset(node): prefix for prefix, node in nodes(get_knet_cfg())}
    read, original = set(), CfgNode.__getattr__

    def record(node, name):
        read.add(f"{places.get(frozenset(node), '?.')}{name}")
        return original(node, name)

    for number, (task, more) in enumerate(
        (
            ("instance", ["TEST.NUM_PICTURES", 1, "TEST.VALIDATION_LOSS", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True]),
            ("panoptic", ["SOLVER.OPTIMIZER", "SGD", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]),
            ("semantic", ["TEST.AUG.ENABLED", True, "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", "(64, 64)"]),
        )
    ):
        data = tmp_path / f"read_data{number}"
        write_shapes(str(data), 3, seed=1, size=64)
        config = write_config(tmp_path, data, task, MAX_ITER=1, WARMUP_ITERS=0)
        with monkeypatch.context() as patch:
            patch.setattr(CfgNode, "__getattr__", record)
            train.train(arguments(config, "OUTPUT_DIR", tmp_path / task, *more))
            knet_d2.load(tmp_path / task / "model_final.pth", device="cpu")
    keys = {key for key, _ in leaves(get_cfg())}
    listed = {key for key in keys if find_unread(key)}
    assert not listed & read
    assert keys - listed - read <= SOMETIMES
    ours = {key for key, _ in leaves(get_knet_cfg())}
    for entry, instead in UNREAD.items():
        assert any(find_unread(key) == entry for key in keys), entry
        assert not instead or instead.split(",")[0] in ours or instead == "MODEL.KNET.TASK"


def test_options_that_are_not_read_are_told_once(tmp_path, config, caplog):
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5, "MODEL.RPN.NMS_THRESH", 0.5]
    with caplog.at_level(logging.WARNING, "knet_d2.config.unread"):
        train.setup(arguments(config, "OUTPUT_DIR", tmp_path, *options))
    told = [x for x in caplog.messages if "does not read" in x]
    assert len(told) == 1
    for part in (
        "MODEL.ROI_HEADS.NUM_CLASSES (use MODEL.KNET.NUM_THING_CLASSES)",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST (use MODEL.KNET.TEST.SCORE_THRESHOLD)",
        "MODEL.RPN.NMS_THRESH, ",
    ):
        assert part in told[0]
    release_output_dir(str(tmp_path))


def test_config_that_a_run_has_written_is_the_same_config(tmp_path, config, caplog):
    """YAML has lists where the defaults of Detectron2 have tuples of tuples."""
    cfg = train.setup(arguments(config, "OUTPUT_DIR", tmp_path))
    release_output_dir(str(tmp_path))
    save_config(cfg, str(tmp_path))
    again = get_knet_cfg()
    merge_config(again, str(tmp_path / "config.yaml"))
    weights = "BBOX_REG_WEIGHTS"
    assert again.MODEL.ROI_BOX_CASCADE_HEAD[weights] != cfg.MODEL.ROI_BOX_CASCADE_HEAD[weights]  # lists and tuples
    caplog.clear()
    warn_of_unread_options(again)
    assert not caplog.messages
    first, second = describe_model(cfg), describe_model(again)
    assert first == second and weights not in second["config"]
    stored = {"MODEL": {"ROI_BOX_CASCADE_HEAD": {weights: again.MODEL.ROI_BOX_CASCADE_HEAD[weights]}}}
    default = {"config": "{}"}
    assert changed_options({"config": yaml.safe_dump(stored)}, default) == {}
    stored["MODEL"]["ROI_BOX_CASCADE_HEAD"][weights][1][0] = 21.0
    assert len(changed_options({"config": yaml.safe_dump(stored)}, default)) == 1


def test_our_configs_set_nothing_that_is_not_read(caplog):
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        cfg = get_knet_cfg()
        merge_config(cfg, str(path))
        cfg.MODEL.META_ARCHITECTURE = "KNet"
        warn_of_unread_options(cfg)
    assert not caplog.messages
