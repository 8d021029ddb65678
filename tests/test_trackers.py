"""Metrics and pictures in Weights & Biases, MLflow and Aim, with stand-ins for their modules."""

import importlib.machinery
import json
import math
import sys
import types

import numpy as np
import pytest
from detectron2.utils.events import EventStorage
from toys import Interrupted, ToyEvaluator, ToyNet, ToyTrainer, metrics_of, reset_toys, run, toy_cfg

from knet_d2.engine.trackers import TrackerWriter
from knet_d2.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_toys():
    yield
    reset_toys()


class Record:
    """What a stand-in was given: the scalars by name and iteration, pictures, configs, and the ids of its runs."""

    def __init__(self):
        self.scalars, self.pictures, self.configs, self.ids, self.closed = {}, {}, [], [], 0

    def add(self, name, value, step):
        if isinstance(value, np.ndarray):
            self.pictures[name] = value
        else:
            self.scalars.setdefault(name, []).append((step, value))

    def begin(self, run_id):
        self.ids.append(run_id)
        return run_id or "id7"

    def close(self):
        self.closed += 1


def wandb_module(record):
    def init(project, name, dir, config, id, resume):
        assert project == "knet_d2" and resume == (None if id is None else "allow")
        record.configs.append(config)

        def log(values, step):
            for key, value in values.items():
                record.add(key, value, step)

        return types.SimpleNamespace(id=record.begin(id), log=log, finish=record.close)

    return {"init": init, "Image": lambda picture: picture}


def mlflow_module(record):
    def start_run(run_id, run_name):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=record.begin(run_id)))

    def log_metrics(values, step):
        for key, value in values.items():
            assert not set(key) & set("<>()&:")
            record.add(key, value, step)

    return {
        "set_experiment": lambda name: None,
        "start_run": start_run,
        "log_dict": lambda config, path: record.configs.append(config),
        "log_metrics": log_metrics,
        "log_image": lambda picture, path: record.add(path, picture, 0),
        "end_run": record.close,
    }


def aim_module(record):
    class Run(dict):
        def __init__(self, run_hash, experiment):
            self.hash = record.begin(run_hash)

        def __setitem__(self, key, value):
            record.configs.append(value)

        def track(self, value, name, step):
            record.add(name, value, step)

        def close(self):
            record.close()

    return {"Run": Run, "Image": lambda picture: picture}


MODULES = {"wandb": wandb_module, "mlflow": mlflow_module, "aim": aim_module}


@pytest.fixture(params=MODULES)
def tracker(request, monkeypatch):
    record, module = Record(), types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    vars(module).update(MODULES[request.param](record))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, record


def test_scalars_of_a_run_and_its_resume(tmp_path, tracker):
    name, record = tracker
    options = {"SOLVER__TRACKERS": [name]}
    ToyNet.fail_at = ("image15.png", Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path, **options)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {name: "id7"}
    ToyNet.fail_at = (None, None)
    run(tmp_path, resume=True, **options)
    assert record.ids == [None, "id7"] and record.closed == 2
    assert record.configs[0]["SOLVER"]["MAX_ITER"] == 23
    records = metrics_of(tmp_path)
    assert {"loss_mask_s0", "panoptic_seg/PQ", "lr", "time"} <= set(record.scalars)
    for key in ("total_loss", "panoptic_seg/PQ"):  # the values of iteration 14 come twice
        assert dict(record.scalars[key]) == {x["iteration"]: x[key] for x in records if key in x}
    # Another run in the same folder is another run of the tracker
    run(tmp_path, **options)
    assert record.ids[2:] == [None] and (tmp_path / "trackers_1.json").exists()


def test_pictures_and_values_that_are_not_finite(tmp_path, tracker):
    name, record = tracker
    cfg = toy_cfg(tmp_path)
    writer = TrackerWriter(cfg, name)
    with EventStorage(4) as storage:
        storage.put_scalars(**{"segm/AP-<b> (2): a": 3.0, "bad": math.nan}, smoothing_hint=False)
        storage.put_image("validation/a.jpg", np.full((3, 4, 6), 9, np.uint8))
        writer.write()
    (picture,) = record.pictures.values()
    assert picture.shape == (4, 6, 3) and "bad" not in record.scalars
    ((key, values),) = record.scalars.items()
    assert values == [(4, 3.0)] and key.startswith("segm/AP-")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, tracker, caplog):
    name, record = tracker

    def fail(*arguments):
        raise ConnectionError("no route to host")

    record.add = fail
    run(tmp_path, SOLVER__TRACKERS=[name])
    warnings = [x for x in caplog.messages if "continues without it" in x]
    assert warnings == [f"{name} fails, so this run continues without it: ConnectionError: no route to host"]
    assert (tmp_path / "model_final.pth").exists()
    record.begin = fail
    run(tmp_path / "second", SOLVER__TRACKERS=[name])
    assert (tmp_path / "second" / "model_final.pth").exists()


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    ToyEvaluator.values = None
    with pytest.raises(ConfigError, match=r"SOLVER.TRACKERS = \['comet'\]: 'comet' is unknown; use wandb, mlflow, aim"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__TRACKERS=["comet"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package aim; python -m pip install aim"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__TRACKERS=["aim"]))
