"""Whole runs: resume, checkpoints that are kept, evaluation, writers."""

import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, default_argument_parser
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import (
    Interrupted,
    ToyEvaluator,
    ToyNet,
    ToyTrainer,
    assert_identical,
    knet_cfg,
    metrics_of,
    reset_toys,
    run,
    toy_cfg,
)

from knet_d2.engine import setup
from knet_d2.engine import trainer as trainer_module
from knet_d2.engine.failures import explain
from knet_d2.engine.output_dir import lock_output_dir
from knet_d2.engine.stop_signals import Preempted
from knet_d2.engine.writers import ConsoleWriter, TensorBoardWriter, bounded_storage, cut_metrics, scalar_tag
from knet_d2.errors import CheckpointError, ConfigError, NonFiniteError
from knet_d2.evaluation import best_metric


@pytest.fixture(autouse=True)
def clean_toys():
    yield
    reset_toys()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_metrics_file(whole_run):
    records = metrics_of(whole_run)
    # every 5 iterations, at the evaluation after 14, and at the end
    assert [r["iteration"] for r in records] == [4, 9, 13, 14, 19, 22]
    assert [r["iteration"] for r in records if "panoptic_seg/PQ" in r] == [13, 22]
    for r in records:
        assert {"total_loss", "loss_mask_s0", "loss_mask_s1", "lr", "grad_norm"} <= set(r)
        assert not {"time", "data_time", "eta_seconds"} & set(r)
    assert records[0]["lr"] == pytest.approx(0.01 * (0.001 + 0.999 * 4 / 10))
    assert records[-1]["lr"] == pytest.approx(0.01 * 0.01)


@pytest.mark.parametrize("moment", ["image3.png", "image9.png", "evaluation", "image14.png", "image22.png", "tail"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, whole_run, moment):
    """Weights, optimiser, schedule, iteration and the bytes of metrics.json."""
    ToyEvaluator.interrupt = moment == "evaluation"
    ToyNet.fail_at = (moment, Interrupted())
    if moment == "tail":  # killed while it appended a line
        shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
        (tmp_path / "last_checkpoint").write_text("model_0000013.pth")
        with open(tmp_path / "metrics.json", "a") as f:
            f.write('{"iteration": 23, "total_l')
    else:
        with pytest.raises(Interrupted):
            run(tmp_path)
    ToyEvaluator.interrupt, ToyNet.fail_at = False, (None, None)
    trainer = run(tmp_path, resume=True)
    starts = {"image3.png": 0, "image9.png": 7, "evaluation": 14, "image14.png": 14, "image22.png": 21, "tail": 14}
    assert trainer.start_iter == starts[moment] and trainer.iter == 23
    for name in ("model_final.pth", "model_best.pth"):
        states = [torch.load(folder / name, weights_only=True) for folder in (whole_run, tmp_path)]
        assert_identical(*states)
    state = states[0]["trainer"]
    assert state["_trainer"]["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    assert state["hooks"]["LRScheduler"]["last_epoch"] > 0
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("moment, iteration", [("image9.png", 9), ("image13.png", 13), ("evaluation", 13)])
def test_signal_saves_the_iteration_and_stops(tmp_path, whole_run, monkeypatch, number, moment, iteration):
    """In an iteration, in one that has a checkpoint and an evaluation anyway, and while its evaluation runs."""
    evaluated = []

    def send_signal(net, samples):
        if moment == "evaluation":
            hit = not net.training
        else:
            hit = samples[0]["file_name"] == moment
        evaluated.append(not net.training)
        if hit:
            os.kill(os.getpid(), number)
        return forward(net, samples)

    forward = ToyNet.forward
    monkeypatch.setattr(ToyNet, "forward", send_signal)
    monkeypatch.setattr(ToyTrainer, "build_test_loader", lambda cfg, name: [[{"image": torch.ones(3, 8, 8)}]] * 3)
    handler = signal.getsignal(number)
    with pytest.raises(Preempted) as stop:
        run(tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1)
    assert stop.value.code == 75 and signal.getsignal(number) is handler
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{iteration:07d}.pth"
    assert len(list(tmp_path.glob("model_0*.pth"))) == 1
    assert sum(evaluated) == (moment == "evaluation")  # one image of three
    monkeypatch.undo()
    assert run(tmp_path, resume=True).start_iter == iteration + 1
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole_run, tmp_path)]
    assert_identical(*states)
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


