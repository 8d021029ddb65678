"""Optimiser, training step and config reading."""

import contextlib
import copy
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import make_example, tiny_model
from torch import nn
from toys import Parts, ToyData, ToyNet, assert_identical, knet_cfg, reset_toys, run

from knet_d2.config.files import config_folder, get_config_file
from knet_d2.engine import choose_device, merge_config
from knet_d2.engine.optimizer import build_gradient_clipper, build_lr_scheduler, build_optimizer, parameter_groups
from knet_d2.engine.output_dir import resolve_seed
from knet_d2.engine.train_step import TrainStep, amp_dtype, step_seed
from knet_d2.errors import ConfigError, NonFiniteError


@pytest.fixture(autouse=True)
def clean_toys():
    yield
    reset_toys()


# ---- optimiser -------------------------------------------------------------------------------------------------


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


def test_a_warm_up_of_most_of_the_iterations_is_told(caplog):
    for warmup in (30, 31):
        cfg = knet_cfg(SOLVER__MAX_ITER=60, SOLVER__WARMUP_ITERS=warmup)
        build_lr_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))
    assert [x for x in caplog.messages if x.startswith("SOLVER.WARMUP_ITERS = ")] == [
        "SOLVER.WARMUP_ITERS = 31, SOLVER.MAX_ITER = 60: the learning rate stays far below SOLVER.BASE_LR. "
        "Use a tenth of the iterations for warm-up."
    ]


def test_unknown_schedule_is_named():
    cfg = knet_cfg(SOLVER__LR_SCHEDULER_NAME="Nope")
    with pytest.raises(ConfigError, match="LR_SCHEDULER_NAME.*Nope"):
        build_lr_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))


# ---- training step ---------------------------------------------------------------------------------------------


