"""Training: optimiser, training step, hooks, writers, checkpoints, config reading; with a toy model."""

import json
import logging
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from knet_d2.checkpoint import Checkpointer, as_checkpoint, load_file
from knet_d2.config import add_knet_config
from knet_d2.engine import Trainer, choose_device, merge_config
from knet_d2.engine import trainer as trainer_module
from knet_d2.engine.optimizer import build_gradient_clipper, build_lr_scheduler, build_optimizer, parameter_groups
from knet_d2.engine.setup import resolve_seed
from knet_d2.engine.train_step import TrainStep, amp_dtype, step_seed
from knet_d2.engine.trainer import best_metric
from knet_d2.engine.writers import ConsoleWriter, TensorBoardWriter, cut_metrics, scalar_tag
from knet_d2.errors import CheckpointError, ConfigError, NonFiniteError


class Interrupted(Exception):
    """Stands for whatever stops a run."""


@META_ARCH_REGISTRY.register()
class ToyNet(nn.Module):
    """A regression with dropout; ``fail_at`` = (image, what to raise or to multiply the first loss by)."""

    fail_at = (None, None)

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, samples):
        x = torch.stack([s["image"] for s in samples])
        features = self.backbone(x)
        self.seen_dtype = features.dtype
        pooled = self.norm(features.float()).relu().mean((2, 3))
        y = self.head(nn.functional.dropout(pooled, 0.5, self.training)).float()
        if not self.training:
            return [{"value": float(y.mean())}]
        first = (y - 1).pow(2).mean()
        image, failure = ToyNet.fail_at
        if samples[0]["file_name"] == image:
            if isinstance(failure, Exception):
                raise failure
            first = first * failure
        return {"loss_mask_s0": first, "loss_mask_s1": y.abs().mean()}


class ToyData:
    """Batch i is a function of (seed, i)."""

    def __init__(self, seed, start):
        self.seed, self.start = seed, start

    def __iter__(self):
        i = self.start
        while True:
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            yield [{"image": torch.rand(3, 8, 8, generator=generator), "file_name": f"image{i}.png"}]
            i += 1


class ToyEvaluator(DatasetEvaluator):
    values = None  # results of successive evaluations; None = the model's own output
    interrupt = False

    def process(self, inputs, outputs):
        self.value = outputs[0]["value"]

    def evaluate(self):
        if ToyEvaluator.interrupt:
            raise Interrupted
        return {"panoptic_seg": {"PQ": ToyEvaluator.values.pop(0) if ToyEvaluator.values else self.value}}


class ToyTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return ToyData(cfg.SEED, start_iter)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[{"image": torch.ones(3, 8, 8)}]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return ToyEvaluator()


@pytest.fixture(autouse=True)
def reset_toys():
    yield
    ToyNet.fail_at, ToyEvaluator.values, ToyEvaluator.interrupt = (None, None), None, False


def knet_cfg(**values):
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([x for key, value in values.items() for x in (key.replace("__", "."), value)])
    return cfg


def toy_cfg(folder, **values):
    settings = {
        "MODEL__META_ARCHITECTURE": "ToyNet",
        "MODEL__WEIGHTS": "",
        "OUTPUT_DIR": str(folder),
        "DATASETS__TEST": ("toy",),
        "SEED": 3,
        "SOLVER__BASE_LR": 0.01,
        "SOLVER__MAX_ITER": 23,
        "SOLVER__STEPS": (15, 20),
        "SOLVER__WARMUP_ITERS": 10,
        "SOLVER__CHECKPOINT_PERIOD": 7,
        "SOLVER__LOG_PERIOD": 5,
        "TEST__EVAL_PERIOD": 14,
        "TEST__NUM_PICTURES": 0,
    }
    return knet_cfg(**{**settings, **values})