def hold_lock(folder, ready):
    lock_output_dir(str(folder))
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,), daemon=True).start()
    ready.set()
    time.sleep(60)


def test_second_training_in_a_folder_is_refused(tmp_path):
    """The folder is free again when the first run has ended, even if it was killed and its child process still runs."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=hold_lock, args=(tmp_path, ready))
    first.start()
    assert ready.wait(10)
    with pytest.raises(ConfigError, match=f"OUTPUT_DIR = .*: process {first.pid} on {socket.gethostname()} trains"):
        run(tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    first.kill()
    first.join()
    run(tmp_path, SOLVER__MAX_ITER=1)
    run(tmp_path, resume=True, SOLVER__MAX_ITER=2)  # in the same process


# ---- average of the weights ------------------------------------------------------------------------------------


class Recorder(HookBase):
    """Copies of the weights that are trained, after every step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: p.detach().clone() for name, p in self.trainer.model.named_parameters()})


def test_average_is_evaluated_and_saved(tmp_path):
    """Against the formula; the learning rate is large enough for the weights to move."""
    decay, recorder = 0.8, Recorder()
    trainer = ToyTrainer(toy_cfg(tmp_path, SOLVER__EMA_DECAY=decay, SOLVER__BASE_LR=0.1, TEST__EVAL_PERIOD=0))
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    expected = recorder.weights[0]
    for weights in recorder.weights[1:]:
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(state["model"][name], value)
        assert not torch.allclose(value, recorder.weights[-1][name])
        assert torch.equal(state["trainer"]["hooks"]["WeightAverage"]["model"][name], recorder.weights[-1][name])
    model = ToyNet(None).eval()
    model.load_state_dict(state["model"])
    value = model([{"image": torch.ones(3, 8, 8)}])[0]["value"]
    assert results["panoptic_seg"]["PQ"] == pytest.approx(value, abs=1e-7)
    trained = ToyNet(None).eval()
    trained.load_state_dict(recorder.weights[-1])
    assert abs(trained([{"image": torch.ones(3, 8, 8)}])[0]["value"] - value) > 1e-4


@pytest.mark.parametrize("moment", ["image3.png", "image9.png", "evaluation", "image22.png"])
def test_resumed_run_with_an_average_is_the_uninterrupted_one(tmp_path, moment):
    options = {"SOLVER__EMA_DECAY": 0.9}
    run(tmp_path / "whole", **options)
    ToyEvaluator.interrupt, ToyNet.fail_at = moment == "evaluation", (moment, Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", **options)
    ToyEvaluator.interrupt, ToyNet.fail_at = False, (None, None)
    run(tmp_path / "parts", resume=True, **options)
    for name in ("model_final.pth", "model_best.pth"):
        states = [torch.load(tmp_path / x / name, weights_only=True) for x in ("whole", "parts")]
        for state in states:
            state.pop("metadata")  # has the folder
        assert_identical(*states)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


def test_average_begins_at_the_weights_that_are_loaded(tmp_path):
    """The loaded weights are those of another run, or of a resumed run that had no average."""
    run(tmp_path / "first", SOLVER__MAX_ITER=7, SOLVER__STEPS=())
    weights = torch.load(tmp_path / "first" / "model_final.pth", weights_only=True)["model"]
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "fine-tuned").mkdir()
    for folder, resume in (("fine-tuned", False), ("second", True)):
        options = {"SOLVER__EMA_DECAY": 0.5, "MODEL__WEIGHTS": str(tmp_path / "first" / "model_final.pth")}
        trainer = ToyTrainer(toy_cfg(tmp_path / folder, **options))
        trainer.resume_or_load(resume=resume)
        for model in (trainer.model, trainer.evaluated_model):
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_earlier_run_stays_where_the_next_one_can_not_begin(tmp_path, monkeypatch):
    run(tmp_path, SOLVER__MAX_ITER=7, SOLVER__STEPS=())
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fail(cls, cfg, start_iter=0):
        raise ConfigError("INPUT.X = 1: use 2.")

    monkeypatch.setattr(ToyTrainer, "build_train_loader", classmethod(fail))
    with pytest.raises(ConfigError, match="INPUT.X"):
        ToyTrainer(toy_cfg(tmp_path)).resume_or_load(resume=False)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_step_that_is_not_finite_is_kept_with_the_weights_that_took_it(tmp_path):
    """The saved weights are not the average, so that repeating the step fails in the same way."""
    options = {"SOLVER__EMA_DECAY": 0.9, "SOLVER__BASE_LR": 0.1}
    ToyNet.fail_at = ("image9.png", math.nan)
    failed = ToyTrainer(toy_cfg(tmp_path, **options))
    failed.resume_or_load(resume=False)
    with pytest.raises(NonFiniteError):
        failed.train()
    again = ToyTrainer(toy_cfg(tmp_path / "again", **options))
    again.checkpointer.load(str(tmp_path / "non_finite_0000009" / "model.pth"))
    assert_identical(again.model.state_dict(), failed.model.state_dict())
    assert_identical(again.evaluated_model.state_dict(), failed.evaluated_model.state_dict())
    assert not torch.equal(again.model.head.weight, again.evaluated_model.head.weight)
    assert again.iter == 9


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_wrong_decay_is_refused(tmp_path, decay):
    with pytest.raises(ConfigError, match="SOLVER.EMA_DECAY = "):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__EMA_DECAY=float(decay)))


