"""Options are in force, or refused: of a resumed run, in files and on command lines, and those that nothing reads."""

import logging

import pytest
import torch
import yaml
from program_helpers import write_config
from toys import ToyNet, ToyTrainer, metrics_of, reset_toys, run, toy_cfg

from knet_d2.data.shapes import write_shapes
from knet_d2.engine.optimizer import load_optimizer_state
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
