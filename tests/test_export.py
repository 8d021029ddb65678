"""Exported models: ONNX and torch.export against PyTorch, what is in the files, and the runner."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from checkpoint_helpers import ROOT
from helpers import IMAGE_KERNELS, neck, spread_scores, tiny_config, tiny_model
from PIL import Image
from torch import nn

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.data.classes import ClassTable
from knet_d2.errors import CheckpointError, ConfigError, DataError
from knet_d2.export import OUTPUT_NAMES, ExportableKNet, export_metadata, halve, memory_shape
from knet_d2.export.quantization import quantize, share_of_operations
from knet_d2.export.writing import METADATA_FILE
from knet_d2.inference import ImagePredictor, onnx_engine
from knet_d2.modeling.backbone.deform_conv import DeformConv2d
from knet_d2.modeling.postprocessing.scores import SUPPRESSED
from knet_d2.programs import export_model

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

from checks import export_table, exports
from tools import onnx_runner

OUTPUTS = {"instance": "instances", "panoptic": "panoptic_seg", "semantic": "sem_seg"}
OPTIONS = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.KNET.NUM_STAGES": 1,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 160,
    "INPUT.FORMAT": "RGB",
}
# What makes a graph harder than the tiny model's: coordinates, peaks of a map, scores by masks, pyramid pooling, necks
SCORES_BY_MASKS = {"MODEL.KNET.TEST.SCORE_EXPONENT": 0.5, "MODEL.KNET.TEST.MASK_NMS": 0.9}
KINDS = {
    "instance": {"MODEL.KNET.POSITION_ENCODING": "coordinates", **SCORES_BY_MASKS, **neck("BiFPN")},
    "panoptic": {
        **IMAGE_KERNELS,
        **SCORES_BY_MASKS,
        "MODEL.KNET.UPDATE_HEAD.RESIDUAL_MASKS": True,
        "MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True,
    },
    "semantic": {"MODEL.SEM_SEG_HEAD.NAME": "PSPKernelHead", **neck("MSDeformAttn")},
}
DEFORMABLE = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
    "MODEL.RESNETS.DEFORM_MODULATED": True,
}
WINDOWS = {
    "MODEL.BACKBONE.NAME": "build_knet_swin_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SWIN.DEPTHS": [2, 1, 1, 1],
}
THRESHOLD = 0.7  # some of the scores are below it
# Kernels of an untrained model are alike, but equal in equal frames
ALL_SEGMENTS = ["MODEL.KNET.TEST.OVERLAP_THRESHOLD", "0.0", "MODEL.KNET.VIDEO.TEMPERATURE", "1e-4"]
NAMES = ["cup", "fork", "spoon", "table", "wall"]


class Exported(NamedTuple):
    """A model, and the runners of its ONNX and torch.export files by their paths."""

    task: str
    weights: str
    predictor: ImagePredictor
    runners: dict[str, exports.Runner]


def save_model(folder, task, options):
    """Path of a described model whose scores are all over (0, 1)."""
    cfg = tiny_config(task, {**OPTIONS, **options})
    resolve_classes(cfg)
    model = tiny_model(task, {**OPTIONS, **options}, seed=3)
    if task != "semantic":
        spread_scores(model)
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            torch.nn.init.normal_(module.conv_offset.weight, std=0.2)
    ids = [*cfg.MODEL.KNET.THING_CATEGORY_IDS, *cfg.MODEL.KNET.STUFF_CATEGORY_IDS]
    names = NAMES[: len(ids)]
    classes = ClassTable(names, ids, [(9, 9, 9)] * len(ids), cfg.MODEL.KNET.NUM_THING_CLASSES)
    save_weights(str(folder / f"{task}.pth"), model.state_dict(), describe_model(cfg, classes))
    return str(folder / f"{task}.pth")


@pytest.fixture(scope="module", params=list(OUTPUTS))
def exported(request, tmp_path_factory):
    """One model of each task, as the tool exports it."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    weights = save_model(folder, task, KINDS[task])
    paths = [str(folder / f"{task}.{ending}") for ending in ("onnx", "pt2")]
    arguments = [weights, *paths, "--confidence-threshold", str(THRESHOLD), "--opts", *ALL_SEGMENTS]
    export_model.main(export_model.get_parser().parse_args(arguments))
    predictor = knet_d2.load(weights, device="cpu", confidence_threshold=THRESHOLD, opts=ALL_SEGMENTS)
    runners = {path: exports.open_exported(path, OUTPUTS[task]) for path in paths}
    return Exported(task, weights, predictor, runners)