@pytest.mark.parametrize("parts", [0, 5])
def test_wrong_number_of_parts_is_refused(tmp_path, parts):
    with pytest.raises(ConfigError, match=f"SOLVER.ACCUMULATE_GRADIENTS = {parts}: use 1 to 4"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__ACCUMULATE_GRADIENTS=parts, SOLVER__IMS_PER_BATCH=4))


def test_reference_world_size_scales_the_schedule(tmp_path):
    """A config for 4 GPUs on one process: a quarter of batch and learning rate, four times the iterations."""
    options = {"SOLVER__REFERENCE_WORLD_SIZE": 4, "SOLVER__IMS_PER_BATCH": 16}
    cfg = ToyTrainer(toy_cfg(tmp_path, **options)).cfg
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (4, 0.0025, 92)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == ((60, 80), 40, 56)


def test_resume_of_a_finished_run_changes_nothing(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    run(tmp_path, resume=True)
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole_run, tmp_path)]
    assert_identical(*states)


def test_new_run_in_a_used_folder_sets_the_earlier_one_aside(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.html").write_text("of the earlier run")  # the threshold that it recommends is not this run's
    ToyNet.fail_at = ("image3.png", Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path)
    assert (tmp_path / "report_1.html").exists() and not (tmp_path / "report.html").exists()
    assert (tmp_path / "metrics_1.json").read_bytes() == (whole_run / "metrics.json").read_bytes()
    assert (tmp_path / "last_checkpoint_1").read_text() == "model_final.pth"
    assert (tmp_path / "model_final_1.pth").exists() and not (tmp_path / "model_final.pth").exists()
    assert sorted(p.name for p in tmp_path.glob("model_0*")) == [f"model_{i:07d}_1.pth" for i in (6, 13, 20)]
    ToyNet.fail_at = (None, None)
    assert run(tmp_path, resume=True).start_iter == 0  # not where the earlier one was
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit_of_a_weight(path):
    content, weight = path.read_bytes(), torch.load(path, weights_only=True)["model"]["backbone.weight"]
    position = content.index(weight.numpy().tobytes())
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_a_weight, os.remove, lambda path: path.write_bytes(b"")])
def test_damaged_last_checkpoint(tmp_path, whole_run, caplog, damage):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "last_checkpoint").write_text("model_0000020.pth")
    damage(tmp_path / "model_0000020.pth")
    with caplog.at_level(logging.WARNING, logger="knet_d2"):
        trainer = run(tmp_path, resume=True)
    assert trainer.start_iter == 14
    assert "Damaged: " in caplog.text and "model_0000020.pth" in caplog.text and "model_0000013.pth" in caplog.text
    for name in ("model_0000020.pth", "model_final.pth", "model_best.pth"):
        assert_identical(*(torch.load(folder / name, weights_only=True) for folder in (whole_run, tmp_path)))
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


