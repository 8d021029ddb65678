"""The benchmark: models find objects, times of parts add up, and counts equal known values."""

import json
import sys

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from helpers import move_to_fake_cuda, needs_fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

# Of Detectron2's main branch it needs pkg_resources, which setuptools has no more
pytest.importorskip("detectron2.model_zoo", exc_type=ModuleNotFoundError)

from knet_d2.errors import ConfigError
from knet_d2.modeling.postprocessing import PostProcessor
from knet_d2.programs import analyze_model, benchmark
from knet_d2.programs.benchmark import measure, models, parts
from knet_d2.programs.benchmark.filling import count_findings, fill
from knet_d2.programs.benchmark.models import build_subject

SIZE = (96, 128)
# A panoptic K-Net that is small, but not in what it returns
OPTIONS = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.KNET.UPDATE_HEAD.FFN_DIM": 64,
}
SMALL = ",".join(f"{key}={value}" for key, value in OPTIONS.items())
INSTANCE, PANOPTIC = (f"coco/{task}/knet_r50_fpn_1x.yaml,{SMALL}" for task in ("instance", "panoptic"))
SMALL_PEER = f"panoptic_fpn,{','.join(list(SMALL.split(','))[:3])},MODEL.RPN.POST_NMS_TOPK_TEST=300"


def run_benchmark(argv):
    benchmark.main(benchmark.get_parser().parse_args(argv))


@pytest.mark.parametrize(
    "spec, least", [(INSTANCE, {"kernels": 50, "masks": 50}), (PANOPTIC, {"segments": 15}), (SMALL_PEER, None)]
)
def test_filled_models_find_something(spec, least):
    subject = build_subject(spec, "cpu")
    subject.model.eval()
    inputs = subject.inputs(SIZE, 1, SIZE)
    fill(subject, inputs)
    found = count_findings(subject, inputs)
    if least is None:
        assert 100 <= found["candidates"] < 4000 and found["segments"] > 15
        assert found["masks"] > 50
        least = {}
    # Of the 100 detections some are smaller than a pixel of this small image
    assert all(found[name] >= number for name, number in least.items()), found


def test_comparison_of_two_models_in_both_modes(tmp_path, capsys):
    path = tmp_path / "result.json"
    options = ["--rounds", "1", "--warmup", "0", "--size", "96x128", "--output-size", "48x64", "--threads", "1"]
    compared = [PANOPTIC, f"{PANOPTIC},MODEL.KNET.NUM_STAGES=1"]
    argv = ["--models", *compared, "--mode", "inference", "training", *options, "--json", str(path)]
    run_benchmark(argv)
    content = json.loads(path.read_text())
    assert torch.__version__.startswith(content["environment"]["torch"])
    rows = content["rows"]
    modes = ("inference", "training")
    assert [(row["model"], row["mode"]) for row in rows] == [(model, mode) for mode in modes for model in compared]
    for row in rows:
        assert row["seconds"] > 0 and row["output"] == [48, 64] and row["parameters"] > 100_000
        expected = {"backbone", "static kernels", "stage 1", "preprocessing", "rest"}
        expected |= {"stage 2", "stage 3"} if "NUM_STAGES" not in row["model"] else set()
        training = {"targets", "matching", "losses", "backward", "optimiser", "mapper, per image"}
        expected |= training if row["mode"] == "training" else {"post-processing"}
        assert set(row["parts"]) == expected
    assert rows[0]["speed"] == rows[2]["speed"] == 1.0
    assert rows[0]["giga_multiply_adds"] > rows[1]["giga_multiply_adds"]
    assert rows[2]["giga_multiply_adds"] > 2 * rows[0]["giga_multiply_adds"]  # the backward pass counts
    table = capsys.readouterr().out
    assert "segments" in table and "post-processing" in table


def test_times_of_parts_leave_out_those_inside_of_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])

    class Model:
        def inner(self):
            now[0] += 2

        def outer(self):
            now[0] += 1
            self.inner()
            self.inner()

    model, timer = Model(), parts.PartTimer(torch.device("cpu"))
    timer.wrap(model, "inner", "a")
    timer.wrap(model, "outer", "b")
    timer.measure("all", model.outer)
    assert dict(timer.seconds) == {"a": 4.0, "b": 1.0, "all": 0.0}
    timer.unwrap()
    model.outer()
    assert timer.seconds["a"] == 4.0