def random_images(batch, size, seed=0):
    """Blurred noise in all colours, so that there is more than one region."""
    rng = np.random.RandomState(seed)
    images = [cv2.resize(rng.randint(0, 256, (5, 6, 3), np.uint8), size[::-1]) for _ in range(batch)]
    return np.stack(images).transpose(0, 3, 1, 2).copy()


@pytest.mark.parametrize("size, batch", [((96, 128), 1), ((70, 101), 2), ((130, 75), 3)])
def test_same_results_as_pytorch(exported, size, batch):
    task, model = exported.task, exported.predictor.model
    images, output_size = random_images(batch, size), np.array([size[0] + 31, size[1] * 2])
    expected = exports.run_model(model, images, output_size)
    inputs = exports.padded(images, model.size_divisibility), np.array(size), output_size
    if task != "semantic":  # the pixels around the images are of no importance
        inputs[0][:, :, size[0] :] = 200
        inputs[0][:, :, :, size[1] :] = 100
    for path, run in exported.runners.items():
        found = run(*inputs)
        for i in range(batch):
            result = exports.agreement(expected[i], {name: x[i] for name, x in found.items()}, THRESHOLD)
            assert result.is_good, (path, result)
        if task == "instance":
            assert found["masks"].shape == (batch, 18, *output_size)
            assert ((found["scores"] > 0) | (found["scores"] == SUPPRESSED)).all()
            assert (found["scores"] == SUPPRESSED).any()
            best = found["scores"] >= THRESHOLD
            assert 0 < best.sum() < best.size
            boxes = np.concatenate([x["boxes"] for x in expected])
            assert boxes == pytest.approx(found["boxes"][best], abs=2)
        if task == "panoptic":
            for segment_map, areas in zip(found["segment_map"], found["areas"]):
                counts = np.bincount(segment_map.ravel(), minlength=len(areas) + 1)[1:]
                assert (counts == areas).all() and areas.any()
                assert (np.diff((areas > 0).astype(int)) <= 0).all()  # kept segments come first
            assert (found["areas"] > 0).sum() > batch


def test_agreement_finds_differences():
    rng = np.random.RandomState(0)
    masks = rng.rand(3, 40, 40) > 0.5
    instances = {"scores": np.float32([0.9, 0.5, 0.49999]), "labels": np.array([1, 0, 0]), "masks": masks}

    def good(expected, found):
        return exports.agreement(expected, found, 0.1).is_good

    assert good(instances, instances)
    swapped = {**instances, "masks": masks[[0, 2, 1]], "scores": np.float32([0.9, 0.49999, 0.5])}
    assert good(instances, swapped)  # scores that are nearly equal
    assert not good(instances, {**instances, "masks": masks[[1, 0, 2]]})
    assert not good(instances, {**instances, "labels": np.array([1, 0, 1])})
    assert not good(instances, {**instances, "scores": instances["scores"] + np.float32([2e-4, 0, 0])})
    assert not good(instances, {**instances, "scores": np.float32([0.9, 0.5, 0.05])})
    segment_map = np.repeat([0, 1, 2, 2], 400).reshape(40, 40)
    panoptic = {
        "segment_map": segment_map,
        "scores": np.float32([0.9, 0.5]),
        "labels": np.array([0, 4]),
        "areas": np.array([400, 800]),
    }
    longer = {k: v if k == "segment_map" else np.append(v, 0).astype(v.dtype) for k, v in panoptic.items()}
    assert good(panoptic, longer)
    assert not good(panoptic, {**longer, "labels": np.array([0, 3, 0])})
    assert not good(panoptic, {**longer, "areas": np.array([400, 800, 1])})
    changed = segment_map.copy()
    changed[0, :2] = 1
    assert not good(panoptic, {**longer, "segment_map": changed})
    assert not good({"label_map": segment_map}, {"label_map": changed})


def test_a_difference_is_explained_by_the_logit_that_makes_it(exported):
    model, image, size = exported.predictor.model, random_images(1, (64, 96))[0], np.array([64, 96])
    if exported.task == "semantic":
        assert exports.find_gates(model, copy.deepcopy(model).double(), image) == []
        return
    with torch.no_grad():
        state = model.sem_seg_head(model.backbone(model.preprocess_image([{"image": torch.from_numpy(image)}]).tensor))
    probable = state.mask_logits[0].flatten().abs().argsort(descending=True)
    (plain,) = exports.run_model(model, image[None], size)
    gates = [exports.Gate(0, int(position)) for position in probable[:200:50]]
    for gate in gates:
        with exports.moved(model, gate):
            (other,) = exports.run_model(model, image[None], size)
        if not exports.agreement(plain, other, THRESHOLD).is_good:
            break
    else:
        raise AssertionError("no pixel changes the result")
    others = [x for x in gates if x != gate]
    assert exports.is_explained(model, [*others, gate], image, size, other, THRESHOLD)
    assert not exports.is_explained(model, [], image, size, other, THRESHOLD)
    wrong = {**other, "scores": other["scores"] + np.float32(0.01)}
    assert not exports.is_explained(model, gates, image, size, wrong, THRESHOLD)