@pytest.mark.parametrize("content", [None, "", "\0" * 17, "model_9999999.pth"])
def test_damaged_name_of_the_last_checkpoint(tmp_path, whole_run, content):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "last_checkpoint").write_text(content)
    assert run(tmp_path, resume=True).start_iter == 21


def test_no_whole_checkpoint_is_an_error(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    for path in [*tmp_path.glob("model_0*.pth"), tmp_path / "model_final.pth"]:
        truncate(path)
    with pytest.raises(CheckpointError, match="model_final.pth.*model_0000006.pth.*without --resume"):
        run(tmp_path, resume=True)


def test_what_a_killed_run_had_begun_to_write_is_removed(tmp_path, whole_run):
    (tmp_path / ".model_0000006.pth.4711.tmp").write_bytes(b"half")
    run(tmp_path, resume=True, SOLVER__MAX_ITER=1)
    assert not list(tmp_path.glob(".*"))


def test_full_disk_leaves_the_last_checkpoint(tmp_path, whole_run):
    """The full disk is simulated by a limit on the size of files, which makes writing fail half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (whole_run / "model_0000006.pth").stat().st_size

    def fill_disk(net, samples):
        if samples[0].get("file_name") == "image8.png":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        return forward(net, samples)

    forward = ToyNet.forward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="model_0000013.pth.*intact"):
        patch.setattr(ToyNet, "forward", fill_disk)
        try:
            run(tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"
    assert sorted(p.name for p in tmp_path.iterdir() if "model" in p.name) == ["model_0000006.pth"]
    run(tmp_path, resume=True)
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole_run, tmp_path)]
    assert_identical(*states)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_deleted_folder_is_explained(tmp_path, monkeypatch):
    forward = ToyNet.forward

    def delete_folder(net, samples):
        if samples[0].get("file_name") == "image8.png":
            shutil.rmtree(tmp_path / "run")
        return forward(net, samples)

    monkeypatch.setattr(ToyNet, "forward", delete_folder)
    with pytest.raises(Exception) as error:
        run(tmp_path / "run")
    assert str(tmp_path / "run") in explain(error.value)


def test_file_in_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "run").touch()
    classes = ["MODEL.KNET.NUM_THING_CLASSES", "3", "MODEL.KNET.NUM_STUFF_CLASSES", "2"]
    classes += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    args = default_argument_parser().parse_args([*classes, "OUTPUT_DIR", str(tmp_path / "run")])
    with pytest.raises(OSError) as error:
        setup(args)
    assert explain(error.value).startswith(f"{tmp_path / 'run'}: File exists. Set OUTPUT_DIR to a writable folder")


def test_failed_run_keeps_its_last_checkpoint(tmp_path):
    ToyNet.fail_at = ("image10.png", math.nan)
    with pytest.raises(NonFiniteError):
        run(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"
    state = torch.load(tmp_path / "model_0000006.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert [r["iteration"] for r in metrics_of(tmp_path)] == [4, 9]


def test_checkpoint_without_optimizer_state_is_refused(tmp_path):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    torch.save({"model": trainer.model.state_dict(), "trainer": {"iteration": 5}}, tmp_path / "old.pth")
    (tmp_path / "last_checkpoint").write_text("old.pth")
    with pytest.raises(CheckpointError, match="no optimiser state.*MODEL.WEIGHTS"):
        trainer.resume_or_load(resume=True)


def test_changed_seed_is_reported(tmp_path, whole_run, caplog):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    trainer = ToyTrainer(toy_cfg(tmp_path, SEED=4))
    with caplog.at_level(logging.WARNING, logger="knet_d2"):
        trainer.resume_or_load(resume=True)
    assert "SEED was 3 and is now 4" in caplog.text


@pytest.mark.parametrize("keep, expected", [(0, [6, 13, 20]), (1, [20]), (2, [13, 20])])
def test_number_of_checkpoints(tmp_path, keep, expected):
    run(tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=keep)
    names = sorted(p.name for p in tmp_path.glob("model_0*.pth"))
    assert names == [f"model_{i:07d}.pth" for i in expected]
    assert (tmp_path / "model_final.pth").exists()


def test_number_of_checkpoints_counts_those_before_a_resume(tmp_path):
    ToyNet.fail_at = ("image15.png", Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=2)
    ToyNet.fail_at = (None, None)
    run(tmp_path, resume=True, SOLVER__CHECKPOINTS_TO_KEEP=2)
    assert sorted(p.name for p in tmp_path.glob("model_0*.pth")) == ["model_0000013.pth", "model_0000020.pth"]


def test_best_checkpoint(tmp_path, caplog):
    ToyEvaluator.values = [10.0, math.nan, 30.0, 20.0]
    ToyNet.fail_at = ("image18.png", Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path, TEST__EVAL_PERIOD=5)
    (told,) = [x for x in caplog.messages if "gives no value of" in x]
    assert "after iteration 10 gives" in told and "(it is nan)" in told and "model_best.pth" in told
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 14
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000013.pth"
    # the resumed run evaluates iteration 14 again, then 19 and 22: worse ones don't replace the best
    ToyNet.fail_at, ToyEvaluator.values = (None, None), [30.0, 20.0, 25.0]
    run(tmp_path, resume=True, TEST__EVAL_PERIOD=5)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 14
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    "key, expected",
    [
        ("SOLVER__CHECKPOINT_PERIOD", ([], [4, 9, 13, 14, 19, 22], [13, 22])),
        ("SOLVER__LOG_PERIOD", ([6, 13, 20], [13, 22], [13, 22])),
        ("TEST__EVAL_PERIOD", ([6, 13, 20], [4, 9, 14, 19, 22], [22])),
    ],
)
def test_period_of_0_is_none(tmp_path, key, expected):
    """With period 0, checkpoints, metrics and evaluations are written only at the end or by another period."""
    run(tmp_path, **{key: 0})
    periodic, written, evaluated = expected
    assert sorted(p.name for p in tmp_path.glob("model_0*")) == [f"model_{i:07d}.pth" for i in periodic]
    assert (tmp_path / "model_final.pth").exists() and (tmp_path / "model_best.pth").exists()
    records = metrics_of(tmp_path)
    assert [r["iteration"] for r in records] == written
    assert [r["iteration"] for r in records if "panoptic_seg/PQ" in r] == evaluated


@pytest.mark.parametrize(
    "key", ["SOLVER.CHECKPOINT_PERIOD", "SOLVER.LOG_PERIOD", "SOLVER.PATIENCE", "TEST.EVAL_PERIOD"]
)
def test_negative_period_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=f"{key} = -1: use at least 0"):
        ToyTrainer(toy_cfg(tmp_path, **{key.replace(".", "__"): -1}))


def test_run_without_periodic_checkpoints_is_stopped_and_resumed(tmp_path, whole_run, monkeypatch):
    forward = ToyNet.forward

    def send_signal(net, samples):
        if samples[0].get("file_name") == "image9.png":
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(net, samples)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(ToyNet, "forward", send_signal)
        run(tmp_path, SOLVER__CHECKPOINT_PERIOD=0)
    assert run(tmp_path, resume=True, SOLVER__CHECKPOINT_PERIOD=0).start_iter == 10
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


def test_unsupported_option_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="TEST.PRECISE_BN.ENABLED"):
        ToyTrainer(toy_cfg(tmp_path, TEST__PRECISE_BN__ENABLED=True))
    with pytest.raises(ConfigError, match="TEST.TILES.OVERLAP = 40: use 1 to 31"):  # not at the first evaluation
        ToyTrainer(toy_cfg(tmp_path, TEST__TILES__SIZE=32, TEST__TILES__OVERLAP=40))
    with pytest.raises(ConfigError, match="SOLVER.CHECKPOINTS_TO_KEEP = -1"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=-1))
    with pytest.raises(ConfigError, match="REFERENCE_WORLD_SIZE"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__IMS_PER_BATCH=2, SOLVER__REFERENCE_WORLD_SIZE=3))


def test_best_metric_by_main_output():
    names = {"instance": "segm/AP", "panoptic": "panoptic_seg/PQ", "semantic": "sem_seg/mIoU"}
    for task, name in names.items():
        assert best_metric(knet_cfg(MODEL__KNET__TASK=task, DATASETS__TEST=("a",))) == name
    assert best_metric(knet_cfg(MODEL__KNET__TASK="instance", DATASETS__TEST=("a", "b"))) == "a/segm/AP"
    options = {"MODEL__KNET__TASK": "panoptic", "MODEL__KNET__TEST__OUTPUTS": ["instances", "panoptic_seg"]}
    assert best_metric(knet_cfg(**options, DATASETS__TEST=("a",))) == "segm/AP"


def test_cut_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 4}\n{"iteration": 9}\n{"iteration": 14}\n{"iter')
    assert cut_metrics(str(path), 20) == 14
    assert path.read_text() == '{"iteration": 4}\n{"iteration": 9}\n{"iteration": 14}\n'
    assert cut_metrics(str(path), 9) == 9 and path.read_text() == '{"iteration": 4}\n{"iteration": 9}\n'
    assert cut_metrics(str(path), 3) == -1 and path.read_text() == ""
    assert cut_metrics(str(tmp_path / "none.json"), 3) == -1


def test_numbers_of_a_long_run_take_bounded_memory():
    with bounded_storage(7) as storage:
        for storage.iter in range(7, 3007):
            storage.put_scalars(total_loss=storage.iter, time=2.0)
    assert [len(history.values()) for history in storage.histories().values()] == [1000, 1000]
    assert storage.latest_with_smoothing_hint(20)["total_loss"] == (2996.5, 3006)


# ---- writers ---------------------------------------------------------------------------------------------------


def test_tags():
    assert scalar_tag("loss_mask_s2") == "stage 2/loss_mask"
    assert scalar_tag("loss_dense_s0") == "static/loss_dense"
    assert scalar_tag("segm/AP") == "segm/AP"
    assert scalar_tag("total_loss") == "training/total_loss"
    assert scalar_tag("data_time") == "timing/data_time"


def test_tensorboard(tmp_path, monkeypatch):
    picture = np.zeros((8, 9, 3), np.uint8)
    monkeypatch.setattr(
        trainer_module, "draw_validation_pictures", lambda cfg, model, n: {f"{i}.jpg": picture for i in range(n)}
    )
    run(tmp_path, TEST__NUM_PICTURES=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"stage 1/loss_mask", "static/loss_mask", "training/lr", "panoptic_seg/PQ"} <= set(events.Tags()["scalars"])
    assert sorted(events.Tags()["images"]) == ["validation/0.jpg", "validation/1.jpg"]
    image = events.Images("validation/0.jpg")
    assert [i.step for i in image] == [13, 22] and (image[0].height, image[0].width) == (8, 9)


def test_tensorboard_of_a_resumed_run_has_no_repeat(tmp_path):
    for start in (0, 5):
        with EventStorage(start) as storage:
            writer = TensorBoardWriter(str(tmp_path), start)
            for storage.iter in range(start, 10):
                storage.put_scalar("total_loss", storage.iter)
                writer.write()
            writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("training/total_loss")] == list(range(10))


def test_console_line(caplog):
    with EventStorage(9) as storage, caplog.at_level(logging.INFO, logger="knet_d2"):
        storage.put_scalars(total_loss=6.0, loss_mask_s0=1.0, loss_mask_s1=2.0, loss_dice_s1=3.0, time=2.0, lr=0.5)
        ConsoleWriter(100).write()
    assert "eta: 0:03:00  iter: 10/100  total_loss: 6  loss_mask: 3  loss_dice: 3  time: 2  lr: 0.5" in caplog.text


# ---- early stopping ----


def test_run_ends_without_a_better_metric(tmp_path):
    """Evaluations after 3, 6, 9, ... iterations; the best is the second, and two worse ones end the run."""
    ToyEvaluator.values = [10.0, 30.0, 20.0, 30.0]
    trainer = run(tmp_path, TEST__EVAL_PERIOD=3, SOLVER__PATIENCE=2)
    assert trainer.iter == 12 and ToyEvaluator.values == []
    files = {name: torch.load(tmp_path / f"model_{name}.pth", weights_only=True) for name in ("best", "final")}
    assert [files[name]["iteration"] for name in ("best", "final")] == [5, 11]
    assert metrics_of(tmp_path)[-1]["iteration"] == 11 and metrics_of(tmp_path)[-1]["panoptic_seg/PQ"] == 30
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    before = (tmp_path / "metrics.json").read_bytes()
    again = run(tmp_path, resume=True, TEST__EVAL_PERIOD=3, SOLVER__PATIENCE=2)
    assert again.iter == again.start_iter == 12 and (tmp_path / "metrics.json").read_bytes() == before
    # With more patience it continues: 25 is worse, 40 is better, and the end comes at MAX_ITER
    ToyEvaluator.values = [25.0, 40.0, 1.0, 1.0]
    assert run(tmp_path, resume=True, TEST__EVAL_PERIOD=3, SOLVER__PATIENCE=4).iter == 23
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 17


@pytest.mark.parametrize("moment", ["image9.png", "image11.png", "evaluation"])
def test_early_end_of_a_resumed_run(tmp_path, monkeypatch, moment):
    """It ends where an uninterrupted run ends; the last evaluation may be the one that was interrupted."""
    values = {2: 10.0, 5: 30.0, 8: 20.0, 11: 30.0}
    options = {"TEST__EVAL_PERIOD": 3, "SOLVER__PATIENCE": 2, "SOLVER__CHECKPOINT_PERIOD": 4}
    evaluate = ToyTrainer.evaluate

    def scripted(self):
        ToyEvaluator.values = [values[self.iter]]
        return evaluate(self)

    monkeypatch.setattr(ToyTrainer, "evaluate", scripted)
    folders = [tmp_path / "whole", tmp_path / "parts"]
    run(folders[0], **options)
    if moment == "evaluation":
        monkeypatch.setattr(ToyTrainer, "evaluate", lambda self: 1 / 0 if self.iter == 11 else scripted(self))
        with pytest.raises(ZeroDivisionError):
            run(folders[1], **options)
        monkeypatch.setattr(ToyTrainer, "evaluate", scripted)
    else:
        ToyNet.fail_at = (moment, Interrupted())
        with pytest.raises(Interrupted):
            run(folders[1], **options)
        ToyNet.fail_at = (None, None)
    assert run(folders[1], resume=True, **options).iter == 12
    assert (folders[0] / "metrics.json").read_bytes() == (folders[1] / "metrics.json").read_bytes()
    for name in ("model_final.pth", "model_best.pth"):
        assert_identical(*(torch.load(folder / name, weights_only=True) for folder in folders))


def test_evaluations_without_a_value_do_not_end_the_run(tmp_path):
    ToyEvaluator.values = [math.nan] * 7
    assert run(tmp_path, TEST__EVAL_PERIOD=3, SOLVER__PATIENCE=1).iter == 23


@pytest.mark.parametrize("options", [{"TEST__EVAL_PERIOD": 0}, {"DATASETS__TEST": ()}])
def test_patience_needs_evaluations(tmp_path, options):
    with pytest.raises(ConfigError, match="SOLVER.PATIENCE = 2: it counts evaluations"):
        ToyTrainer(toy_cfg(tmp_path, SOLVER__PATIENCE=2, **options))


def test_events_of_an_earlier_run_are_set_aside(tmp_path):
    def scalars(folder):
        return [x.step for x in EventAccumulator(str(folder)).Reload().Scalars("training/total_loss")]

    run(tmp_path, SOLVER__MAX_ITER=10, SOLVER__STEPS=())
    assert scalars(tmp_path) == [4, 9]
    run(tmp_path)
    assert scalars(tmp_path) == [4, 9, 13, 14, 19, 22] and scalars(tmp_path / "events_1") == [4, 9]
    run(tmp_path)
    assert scalars(tmp_path) == [4, 9, 13, 14, 19, 22] == scalars(tmp_path / "events_2")
    assert (tmp_path / "metrics_2.json").exists() and not (tmp_path / "events_3").exists()