def make_step(dtype=None, seed=0, lr=0.1, num_parts=1):
    torch.manual_seed(0)
    model = ToyNet(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    clipper = build_gradient_clipper(knet_cfg())
    step = TrainStep(model, optimizer, clip_gradients=clipper, seed=seed, dtype=dtype, num_parts=num_parts)
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


class ImageMeanNet(nn.Module):
    """A model whose losses are means over images; it records batch sizes and uses of no_sync()."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.sizes, self.unsynchronised = [], []

    def forward(self, samples):
        self.sizes.append(len(samples))
        y = self.head(torch.stack([s["image"].mean((1, 2)) for s in samples]))
        return {"loss_mask_s0": (y - 1).pow(2).mean(), "loss_mask_s1": y.abs().mean()}

    @contextlib.contextmanager
    def no_sync(self):
        self.unsynchronised.append(len(self.sizes))
        yield


@pytest.mark.parametrize("num_parts, sizes", [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (5, [1] * 5)])
def test_parts_of_a_batch_add_up_to_its_gradient(num_parts, sizes):
    """Processes exchange gradients in the last part alone."""
    batch = [next(iter(ToyData(0, i)))[0] for i in range(5)]
    results = []
    for parts in (1, num_parts):
        torch.manual_seed(0)
        model = ImageMeanNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = build_gradient_clipper(knet_cfg())
        step = TrainStep(model, optimizer, clip_gradients=clipper, seed=0, num_parts=parts)
        step.data_loader = [batch]
        latest = take_steps(step, 1).latest()
        results.append((model.head.weight, [latest[x][0] for x in ("loss_mask_s0", "loss_mask_s1", "grad_norm")]))
    assert model.sizes == sizes and model.unsynchronised == list(range(num_parts - 1))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1]) and results[0][1][2] > 0


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


def scaled_step(scale):
    """A step with the loss scaling that float16 needs."""
    step = make_step()
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return step


def test_loss_scaling_changes_nothing():
    scaled, plain = scaled_step(1024.0), make_step()
    a, b = take_steps(scaled, 3).latest(), take_steps(plain, 3).latest()
    for name in ("total_loss", "grad_norm"):
        assert a[name][0] == pytest.approx(b[name][0], rel=1e-5)
    for p, q in zip(scaled.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(p, q)


def test_overflow_of_scaled_gradients_skips_the_step_and_lowers_the_scale():
    step = scaled_step(2.0**127)
    before = [p.clone() for p in step.model.parameters()]
    storage = take_steps(step, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, step.model.parameters()))
    assert step.grad_scaler.get_scale() == 2.0**126 and "grad_norm" not in storage.latest()
    other = scaled_step(1.0)
    other.load_state_dict(step.state_dict())
    assert other.grad_scaler.get_scale() == 2.0**126


def test_amp_settings():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert amp_dtype(False, "float16", cpu) is None
    assert amp_dtype(True, "float16", cuda) is torch.float16
    assert amp_dtype(True, "bfloat16", cpu) is torch.bfloat16
    with pytest.raises(ConfigError, match="SOLVER.AMP.DTYPE.*bfloat16.*CUDA"):
        amp_dtype(True, "float16", cpu)
    with pytest.raises(ConfigError, match="SOLVER.AMP.DTYPE.*int8"):
        amp_dtype(True, "int8", cuda)


def test_amp_config_reaches_the_model(tmp_path):
    trainer = run(
        tmp_path, SOLVER__MAX_ITER=1, SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="bfloat16", DATASETS__TEST=()
    )
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


def with_batch_norm(limit, scale=None, num_parts=1):
    """Make a TrainStep that skips non-finite steps, with a model that has running statistics."""
    torch.manual_seed(0)
    model = ToyNet(None)
    model.norm = nn.BatchNorm2d(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clip = build_gradient_clipper(knet_cfg())
    step = TrainStep(model, optimizer, clip_gradients=clip, seed=0, non_finite_limit=limit, num_parts=num_parts)
    step.data_loader = ToyData(0, 0)
    if scale:
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return step


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("failure", [math.nan, NonFiniteError("Cost class of stage 1 is not finite.")])
def test_non_finite_steps_are_skipped(failure, scale, caplog):
    """A skipped step changes nothing, the next ones are taken; only those in a row count."""
    step = with_batch_norm(limit=2, scale=scale)
    take_steps(step, 1)
    for bad in (1, 3):
        before = copy.deepcopy(step.model.state_dict()), copy.deepcopy(step.optimizer.state_dict())
        ToyNet.fail_at = (f"image{bad}.png", failure)
        storage = take_steps(step, 1, start=bad)
        assert_identical(step.model.state_dict(), before[0])
        assert_identical(step.optimizer.state_dict(), before[1])
        assert "total_loss" not in storage.latest()
        assert f"image{bad}.png" in caplog.text and "skipped (1 in a row)" in caplog.text
        take_steps(step, 1, start=bad + 1)
        assert all(value.isfinite().all() for value in step.model.state_dict().values())
        assert not torch.equal(step.model.head.weight, before[0]["head.weight"])


def test_running_statistics_are_copied_together():
    """For each type one operation, however many layers there are."""
    step = with_batch_norm(limit=2)
    assert [[x.shape for x in buffers] for buffers in step._statistics] in ([[(4,), (4,)], [()]], [[()], [(4,), (4,)]])
    step = step_of(tiny_model("panoptic"))
    assert len(step._statistics) == 2 and sum(map(len, step._statistics)) > 150


@pytest.mark.parametrize("failure", [math.nan, NonFiniteError("Cost class of stage 1 is not finite.")])
def test_part_that_is_not_finite_skips_its_batch(failure):
    """The gradients and running statistics of the earlier parts are discarded before the next step."""
    images = [sample for batch in zip(range(6), ToyData(0, 0)) for sample in batch[1]]
    batches = [images[0:2], images[2:4], images[4:6]]
    step, expected = (with_batch_norm(limit=2, num_parts=2) for _ in range(2))
    step.data_loader, expected.data_loader = batches, [batches[0], batches[2]]
    take_steps(step, 1)
    take_steps(expected, 1)
    ToyNet.fail_at = ("image3.png", failure)
    take_steps(step, 1, start=1)
    assert_identical(step.model.state_dict(), expected.model.state_dict())
    take_steps(step, 1, start=2)
    take_steps(expected, 1, start=2)
    assert_identical(step.model.state_dict(), expected.model.state_dict())
    assert step.model.norm.num_batches_tracked == 4


def test_too_many_non_finite_steps_in_a_row():
    step = with_batch_norm(limit=3)
    for i in range(3):
        ToyNet.fail_at = (f"image{i}.png", math.nan)
        if i == 1:  # the number is in the checkpoint
            state, step = step.state_dict(), with_batch_norm(limit=3)
            step.load_state_dict(state)
            step.data_loader = ToyData(0, 1)
        if i < 2:
            take_steps(step, 1, start=i)
    with pytest.raises(NonFiniteError, match="image2.png"):
        take_steps(step, 1, start=2)


def test_non_finite_gradient_of_a_finite_loss():
    step = make_step()
    step.model.head.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * math.nan,))
    before = [p.clone() for p in step.model.parameters()]
    with pytest.raises(NonFiniteError, match="Not finite: grad_norm = nan.*image0.png"):
        take_steps(step, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, step.model.parameters()))


def test_non_finite_cost_in_the_model_gets_the_images():
    ToyNet.fail_at = ("image0.png", NonFiniteError("Matching cost class of stage 1 is not finite."))
    with pytest.raises(
        NonFiniteError, match="cost class of stage 1.*Iteration 0, learning rate 0.1, images: image0.png"
    ):
        take_steps(make_step(), 1)


def zoo_models():
    """One config file below configs/ for every architecture, without those that differ in schedule or size alone."""
    paths = {}
    for path in sorted(Path(config_folder()).glob("*/*/knet_*.yaml")):
        cfg = knet_cfg()
        merge_config(cfg, str(path))
        paths.setdefault(tiny_zoo_config(cfg).MODEL.dump(), str(path.relative_to(config_folder())))
    return list(paths.values())


def tiny_zoo_config(cfg):
    """The same architecture with few channels, blocks and classes."""
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    model, knet = cfg.MODEL, cfg.MODEL.KNET
    model.WEIGHTS, model.RESNETS.DEPTH = "", 50
    model.RESNETS.STEM_OUT_CHANNELS, model.RESNETS.RES2_OUT_CHANNELS, model.RESNETS.WIDTH_PER_GROUP = 8, 16, 4
    model.FPN.OUT_CHANNELS, model.SEM_SEG_HEAD.CONVS_DIM = 32, 32
    model.SWIN.EMBED_DIM, model.SWIN.DEPTHS, model.SWIN.NUM_HEADS = 12, [2, 2, 2, 2], [1, 2, 3, 4]
    model.SWIN.DROP_PATH_RATE = 0.0
    for norm in (model.RESNETS, model.SEM_SEG_HEAD):
        norm.NORM = norm.NORM.replace("SyncBN", "BN")
    classes = {"instance": (3, 0), "panoptic": (3, 2), "semantic": (0, 5)}[knet.TASK]
    knet.NUM_KERNELS, knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES = 6, *classes
    knet.UPDATE_HEAD.FEATURE_DIM, knet.UPDATE_HEAD.NUM_HEADS, knet.UPDATE_HEAD.FFN_DIM = 32, 4, 48
    knet.AUXILIARY_HEAD.CONV_DIM = 8
    return cfg


def step_of(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    step = TrainStep(model, optimizer, clip_gradients=build_gradient_clipper(knet_cfg()), seed=0)
    step.data_loader = [[make_example((64, 64), count, seed=count) for count in (2, 0)]]
    return step


@pytest.mark.parametrize("path", zoo_models())
def test_every_parameter_of_the_zoo_gets_a_gradient(path):
    cfg = knet_cfg()
    merge_config(cfg, get_config_file(path))
    torch.manual_seed(0)
    model = build_model(tiny_zoo_config(cfg))
    take_steps(step_of(model), 1)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_parameters_without_gradient_are_named(task):
    """No loss depends on the mask branch; DistributedDataParallel would fail in the next step."""
    options = {f"MODEL.KNET.LOSS.{name}_WEIGHT": 0.0 for name in ("MASK", "DICE", "RANK")}
    step = step_of(tiny_model(task, options))
    with pytest.raises(ConfigError, match=r"mask_branch.*MODEL.KNET.LOSS.MASK_WEIGHT, DICE_WEIGHT and RANK_WEIGHT"):
        take_steps(step, 1)


# ---- config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["SOLVER.BASE_LRS", "1.0"], ["SOLVER.BASE_LRS", "SOLVER.BASE_LR?"]),
        (["MODEL.KNETT.TASK", "instance"], ["MODEL.KNETT.TASK", "MODEL.KNET.TASK?"]),
        (["KNET.NUM_STAGES", "2"], ["KNET.NUM_STAGES", "MODEL.KNET.NUM_STAGES?"]),
        (["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR", "fast"]),
        (["SOLVER.BASE_LR"], ["SOLVER.BASE_LR", "KEY VALUE"]),
        (["DATASETS.TEST", "None"], ["DATASETS.TEST is null", "()"]),
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
    assert re.search(r"no_base.yaml.* configs of knet_d2 are in .*configs\.", message("_BASE_: no_base.yaml"))
    assert "MODEL.KNET.THING_CATEGORY_IDS is null" in message("VERSION: 2\nMODEL: {KNET: {THING_CATEGORY_IDS: null}}")
    assert "recursion" in message(f"VERSION: 2\nMODEL: {{KNET: {{THING_CATEGORY_IDS: {'[' * 3000}{']' * 3000}}}}}")
    message("MODEL: [1, 2")
    assert "no mapping" in message("12") and "no mapping" in message("[MODEL, SOLVER]")
    assert "/dev/null is no file" in message("_BASE_: /dev/null")  # as /dev/zero, which would never end
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