def test_files_say_what_a_runner_needs(exported):
    task, (onnx_path, pt2_path) = exported.task, exported.runners
    metadata = onnxruntime.InferenceSession(onnx_path).get_modelmeta().custom_metadata_map
    with zipfile.ZipFile(pt2_path) as archive:  # torch.export.load takes seconds
        (extra,) = (name for name in archive.namelist() if name.endswith(f"extra/{METADATA_FILE}"))
        assert json.loads(archive.read(extra)) == metadata
    assert (metadata["task"], metadata["output"]) == (task, OUTPUTS[task])
    assert metadata["knet_d2_version"] == knet_d2.__version__ and metadata["score_threshold"] == str(THRESHOLD)
    assert [x["name"] for x in json.loads(metadata["classes"])] == NAMES[: 3 if task == "instance" else 5]
    preprocessing = json.loads(metadata["preprocessing"])
    assert (preprocessing["format"], preprocessing["min_size"], preprocessing["max_size"]) == ("RGB", 96, 160)
    assert preprocessing["size_divisibility"] == (1 if task == "semantic" else 32)


def test_check_tool(exported, tmp_path, capsys, monkeypatch):
    runners = exported.runners
    monkeypatch.setattr(exports, "open_exported", lambda path, *_: runners[path])
    for i in range(2):
        Image.fromarray(random_images(1, (80, 90), seed=i)[0].transpose(1, 2, 0)).save(tmp_path / f"{i}.png")

    def check(weights, *sizes):
        arguments = [weights, *runners, "--images", str(tmp_path / "*.png"), "--sizes", *sizes]
        arguments += ["--confidence-threshold", str(THRESHOLD), "--opts", *ALL_SEGMENTS]
        return exports.main(exports.get_parser().parse_args(arguments)), capsys.readouterr().out

    code, output = check(exported.weights, "64x96", "75x90")
    rows = [line.split() for line in output.splitlines()[2:10]]
    kinds = [(os.path.basename(path), size, batch) for size in ("64x96", "75x90") for batch in "12" for path in runners]
    assert code == 0 and [tuple(row[:3]) for row in rows] == kinds and all(row[3] == "2" for row in rows)
    assert "0 of 8 rows out of bounds" in output
    content = torch.load(exported.weights, weights_only=True)
    for name, value in content["model"].items():
        if name.startswith("cascade") and value.is_floating_point():
            value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    torch.save(content, tmp_path / "other.pth")
    code, output = check(str(tmp_path / "other.pth"), "75x90")
    assert code == 1 and "4 rows out of bounds" in output and "0 of 4 rows" not in output


# ---- the runner ------------------------------------------------------------------------------------------------