def run(folder, resume=False, **values):
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    trainer = ToyTrainer(toy_cfg(folder, **values))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def metrics_of(folder):
    with open(os.path.join(folder, "metrics.json")) as f:
        return [json.loads(line) for line in f]


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ---- optimiser -------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Every kind of parameter that is treated in its own way."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone.bottom_up[0].relative_position_bias_table = nn.Parameter(torch.zeros(2))
        self.backbone.lateral = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_parameter_groups():
    cfg = knet_cfg(
        SOLVER__BASE_LR=0.1, SOLVER__BACKBONE_MULTIPLIER=0.5, SOLVER__WEIGHT_DECAY=0.3, SOLVER__WEIGHT_DECAY_NORM=0.0
    )
    model = Parts()
    groups = parameter_groups(cfg, model)
    name_of = {id(p): name for name, p in model.named_parameters()}
    settings = {name_of[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert settings == {
        "backbone.bottom_up.0.weight": (0.05, 0.3),
        "backbone.bottom_up.0.bias": (0.05, 0.3),
        "backbone.bottom_up.0.relative_position_bias_table": (0.05, 0.0),
        "backbone.bottom_up.1.weight": (0.05, 0.0),
        "backbone.bottom_up.1.bias": (0.05, 0.0),
        "backbone.lateral.weight": (0.1, 0.3),  # the pyramid is not the backbone proper
        "backbone.lateral.bias": (0.1, 0.3),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "group.weight": (0.1, 0.0),
        "group.bias": (0.1, 0.0),
    }
    assert len(groups) == 4 and sum(len(g["params"]) for g in groups) == 11


def test_optimizer_types():
    model = nn.Linear(2, 2)
    assert type(build_optimizer(knet_cfg(SOLVER__OPTIMIZER="ADAMW"), model)) is torch.optim.AdamW
    sgd = build_optimizer(knet_cfg(SOLVER__OPTIMIZER="SGD", SOLVER__MOMENTUM=0.7), model)
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.7
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER.*ADAM8.*ADAMW"):
        build_optimizer(knet_cfg(SOLVER__OPTIMIZER="ADAM8"), model)


def gradients(*values):
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values):
        p.grad = torch.tensor(v)
    return parameters


@pytest.mark.parametrize(
    "enabled, kind, norm_type, expected",
    [
        (True, "full_model", 2.0, [[3 / 13, 4 / 13], [12 / 13]]),
        (True, "full_model", 1.0, [[3 / 19, 4 / 19], [12 / 19]]),
        (True, "norm", 2.0, [[0.6, 0.8], [1.0]]),
        (True, "value", 2.0, [[1.0, 1.0], [1.0]]),
        (False, "full_model", 2.0, [[3.0, 4.0], [12.0]]),
    ],
)
def test_gradient_clipping(enabled, kind, norm_type, expected):
    cfg = knet_cfg()
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = enabled, kind, 1.0, norm_type
    parameters = gradients([3.0, 4.0], [12.0])
    total = build_gradient_clipper(cfg)(parameters)
    assert float(total) == pytest.approx(13.0)
    for p, e in zip(parameters, expected):
        assert p.grad.tolist() == pytest.approx(e, rel=1e-5)


def test_unknown_clip_type_is_named():
    cfg = knet_cfg(SOLVER__CLIP_GRADIENTS__ENABLED=True, SOLVER__CLIP_GRADIENTS__CLIP_TYPE="all")
    with pytest.raises(ConfigError, match="CLIP_TYPE.*all.*full_model"):
        build_gradient_clipper(cfg)


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_schedule(power):
    cfg = knet_cfg(
        SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR",
        SOLVER__POLY_LR_POWER=power,
        SOLVER__BASE_LR=0.2,
        SOLVER__MAX_ITER=100,
        SOLVER__WARMUP_ITERS=10,
        SOLVER__WARMUP_FACTOR=0.1,
    )
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.02)
    for i in (10, 40, 99):
        assert rates[i] == pytest.approx(0.2 * (1 - i / 100) ** power)


def test_unknown_schedule_is_named():
    cfg = knet_cfg(SOLVER__LR_SCHEDULER_NAME="Nope")
    with pytest.raises(ConfigError, match="LR_SCHEDULER_NAME.*Nope"):
        build_lr_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))


# ---- training step ---------------------------------------------------------------------------------------------