def test_cuda_is_waited_for_around_every_run(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait {device}"))
    measure.interleave([lambda: events.append("a"), lambda: events.append("b")], 2, 1, torch.device("cuda", 0))
    assert events == [x for _ in range(3) for run in "ab" for x in ("wait cuda:0", run, "wait cuda:0")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' process status")
def test_memory_is_what_is_held_at_once():
    def run():
        torch.ones(64 << 18)  # 64 MiB, given back at once
        boxes = Boxes(torch.ones(1 << 16, 4))
        return [{"instances": Instances((8, 8), pred_boxes=boxes, scores=torch.ones(1 << 16)), "sem_seg": None}]

    memory = measure.measure_memory(run, torch.device("cpu"))
    assert 60 < memory.peak < 90
    assert memory.returned == 1.25


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' process status")
def test_peaks_of_parts_count_what_parts_inside_of_them_hold():
    class Model:
        def inner(self):
            torch.ones(64 << 18)  # 64 MiB, given back at once

        def outer(self):
            kept = torch.ones(32 << 18)
            self.inner()
            return kept

        def last(self):
            torch.ones(8 << 18)

    # The C library keeps freed memory where something that is held lies behind it. Blocks as large as these lie behind
    # each other once a block of 31 MiB was freed, and go back at once before
    torch.ones(31 << 18)
    freed, behind = [torch.ones(20 << 18) for _ in range(10)], torch.ones(1 << 18)
    del freed
    model, device = Model(), torch.device("cpu")
    held, timer = measure.held_mib(device), parts.PartTimer(device, has_peaks=True)
    for name in ("inner", "outer", "last"):
        timer.wrap(model, name, name)
    timer.measure("all", lambda: (model.outer(), model.last())[1])
    peaks = {name: peak - held for name, peak in timer.peaks.items()}
    assert 92 < peaks["inner"] < 110
    assert all(abs(peaks[name] - peaks["inner"]) < 2 for name in ("outer", "all"))  # else the outer one would be 32
    assert 36 < peaks["last"] < 60
    del behind


@needs_fake_cuda
def test_the_gpu_s_comparison_on_fake_tensors(monkeypatch, capsys):
    """Post-processing and training are left out, because they depend on tensor values and on the CUDA driver."""

    def to(module, device, *args, **kwargs):
        move_to_fake_cuda(module)
        return module

    stack = staticmethod(lambda images, *args: ImageList(torch.stack(images), [x.shape[-2:] for x in images]))
    monkeypatch.setattr(ImageList, "from_tensors", stack)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(PostProcessor, "forward", lambda self, *args: [{}])

    def images(size, batch, *args, **kwargs):
        return [{"image": torch.zeros(3, *size, dtype=torch.uint8)}] * batch

    monkeypatch.setattr(models, "make_batch", images)
    values = {"is_available": True, "is_bf16_supported": True, "memory_allocated": 1, "max_memory_allocated": 3 << 20}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    options = ["--device", "cuda", "--rounds", "1", "--warmup", "0", "--size", "96x128", "--batch", "2"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        run_benchmark(["--models", PANOPTIC, "backbone_fpn", *options, "--precision", "tf32", "bf16"])
    assert capsys.readouterr().out.count("| 3 ") >= 4  # MiB
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_semantic_model(tmp_path):
    small = f"{SMALL},MODEL.SEM_SEG_HEAD.CONVS_DIM=64,MODEL.KNET.UPDATE_HEAD.FEATURE_DIM=64"
    spec = f"ade20k/semantic/knet_upernet_r50_80k.yaml,{small}"
    options = [
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--size",
        "64x96",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "a.json"),
    ]
    run_benchmark(["--models", spec, *options])
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["giga_multiply_adds"] > 0.1 and set(row["parts"]) >= {"static kernels", "stage 3", "post-processing"}


def test_operations_of_a_convolution():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.zeros(2, 4, 8, 10)
    assert measure.count_operations(lambda: conv(x)) * 1e9 == pytest.approx(2 * 8 * 10 * 6 * 4 * 9)


@pytest.mark.parametrize("most", [0, 1, 2, 7, 16, 100])
def test_largest_batch(most):
    tried = []
    found = measure.largest_batch(lambda batch: tried.append(batch) or batch <= most, limit=64)
    assert found <= min(most, 64) and found >= min(most, 64) * 7 // 8
    assert len(tried) == len(set(tried)) <= 12


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--models", "yolo"], "--models yolo: use"),
        (["--models", f"{PANOPTIC},SEED"], "write 'SEED' as KEY=VALUE"),
        (["--batch", "max"], "--batch max: use --device cuda"),
        (["--precision", "fp16"], "--precision fp16: use bf16"),
    ],
)
def test_wrong_options(argv, message):
    with pytest.raises(ConfigError, match=message):
        run_benchmark(argv)


def test_analysis_counts_what_fvcore_does_not_know(capsys):
    options = [item for option in SMALL.split(",") for item in option.split("=")]
    size = (64, 96)
    counts = analyze_model.analyze("coco/panoptic/knet_r50_fpn_1x.yaml", options, size).by_module()
    stage = next(name for name in counts if name.endswith("cascade.stages.0"))
    by_operator = analyze_model.analyze("coco/panoptic/knet_r50_fpn_1x.yaml", options, size).by_module_and_operator()
    kernels, pixels, dim = 153, 8 * 12, 256
    assert by_operator[stage]["baddbmm"] == kernels * pixels * dim
    interaction = by_operator[f"{stage}.interaction"]
    assert interaction["scaled_dot_product_attention"] == 2 * kernels * kernels * dim
    arguments = ["coco/panoptic/knet_r50_fpn_1x.yaml", *options, "--size", "64x96"]
    analyze_model.main(analyze_model.get_parser().parse_args(arguments))
    assert "cascade" in capsys.readouterr().out