# As if nothing but numpy, onnxruntime and OpenCV were installed
BARE = """
import runpy, sys

LEFT_OUT = ("torch", "torchvision", "detectron2", "knet_d2", "PIL", "scipy", "pycocotools", "onnx")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LEFT_OUT:
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_runner(exported, tmp_path):
    """From a picture larger than the model's size to masks of the picture's size, as knet_d2.load does it."""
    path, _ = exported.runners
    image = cv2.GaussianBlur(random_images(1, (150, 200))[0].transpose(1, 2, 0), (0, 0), 2)
    expected = exported.predictor(image, order="BGR")
    found = [x for x in onnx_runner.OnnxRunner(path)(image) if x.mask.any()]
    assert len(found) == len(expected.segments) > 0
    for segment, wanted in zip(found, expected.segments):
        assert segment.name == expected.classes.names[wanted.label] and segment.mask.shape == image.shape[:2]
        assert segment.score == (None if wanted.score is None else pytest.approx(wanted.score, abs=1e-4))
        assert (segment.mask == wanted.mask).mean() > 0.999

    cv2.imwrite(str(tmp_path / "in.png"), image)
    command = [sys.executable, "-c", BARE, str(ROOT / "tools" / "onnx_runner.py"), path, str(tmp_path / "in.png")]
    done = subprocess.run([*command, "--output", str(tmp_path / "out.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    areas = [int(line.split()[-2]) for line in done.stdout.splitlines()]
    assert [x for x in areas if x] == [x.mask.sum() for x in found]
    drawn = cv2.imread(str(tmp_path / "out.png"))
    assert drawn.shape == image.shape and (drawn != image).any(axis=2).mean() > 0.02


def test_runner_follows_objects_as_the_predictor_does(exported):
    """The same ids in the frames of a video, one of which is another scene."""
    path, _ = exported.runners
    runner = onnx_runner.OnnxRunner(path)
    if runner.output == "sem_seg":
        with pytest.raises(ValueError, match="semantic model"):
            onnx_runner.OnnxTracker(runner)
        return
    images = [cv2.GaussianBlur(x.transpose(1, 2, 0), (0, 0), 2) for x in random_images(2, (75, 90))]
    frames = [images[0], images[0], images[1], images[0]]
    tracker, video = onnx_runner.OnnxTracker(runner), exported.predictor.video(frames, "BGR")
    for frame, expected in zip(frames, video, strict=False):
        names = expected.classes.names
        found = [(x.name, x.track_id) for x in tracker(frame)]
        assert found == [(names[x.label], x.track_id) for x in expected.segments] and found


def test_runner_gives_a_model_its_memory(tmp_path):
    """Kernel linking and fusing: the ids of PyTorch, and kernels that are passed on from frame to frame."""
    learned = {f"MODEL.KNET.VIDEO.{key}": True for key in ("EMBEDDING", "LINKING", "FUSING")}
    weights = save_model(tmp_path, "panoptic", {**learned, "MODEL.KNET.NUM_STAGES": 2})
    path = str(tmp_path / "panoptic.onnx")
    program = str(tmp_path / "panoptic.pt2")
    export_model.main(export_model.get_parser().parse_args([weights, path, program, "--opts", *ALL_SEGMENTS]))
    predictor, runner = knet_d2.load(weights, device="cpu", opts=ALL_SEGMENTS), onnx_runner.OnnxRunner(path)
    images = [cv2.GaussianBlur(x.transpose(1, 2, 0), (0, 0), 2) for x in random_images(2, (75, 90))]
    tracker, video = onnx_runner.OnnxTracker(runner), predictor.video([images[i] for i in (0, 0, 1, 0)], "BGR")
    for i, expected in zip((0, 0, 1, 0), video, strict=True):
        found = [(x.name, x.track_id) for x in tracker(images[i])]
        assert found == [(expected.classes.names[x.label], x.track_id) for x in expected.segments] and found
    first = runner.outputs(images[0])
    second = runner.outputs(images[0], runner.outputs(images[1])["kernels"])
    assert np.abs(second["kernels"] - first["kernels"]).max() > 1e-3
    # Images have no frame before them; the check of exported files knows it, for both kinds of files
    shape = memory_shape(predictor.model)
    assert shape == (8, 32) and memory_shape(tiny_model("panoptic")) is None
    size, images = (96, 128), random_images(2, (96, 128))
    expected = exports.run_model(predictor.model, images, size)
    inputs = exports.padded(images, predictor.model.size_divisibility), np.array(size), np.array(size)
    for file in (path, program):
        tensors = exports.open_exported(file, "panoptic_seg", shape)(*inputs)
        found = exports.agreement(expected[1], {name: x[1] for name, x in tensors.items()}, 0.3)
        assert found.is_good, (file, found)
    images = [x.transpose(1, 2, 0) for x in images]
    result = knet_d2.load(path, engine="onnxruntime")(images[0], "BGR")
    assert [x.label for x in result.segments] == [x.label for x in predictor(images[0], "BGR").segments]


@pytest.mark.parametrize("size, new_size", [((90, 120), (96, 128)), ((300, 221), (130, 96)), ((70, 50), (350, 250))])
def test_runner_resizes_as_pillow_does(size, new_size):
    image = random_images(1, size)[0].transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(image).resize(new_size[::-1], Image.BILINEAR))
    assert (onnx_runner.resize(image, new_size) == expected).all()


def test_runner_refuses_what_it_can_not_prepare(exported, tmp_path):
    path, _ = exported.runners
    runner = onnx_runner.OnnxRunner(path)
    for image, message in (
        (np.zeros(20, np.uint8), "expected uint8"),
        (np.zeros((20, 20, 3), np.int64), "expected uint8"),
        (np.full((20, 20, 3), np.nan), "finite"),
        (np.full((20, 20, 3), 200.0), "expected 0 to 1"),
        (np.zeros((20, 20, 2), np.uint8), "2 channels, but the model takes 3"),
    ):
        with pytest.raises(ValueError, match=message):
            runner(image)


# ---- onnxruntime behind the predictor ---------------------------------------------------------------------------


def assert_same_prediction(found, expected):
    assert found.size == expected.size and len(found.segments) == len(expected.segments) > 0
    for segment, wanted in zip(found.segments, expected.segments):
        assert segment.label == wanted.label
        assert segment.score == (None if wanted.score is None else pytest.approx(wanted.score, abs=1e-4))
        assert (segment.mask == wanted.mask).mean() > 0.999


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_predictor_of_an_exported_file(exported, engine):
    pytest.importorskip(engine)
    path, pt2_path = exported.runners
    predictor, reference = knet_d2.load(path, engine=engine), exported.predictor
    assert (predictor.classes, predictor.outputs) == (reference.classes, (OUTPUTS[exported.task],))
    sizes = [(150, 200), (75, 90), (150, 200)]
    images = [random_images(1, size, seed=i)[0].transpose(1, 2, 0) for i, size in enumerate(sizes)]
    expected = [reference(image, order="RGB") for image in images]
    for found, wanted in zip(predictor.predict_batch(images, "RGB"), expected, strict=True):
        assert_same_prediction(found, wanted)
    assert_same_prediction(predictor(images[1], order="RGB", tile_size=500), expected[1])
    if exported.task != "semantic":
        padded = predictor.predict_batch(images, "RGB", pad_to=(160, 160))
        for found, wanted in zip(padded, reference.predict_batch(images, "RGB", pad_to=(160, 160)), strict=True):
            assert_same_prediction(found, wanted)
    for use in (lambda: predictor.trace(images[0], "RGB"), lambda: list(predictor.video(images, "RGB"))):
        with pytest.raises(ConfigError, match=f"engine = '{engine}': traces, videos"):
            use()
    with ThreadPoolExecutor(3) as pool:
        for found, wanted in zip(pool.map(lambda x: predictor(x, order="RGB"), images), expected, strict=True):
            assert_same_prediction(found, wanted)


def test_what_is_fixed_in_an_exported_file(exported, tmp_path):
    path, _ = exported.runners
    with pytest.raises(ConfigError, match="opts and config_file are fixed in an exported file"):
        knet_d2.load(path, opts=["INPUT.MIN_SIZE_TEST", "64"])
    with pytest.raises(ConfigError, match=r"engine = 'pytorch': .*onnx is computed by 'onnxruntime' or 'openvino'"):
        knet_d2.load(path, engine="pytorch")
    with pytest.raises(ConfigError, match="engine = 'tensorrt': .*pth is computed by 'pytorch' or 'onnxruntime' or"):
        knet_d2.load(exported.weights, engine="tensorrt")
    with pytest.raises(ConfigError, match="device = 'tpu'"):
        knet_d2.load(path, device="tpu")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="onnxruntime .* can't open it"):
        knet_d2.load(tmp_path / "bad.onnx")
    with pytest.raises(CheckpointError, match="absent.onnx: there is no such file"):
        knet_d2.load(tmp_path / "absent.onnx")
    if exported.task == "panoptic":
        with pytest.raises(ConfigError, match=f"confidence_threshold = 0.2: .* was exported with {THRESHOLD}"):
            knet_d2.load(path, confidence_threshold=0.2)
    if exported.task == "instance":
        image = random_images(1, (75, 90))[0].transpose(1, 2, 0)
        found = knet_d2.load(path, confidence_threshold=0.75)(image, order="RGB")
        assert found.segments and min(x.score for x in found.segments) >= 0.75


def test_what_openvino_refuses(exported, tmp_path):
    pytest.importorskip("openvino")
    path, _ = exported.runners
    with pytest.raises(ConfigError, match="device = 'cuda': this OpenVINO can't use it. Use 'cpu'"):
        knet_d2.load(path, engine="openvino", device="cuda")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="OpenVINO .* can't open it"):
        knet_d2.load(tmp_path / "bad.onnx", engine="openvino")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    with pytest.raises(CheckpointError, match="bare.onnx: not a file of knet export"):
        knet_d2.load(tmp_path / "bare.onnx", engine="openvino")


def test_an_engine_that_is_missing(exported, monkeypatch):
    path, _ = exported.runners
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)
        with pytest.raises(ConfigError, match=f"engine = '{engine}': it is missing; install"):
            knet_d2.load(path, engine=engine)


def test_weights_are_exported_once_for_the_engine(tmp_path, monkeypatch):
    """The model has deformable convolutions, so that ONNX's are compared with torchvision's."""
    weights = save_model(tmp_path, "semantic", {**DEFORMABLE, "MODEL.KNET.NUM_STAGES": 0})
    monkeypatch.setattr(onnx_engine, "cache_folder", lambda: str(tmp_path / "cache"))
    image = random_images(1, (96, 128))[0].transpose(1, 2, 0)
    expected = knet_d2.load(weights, device="cpu")(image, order="RGB")
    assert_same_prediction(knet_d2.load(weights, engine="onnxruntime")(image, order="RGB"), expected)
    monkeypatch.setattr(onnx_engine, "trace", None)  # it can't be exported again
    predictor = knet_d2.load(weights, engine="onnxruntime")
    assert predictor.classes.names == NAMES
    assert_same_prediction(predictor(image, order="RGB"), expected)
    if importlib.util.find_spec("openvino"):
        assert_same_prediction(knet_d2.load(weights, engine="openvino")(image, order="RGB"), expected)
    with pytest.raises(TypeError):
        knet_d2.load(weights, engine="onnxruntime", opts=["INPUT.MIN_SIZE_TEST", "64"])  # another model


# ---- kinds of models -------------------------------------------------------------------------------------------


def test_half_precision(tmp_path):
    weights = save_model(tmp_path, "semantic", {"MODEL.KNET.NUM_STAGES": 0, **neck("MSDeformAttn")})
    path = str(tmp_path / "half.onnx")
    export_model.main(export_model.get_parser().parse_args([weights, path, "--fp16"]))
    session = onnxruntime.InferenceSession(path)
    images = random_images(1, (96, 128))
    (label_map,) = session.run(
        None, {"image": images, "image_size": np.array([96, 128]), "output_size": np.array([96, 128])}
    )
    (expected,) = exports.run_model(knet_d2.load(weights, device="cpu").model, images, (96, 128))
    same = (label_map[0] == expected["label_map"]).mean()
    assert 0.97 < same < 1
    kinds = {x.data_type for x in onnx.load(path).graph.initializer}
    assert {1, 10} <= kinds  # float32 and float16


@pytest.mark.parametrize("options", [{}, IMAGE_KERNELS])
def test_half_precision_of_instances(options):
    """Without tracing, which takes long; kernels of the image have parts that stay in float32.

    The seed is one for which no pixel lies so near a hard mask's border, and no peak so near another, that rounding
    moves it.
    """
    model = spread_scores(tiny_model("instance", {**OPTIONS, **options}, seed=1).eval())
    arrays = random_images(2, (96, 128)), np.array([90, 120]), np.array([100, 130])
    inputs = [torch.from_numpy(x) for x in arrays]
    with torch.no_grad():
        expected, _, _, masks, _ = ExportableKNet(model)(*inputs)
        scores, _, _, half_masks, _ = ExportableKNet(halve(model))(*inputs)
    assert 0 < (scores - expected).abs().max() < 0.02
    assert abs(half_masks.float().mean() - masks.float().mean()) < 0.02 < masks.float().mean()


def test_attention_in_windows_is_exported_for_one_size(tmp_path):
    weights, path = save_model(tmp_path, "panoptic", WINDOWS), str(tmp_path / "swin.onnx")
    reference = knet_d2.load(weights, device="cpu", opts=ALL_SEGMENTS)
    arguments = [weights, path, "--size", "96x160"]
    export_model.main(export_model.get_parser().parse_args([*arguments, "--opts", *ALL_SEGMENTS]))
    predictor, runner = knet_d2.load(path), onnx_runner.OnnxRunner(path)
    images = [random_images(1, size)[0].transpose(1, 2, 0) for size in ((150, 200), (75, 112), (96, 160))]
    expected = reference.predict_batch(images, "BGR", pad_to=(96, 160))
    for image, found, wanted in zip(images, predictor.predict_batch(images, "BGR"), expected, strict=True):
        assert_same_prediction(found, wanted)
        of_runner = [x for x in runner(image) if x.mask.any()]
        assert [x.name for x in of_runner] == [reference.classes.names[x.label] for x in wanted.segments]
    assert_same_prediction(predictor.predict_batch(images[:1] * 3, "BGR")[2], expected[0])
    with pytest.raises(DataError, match=r"resized to 128 x 96 .* exported for up to 96 x 160\. .* --size"):
        predictor(images[0].swapaxes(0, 1), order="BGR")
    with pytest.raises(ValueError, match=r"resized to \(128, 96\), but the model takes up to \(96, 160\)"):
        runner(images[0].swapaxes(0, 1))
    with pytest.raises(ConfigError, match="--size 100x160: use multiples of 32"):
        export_model.main(export_model.get_parser().parse_args([weights, path, "--size", "100x160"]))


def test_integers(exported, tmp_path):
    """Backbone and neck in 8 bits, the end layers and the cascade not; results stay alike."""
    path, target = list(exported.runners)[0], str(tmp_path / "int8.onnx")
    plain = knet_d2.load(path)
    images = [cv2.GaussianBlur(random_images(1, (96, 128), seed=i)[0].transpose(1, 2, 0), (0, 0), 2) for i in range(4)]
    engine = onnx_engine.OnnxPredictor(path)
    inputs = [engine.inputs([engine.sample(image)]) for image in images]
    found = quantize(path, target, iter(inputs))
    assert found.num_images == 4 and found.reduce_range
    assert {"backbone.stem.conv1", "backbone.bottom_up.stem.conv1"} & set(found.layers)
    ends = ("sem_seg_head.classifier", "sem_seg_head.instance_kernels")
    assert all(name == "sem_seg_head" or name.startswith(ends) for name in found.float_layers)
    assert not any(name == "sem_seg_head" or name.startswith(ends) for name in found.layers)
    metadata = onnxruntime.InferenceSession(target).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["quantization"])["layers"] == found.layers
    graph = onnx.load(target).graph
    constants = {x.name: x for x in graph.initializer}
    sources = {name: x for x in graph.node for name in x.output}
    weights = [sources.get(x.input[1]) for x in graph.node if x.op_type == "Conv"]
    integers = [constants[x.input[0]] for x in weights if x is not None and x.op_type == "DequantizeLinear"]
    assert len(integers) == len(found.layers) and {x.data_type for x in integers} == {3}  # int8
    assert max(np.abs(np.frombuffer(x.raw_data, np.int8).astype(int)).max() for x in integers) <= 64  # of 7 bits
    for image in images:
        expected, other = plain(image, order="RGB"), knet_d2.load(target)(image, order="RGB")
        assert (other.segment_map() > 0).mean() > 0.5 * (expected.segment_map() > 0).mean()
    model = exported.predictor.model
    share = share_of_operations(model, export_model.example_sample(model), found.layers)
    assert 0.5 < share < 1
    for arguments in (["x.pth", "x.pt2", "--int8", "a.jpg"], ["x.pth", "x.onnx", "--fp16", "--int8", "a.jpg"]):
        with pytest.raises(ConfigError, match="--int8: x.(pt2|onnx): use it for .onnx files and without --fp16"):
            export_model.main(export_model.get_parser().parse_args(arguments))


def test_activations_with_a_limit_and_layers_that_stay_float(tmp_path):
    """The range of a convolution before a ReLU6 is 0 to 6, whatever the convolution gives."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU6())
    model.forward = lambda image: model.model.backbone(image)
    model.eval()
    nn.init.normal_(model.model.backbone[0].weight, std=5.0)
    image = torch.randn(1, 3, 16, 16)
    source, target = str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx")
    torch.onnx.export(model, (image,), source, input_names=["image"], dynamo=True, verbose=False)
    inputs = [{"image": image.numpy()}]

    def scales(path):
        graph = onnx.load(path).graph
        constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
        sources = {name: x for x in graph.node for name in x.output}
        quantizers = [x for x in graph.node if x.op_type == "QuantizeLinear"]
        return [constants[x.input[1]] for x in quantizers if getattr(sources.get(x.input[0]), "op_type", "") == "Conv"]

    found = quantize(source, target, iter(inputs))
    assert found.layers == ["backbone.0", "backbone.2"] and found.float_layers == []
    assert scales(target)[0] == pytest.approx(6 / 255, rel=1e-3)
    found = quantize(source, target, iter(inputs), excluded=["backbone.0"])
    assert found.layers == ["backbone.2"] and found.float_layers == ["backbone.0"]
    with pytest.raises(ConfigError, match="--int8-float neck: no layer is named so. Layers: backbone.0, backbone.2"):
        quantize(source, target, iter(inputs), excluded=["neck"])