def make_step(dtype=None, seed=0, lr=0.1):
    torch.manual_seed(0)
    model = ToyNet(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = TrainStep(model, optimizer, clip_gradients=build_gradient_clipper(knet_cfg()), seed=seed, dtype=dtype)
    step.data_loader = ToyData(0, 0)
    return step


def take_steps(step, count, start=0):
    with EventStorage() as storage:
        for step.iter in range(start, start + count):
            storage.iter = step.iter
            step.run_step()
    return storage


def test_step_equals_a_plain_one():
    step, reference = make_step(), make_step()
    take_steps(step, 1)
    torch.manual_seed(step_seed(0, 0, 0))
    sum(reference.model(next(iter(ToyData(0, 0)))).values()).backward()
    for p, q in zip(step.model.parameters(), reference.model.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


def test_numbers_of_a_step():
    storage = take_steps(make_step(), 1)
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["total_loss"] == pytest.approx(latest["loss_mask_s0"] + latest["loss_mask_s1"])
    assert latest["grad_norm"] > 0 and latest["data_time"] >= 0


def test_bfloat16_on_cpu():
    half, full = make_step(torch.bfloat16), make_step()
    before = half.model.head.weight.clone()
    a = take_steps(half, 3).latest()["total_loss"][0]
    b = take_steps(full, 3).latest()["total_loss"][0]
    assert half.model.seen_dtype == torch.bfloat16 and full.model.seen_dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert not torch.equal(before, half.model.head.weight)
    assert a != b and a == pytest.approx(b, rel=0.05)


def test_amp_settings():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert amp_dtype(False, "float16", cpu) is None
    assert amp_dtype(True, "float16", cuda) is torch.float16
    assert amp_dtype(True, "bfloat16", cpu) is torch.bfloat16
    with pytest.raises(ConfigError, match="SOLVER.AMP.DTYPE.*CUDA.*bfloat16"):
        amp_dtype(True, "float16", cpu)
    with pytest.raises(ConfigError, match="SOLVER.AMP.DTYPE.*int8"):
        amp_dtype(True, "int8", cuda)


def test_amp_config_reaches_the_model(tmp_path):
    trainer = run(tmp_path, SOLVER__MAX_ITER=1, SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="bfloat16", DATASETS__TEST=())
    assert trainer.model.seen_dtype == torch.bfloat16


def test_randomness_is_a_function_of_seed_and_iteration():
    seeds = {step_seed(s, i, r) for s in range(3) for i in range(50) for r in range(3)}
    assert len(seeds) == 450 and max(seeds) < 2**63
    results = []
    for disturbance in (0, 1):
        step = make_step(seed=5)
        torch.manual_seed(disturbance)
        results.append(take_steps(step, 2).latest()["total_loss"])
    assert results[0] == results[1]
    assert take_steps(make_step(seed=6), 2).latest()["total_loss"] != results[0]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_non_finite_loss(factor):
    step = make_step(lr=0.125)
    take_steps(step, 2)
    before = [p.clone() for p in step.model.parameters()]
    ToyNet.fail_at = ("image2.png", factor)
    with pytest.raises(NonFiniteError) as error:
        take_steps(step, 1, start=2)
    for part in ("loss_mask_s0", "stage 0", str(factor), "image2.png", "0.125", "Iteration 2"):
        assert part in str(error.value)
    assert "loss_mask_s1" not in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(before, step.model.parameters()))


def test_non_finite_gradient_of_a_finite_loss():
    step = make_step()
    step.model.head.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * math.nan,))
    before = [p.clone() for p in step.model.parameters()]
    with pytest.raises(NonFiniteError, match="Not finite: grad_norm = nan.*image0.png"):
        take_steps(step, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, step.model.parameters()))


def test_non_finite_cost_in_the_model_gets_the_images():
    ToyNet.fail_at = ("image0.png", NonFiniteError("Matching cost class of stage 1 is not finite."))
    with pytest.raises(NonFiniteError, match="cost class of stage 1.*Iteration 0, learning rate 0.1, images: image0.png"):
        take_steps(make_step(), 1)


# ---- runs: resume, checkpoints, evaluation ---------------------------------------------------------------------


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


def test_resume_of_a_finished_run_changes_nothing(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    run(tmp_path, resume=True)
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()
    states = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole_run, tmp_path)]
    assert_identical(*states)