def test_export_table_keeps_its_rows(tmp_path):
    """In the order of the architectures, whatever order they were measured in."""
    target = tmp_path / "exports.md"
    names = [x.removesuffix(".yaml") for x in export_table.ARCHITECTURES[:2]]
    rows = [f"| {name} | {ending} | fp32 | any | 1 |" for name in names[::-1] for ending in (".pt2", ".onnx")]
    for row in rows:
        export_table.add_row(target, row)
    assert target.read_text() == export_table.HEADER + "\n".join([*rows[2:], *rows[:2]]) + "\n"
    assert set(export_table.read_rows(target)) == {(n, e, "fp32") for n in names for e in (".pt2", ".onnx")}


class Untrusted:
    """Stands for an opened ONNX file of an instance model, whose content may be anything."""

    def __init__(self, labels=(1,), **changes):
        cfg = tiny_config("instance", {**OPTIONS, "MODEL.KNET.TEST.SCORE_THRESHOLD": 0.0})
        resolve_classes(cfg)
        classes = ClassTable(NAMES[:3], [0, 1, 2], [(9, 9, 9)] * 3, 3)
        good = export_metadata(cfg, classes, tiny_model("instance", OPTIONS))
        preprocessing = {**json.loads(good["preprocessing"]), **changes.pop("preprocessing", {})}
        self.metadata = {**good, "preprocessing": json.dumps(preprocessing), **changes}
        self.labels = labels

    def __call__(self, inputs):
        n, size = len(self.labels), inputs["output_size"]
        scores, labels = np.full((1, n), 0.5, np.float32), np.array([self.labels])
        return scores, labels, np.zeros((1, n, 4), np.float32), np.ones((1, n, *size), bool)


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "boxes"},
        {"memory": "[1000000, 1000000]"},
        {"memory": "{" * 10},
        *({"preprocessing": {"smallest_side": x}} for x in (10**6, 0, "64", None)),
        *({"preprocessing": {"static_size": x}} for x in ([10**6, 10**6], "ab", [96.5, 96])),
        *({"preprocessing": {"min_size": x}} for x in (10**6, -1, [96])),
        {"preprocessing": {"size_divisibility": 0}},
        {"preprocessing": {"image_type": "object"}},
    ],
)
def test_what_an_exported_file_states_is_checked(changes, monkeypatch):
    """Before an image is prepared: otherwise it would need memory without limit, or fail with any error."""
    monkeypatch.setattr(onnx_engine, "open_runtime", lambda *_: Untrusted(**changes))
    with pytest.raises(CheckpointError, match="^m.onnx: what it states of its images or its output makes no sense"):
        onnx_engine.OnnxPredictor("m.onnx")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_graph_whose_labels_are_no_classes(label, monkeypatch):
    image = np.zeros((96, 96, 3), np.uint8)
    for labels in ((0, 2), (0, label)):
        monkeypatch.setattr(onnx_engine, "open_runtime", lambda *_, labels=labels: Untrusted(labels))
        engine = onnx_engine.OnnxPredictor("m.onnx")
        if label not in labels:
            assert engine.predict([engine.sample(image)])[0]["instances"].pred_classes.tolist() == [0, 2]
            continue
        with pytest.raises(CheckpointError, match=f"m.onnx: gives labels from .*{label}.* names 3 classes"):
            engine.predict([engine.sample(image)])