def test_new_run_in_a_used_folder_sets_old_metrics_aside(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    run(tmp_path)
    assert (tmp_path / "metrics_1.json").read_bytes() == (whole_run / "metrics.json").read_bytes()
    assert (tmp_path / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()


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


def test_best_checkpoint(tmp_path):
    ToyEvaluator.values = [10.0, math.nan, 30.0, 20.0]
    ToyNet.fail_at = ("image18.png", Interrupted())
    with pytest.raises(Interrupted):
        run(tmp_path, TEST__EVAL_PERIOD=5)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 14
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000013.pth"
    # the resumed run evaluates iteration 14 again, then 19 and 22: worse ones don't replace the best
    ToyNet.fail_at, ToyEvaluator.values = (None, None), [30.0, 20.0, 25.0]
    run(tmp_path, resume=True, TEST__EVAL_PERIOD=5)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 14
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_best_metric_by_task():
    names = {"instance": "segm/AP", "panoptic": "panoptic_seg/PQ", "semantic": "sem_seg/mIoU"}
    for task, name in names.items():
        assert best_metric(knet_cfg(MODEL__KNET__TASK=task, DATASETS__TEST=("a",))) == name
    assert best_metric(knet_cfg(MODEL__KNET__TASK="instance", DATASETS__TEST=("a", "b"))) == "a/segm/AP"


def test_cut_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 4}\n{"iteration": 9}\n{"iteration": 14}\n{"iter')
    assert cut_metrics(str(path), 20) == 14
    assert path.read_text() == '{"iteration": 4}\n{"iteration": 9}\n{"iteration": 14}\n'
    assert cut_metrics(str(path), 9) == 9 and path.read_text() == '{"iteration": 4}\n{"iteration": 9}\n'
    assert cut_metrics(str(path), 3) == -1 and path.read_text() == ""
    assert cut_metrics(str(tmp_path / "none.json"), 3) == -1


# ---- writers ---------------------------------------------------------------------------------------------------


def test_tags():
    assert scalar_tag("loss_mask_s2") == "stage 2/loss_mask"
    assert scalar_tag("loss_dense_s0") == "static/loss_dense"
    assert scalar_tag("segm/AP") == "segm/AP"
    assert scalar_tag("total_loss") == "training/total_loss"
    assert scalar_tag("data_time") == "timing/data_time"


def test_tensorboard(tmp_path, monkeypatch):
    picture = np.zeros((8, 9, 3), np.uint8)
    monkeypatch.setattr(trainer_module, "draw_validation_pictures", lambda cfg, model, n: {f"{i}.jpg": picture for i in range(n)})
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


# ---- checkpoints -----------------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return os.mkdir, (Exploit.path,)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl"])
def test_code_in_a_weights_file_never_runs(tmp_path, name):
    Exploit.path = str(tmp_path / "made_by_exploit")
    path = tmp_path / name
    content = {"model": {"a": Exploit()}}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"{name}.*mkdir.*could run code"):
        load_file(str(path))
    assert not os.path.exists(Exploit.path)


def test_files_that_are_no_checkpoints(tmp_path):
    checkpointer = Checkpointer(ToyNet(None))

    def message(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError) as error:
            checkpointer.load(str(path))
        assert name in str(error.value) or "None of the" in str(error.value)
        return str(error.value)

    assert "not a weights file" in message("notes.pth", b"SOLVER:\n  BASE_LR: 1\n")
    assert "not a weights file" in message("empty.pth", b"")
    assert "not a weights file" in message("notes.pkl", b"hello")
    torch.save({"model": ToyNet(None).state_dict()}, tmp_path / "good.pth")
    assert "not a weights file" in message("cut.pth", (tmp_path / "good.pth").read_bytes()[:-500])
    assert "list" in message("list.pth", [1, 2])
    assert "'epoch' is a int" in message("odd.pth", {"epoch": 3})
    assert "no parameters" in message("bare.pth", {"model": {}})
    assert "None of the 1 parameters" in message("other.pth", {"model": {"encoder.weight": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match="absent.pth.*no such"):
        checkpointer.load(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"model": s, "iteration": 7}])
def test_layouts_of_state_dicts(tmp_path, wrap):
    source, target = ToyNet(None), ToyNet(None)
    torch.save(wrap(source.state_dict()), tmp_path / "a.pth")
    Checkpointer(target).load(str(tmp_path / "a.pth"))
    assert_identical(dict(source.state_dict()), dict(target.state_dict()))


def test_numpy_arrays_in_files(tmp_path):
    """As in Detectron2's model zoo (.pkl) and in some converted weights (.pth)."""
    source, target = ToyNet(None), ToyNet(None)
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}, protocol=2))
    torch.save({"model": arrays, "mean": np.float64(3)}, tmp_path / "arrays.pth")
    for name in ("zoo.pkl", "arrays.pth"):
        nn.init.zeros_(target.head.weight)
        Checkpointer(target).load(str(tmp_path / name))
        assert_identical(dict(source.state_dict()), dict(target.state_dict()))


def test_caffe2_pickle_is_matched_by_heuristics(tmp_path):
    content = {"blobs": {"conv1_w": np.zeros((1,), np.float32), "conv1_w_momentum": np.zeros((1,), np.float32)}}
    checkpoint = as_checkpoint(content, "r50.pkl")
    assert list(checkpoint["model"]) == ["conv1_w"] and checkpoint["matching_heuristics"]


def test_matching_heuristics_on_request(tmp_path):
    source, target = Parts(), Parts()
    nn.init.normal_(source.backbone.bottom_up[0].weight)
    path = str(tmp_path / "backbone.pth")
    torch.save({f"bottom_up.{name}": p for name, p in source.backbone.bottom_up.state_dict().items()}, path)
    with pytest.raises(CheckpointError, match="None of the"):
        Checkpointer(target).load(path)
    Checkpointer(target).load(path + "?matching_heuristics=True")
    assert_identical(dict(source.backbone.bottom_up.state_dict()), dict(target.backbone.bottom_up.state_dict()))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    trainer = ToyTrainer(toy_cfg(tmp_path, SOLVER__WEIGHT_DECAY_NORM=1e-4))  # one group instead of two
    with pytest.raises(CheckpointError, match="model_final.pth.*optimiser"):
        trainer.resume_or_load(resume=True)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpointer = Checkpointer(ToyNet(None), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def fill_disk(data, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(CheckpointError, match="model.pth.*No space left"):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]


# ---- config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["SOLVER.BASE_LRS", "1.0"], ["SOLVER.BASE_LRS", "SOLVER.BASE_LR?"]),
        (["MODEL.KNETT.TASK", "instance"], ["MODEL.KNETT.TASK", "MODEL.KNET.TASK?"]),
        (["KNET.NUM_STAGES", "2"], ["KNET.NUM_STAGES", "MODEL.KNET.NUM_STAGES?"]),
        (["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR", "fast"]),
        (["SOLVER.BASE_LR"], ["SOLVER.BASE_LR", "KEY VALUE"]),
    ],
)
def test_wrong_options_are_named(opts, parts):
    with pytest.raises(ConfigError) as error:
        merge_config(knet_cfg(), "", opts)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_wrong_config_files_are_named(tmp_path):
    def message(content):
        path = tmp_path / "test.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError) as error:
            merge_config(knet_cfg(), str(path))
        assert "test.yaml" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "MODEL.KNET.NUM_STAGE" in message("VERSION: 2\nMODEL: {KNET: {NUM_STAGE: 3}}")
    assert "MODEL.KNET.NUM_STAGES?" in message("VERSION: 2\nMODEL: {KNET: {NUM_STAGE: 3}}")
    assert "MODEL.KNET.NUM_STAGES" in message("VERSION: 2\nMODEL: {KNET: {NUM_STAGES: three}}")
    assert "no_base.yaml" in message("_BASE_: no_base.yaml")
    message("MODEL: [1, 2")
    made = tmp_path / "made"
    message(f"VERSION: 2\nOUTPUT_DIR: !!python/object/apply:os.mkdir ['{made}']")
    assert not made.exists()
    with pytest.raises(ConfigError, match="absent.yaml"):
        merge_config(knet_cfg(), str(tmp_path / "absent.yaml"))


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("VERSION: 2\nSOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\n")
    (tmp_path / "test.yaml").write_text("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25, IMS_PER_BATCH: 2}\n")
    cfg = knet_cfg()
    merge_config(cfg, str(tmp_path / "test.yaml"), ["SOLVER.IMS_PER_BATCH", "4"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (0.25, 7, 4)


def test_seed_is_drawn_once(tmp_path):
    cfg = knet_cfg(OUTPUT_DIR=str(tmp_path))
    assert resolve_seed(knet_cfg(SEED=7)) == 7
    drawn = resolve_seed(cfg)
    assert drawn >= 0
    (tmp_path / "config.yaml").write_text(knet_cfg(SEED=1234).dump())
    assert resolve_seed(cfg, resume=True) == 1234
    cfg.SEED = 5
    assert resolve_seed(cfg, resume=True) == 5


def test_device_falls_back_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("cuda", explicit=False) == "cpu"
    assert choose_device("cpu", explicit=True) == "cpu"
    with pytest.raises(ConfigError, match="MODEL.DEVICE.*cuda:1"):
        choose_device("cuda:1", explicit=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("cuda", explicit=False) == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda", explicit=False) == "cuda"