def test_test_time_augmentation_can_not_be_exported():
    cfg = tiny_config("instance", {**OPTIONS, "TEST.AUG.ENABLED": True})
    with pytest.raises(ConfigError, match="TEST.AUG.ENABLED = True: an exported model is one pass"):
        export_metadata(cfg, ClassTable([], [], [], 0), tiny_model("instance", OPTIONS))


def test_what_can_not_be_exported(tmp_path):
    with pytest.raises(ConfigError, match=r"TEST\.OUTPUTS"):
        ExportableKNet(tiny_model("panoptic", {"MODEL.KNET.TEST.OUTPUTS": ["sem_seg"]}).eval())
    with pytest.raises(ConfigError, match=r"TEST\.DETECTIONS_PER_IMAGE"):
        ExportableKNet(tiny_model("instance", {"TEST.DETECTIONS_PER_IMAGE": 0}).eval())
    with pytest.raises(ConfigError, match="model.tflite.*.onnx or .pt2"):
        export_model.main(export_model.get_parser().parse_args(["x.pth", str(tmp_path / "model.tflite")]))


def test_results_of_the_static_kernels():
    """Run the exportable model without tracing it, because tracing takes long and does not depend on the stage."""
    model = tiny_model("instance", {**OPTIONS, "MODEL.KNET.TEST.STAGE": 0}).eval()
    images, size, output_size = random_images(1, (75, 140)), np.array([75, 140]), np.array([80, 90])
    (expected,) = exports.run_model(model, images, output_size)
    inputs = exports.padded(images, model.size_divisibility), size, output_size
    with torch.no_grad():
        found = ExportableKNet(model)(*map(torch.from_numpy, inputs))
    found = {name: x[0].numpy() for name, x in zip(OUTPUT_NAMES["instances"], found)}
    assert exports.agreement(expected, found, 0.0).is_good
