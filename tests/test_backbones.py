"""Backbones against recorded tensors of the official models and torchvision; norms, freezing, dilation, key tables."""

import gzip
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from backbone_helpers import (
    D8,
    DEFORM,
    RES,
    RESNET_FPN,
    RESNET_V1C,
    SWIN_L,
    TINY_SWIN,
    Model,
    build,
    randomise_norms,
    relative_error,
)
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from checks.references.filling import fill, filled_state_dict
from knet_d2.checkpoint.key_table import KeyRule, translate_state_dict
from knet_d2.checkpoint.openmmlab_backbones import (
    openmmlab_backbone_rules,
    openmmlab_neck_rules,
    pretrained_backbone_rules,
)
from knet_d2.errors import ConfigError
from knet_d2.modeling.backbone.resnet import contracted_dilations
from knet_d2.modeling.layers import EvalBatchNorm2d, resolve_norm, sync_batch_norm

DATA = Path(__file__).parent / "data"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
OPTIONS = {
    "r50_fpn": RESNET_FPN,
    "r101_fpn": RESNET_FPN + ["MODEL.RESNETS.DEPTH", 101],
    "r101_dcn_fpn": RESNET_FPN + ["MODEL.RESNETS.DEPTH", 101] + DEFORM,
    "r50_d8": RESNET_V1C + D8,
    "swin_t": ["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", "MODEL.BACKBONE.FREEZE_AT", 0],
    "swin_l_fpn": ["MODEL.BACKBONE.NAME", "build_knet_swin_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0] + SWIN_L,
}


def manifest(name):
    with gzip.open(DATA / "backbone_manifests.json.gz") as f:
        return json.load(f)[name]


def translate(state_dict, backbone):
    prefix = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
    rules = openmmlab_backbone_rules(prefix) + openmmlab_neck_rules()
    return translate_state_dict(state_dict, rules, Model(backbone).state_dict().keys())


# ---------------------------------------------------------------- equality with the official models


@pytest.mark.parametrize(
    "name, shape, values",
    [
        ("backbone.conv1.weight", [64, 3, 7, 7], [0.1402284, 0.1465047, 0.1746897]),
        ("backbone.bn1.running_var", [64], [0.9138897, 1.023445, 1.002411]),
        ("backbone.layer1.0.bn3.weight", [256], [0.4746518, 0.4616453, 0.4919896]),
    ],
)
def test_fill_gives_the_recorded_weights(name, shape, values):
    np.testing.assert_allclose(fill(name, shape).ravel()[:3], values, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_official_keys_shapes_and_parameter_count(name):
    official = manifest(name)
    with torch.device("meta"):
        backbone = build(OPTIONS[name])
        state_dict = {key: torch.empty(shape) for key, shape in official["state_dict"].items()}
    translation = translate(state_dict, backbone)
    ours = Model(backbone).state_dict()
    assert translation.unknown == []
    assert {k: v.shape for k, v in translation.state_dict.items()} == {k: v.shape for k, v in ours.items()}
    ignored = [key.rsplit(".", 1)[1] for key in translation.ignored]
    if "swin" in name:
        assert ignored == ["relative_position_index"] * len([k for k in ours if k.endswith("bias_table")])
    else:
        assert ignored == []
    assert sum(p.numel() for p in backbone.parameters()) == official["num_params"]


def test_pretrained_v1c_layout():
    """OpenMMLab's ImageNet model is the official backbone without its prefix, with a classifier."""
    with torch.device("meta"):
        model = Model(build(OPTIONS["r50_d8"]))
        official = {k[len("backbone.") :]: torch.empty(s) for k, s in manifest("r50_d8")["state_dict"].items()}
    official.update({"fc.weight": torch.empty(1000, 2048), "fc.bias": torch.empty(1000)})
    translation = translate_state_dict(official, pretrained_backbone_rules(official, "backbone.")[1])
    assert translation.state_dict.keys() == model.state_dict().keys()
    assert translation.ignored == ["fc.weight", "fc.bias"] and translation.unknown == []
    assert pretrained_backbone_rules({"conv1.weight": 0}, "backbone.") is None


@pytest.mark.parametrize("name", ["r50_fpn", "r50_d8", "swin_t"])
def test_outputs_equal_official_ones(name):
    """The sides of the image are not multiples of the stride: 100 x 150 (padded to 128 x 160) or 90 x 123."""
    backbone = build(OPTIONS[name]).eval()
    translation = translate(filled_state_dict(manifest(name)["state_dict"]), backbone)
    Model(backbone).load_state_dict(translation.state_dict)
    recorded = np.load(DATA / "backbones.npz")
    image = torch.from_numpy(recorded[f"{name}/image"].astype(np.float32))
    image = ((image - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    if backbone.size_divisibility:
        height, width = image.shape[2:]
        image = F.pad(image, (0, -width % backbone.size_divisibility, 0, -height % backbone.size_divisibility))
    with torch.no_grad():
        outputs = backbone(image)
        if hasattr(backbone, "bottom_up"):
            assert list(outputs) == ["p2", "p3", "p4", "p5"]
            outputs = {**outputs, **backbone.bottom_up(image)}
    for key, value in outputs.items():
        assert relative_error(value[0, :2], recorded[f"{name}/{key}"]) < 2e-5, key
        stats = [value.double().mean(), value.double().std(), value.min(), value.max()]
        np.testing.assert_allclose(stats, recorded[f"{name}/{key}_stats"], atol=2e-5 * value.abs().max(), rtol=0)


# ---------------------------------------------------------------- equality with independent implementations


@pytest.mark.parametrize("dilated", [False, True])
def test_resnet_equals_torchvision(dilated):
    """torchvision's dilated stages have contracted dilation too; its layout is one of those that we read."""
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, dilated, dilated]).eval()
    backbone = build(
        ["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", "MODEL.RESNETS.NORM", "EvalBN", *(D8 if dilated else [])]
    )
    randomise_norms(backbone)
    for key, value in theirs.state_dict().items():
        if "bn" in key or "downsample.1" in key:
            torch.manual_seed(len(key))
            value.copy_(torch.rand_like(value.float()) * 0.3 + 0.3)
    _, rules = pretrained_backbone_rules(theirs.state_dict(), "")
    translation = translate_state_dict(theirs.state_dict(), rules, backbone.state_dict().keys())
    assert translation.unknown == []
    assert sorted(k for k in translation.ignored if "num_batches" not in k) == ["fc.bias", "fc.weight"]
    backbone.load_state_dict(translation.state_dict)
    x = torch.rand(1, 3, 65, 90)
    features = backbone(x)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for name, layer in zip(RES, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
            x = layer(x)
            assert relative_error(features[name], x) < 1e-5, name
    assert backbone.output_shape()["res5"].stride == (8 if dilated else 32)


def test_detectron2_pickle_loads_completely(tmp_path):
    """Detectron2's torchvision-style .pkl through its own checkpointer: the names have to match its heuristics."""
    theirs = torchvision.models.resnet18()
    model = Model(build([*RESNET_FPN, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]))
    arrays = {}
    for key, value in theirs.state_dict().items():
        if not value.is_floating_point():
            continue
        for i in (4, 3, 2, 1):
            key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        arrays[key if key.startswith("res") else "stem." + key] = value.numpy() + 0.5
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    DetectionCheckpointer(model).load(str(path))
    loaded = model.backbone.bottom_up.state_dict()
    compared = [key for key in loaded if "num_batches_tracked" not in key]
    assert len(compared) == 5 * 20
    for key in compared:
        np.testing.assert_array_equal(loaded[key].numpy(), arrays[key], err_msg=key)


def test_translation_reports_every_key():
    rules = [KeyRule(r"a\.(\d)", r"b.\1", lambda t: -t), KeyRule("drop", None), KeyRule("rare", "c", optional=True)]
    source = {"a.1": torch.ones(1), "drop": torch.ones(1), "rare": torch.ones(1), "xa.1": torch.ones(1)}
    result = translate_state_dict(source, rules, model_keys={"b.1"})
    assert result.state_dict == {"b.1": torch.tensor([-1.0])} and result.source_keys == {"b.1": "a.1"}
    assert result.ignored == ["drop", "rare"] and result.unknown == ["xa.1"]
    assert "c" in translate_state_dict(source, rules).state_dict


# ---------------------------------------------------------------- norms and freezing


def test_eval_norm_uses_and_keeps_its_statistics():
    norm = EvalBatchNorm2d(2)
    values = {"running_mean": [1.0, -1.0], "running_var": [4.0, 9.0], "weight": [2.0, 3.0], "bias": [0.5, 0.0]}
    norm.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    norm.train()
    x = torch.full((3, 2, 4, 5), 5.0)
    out = norm(x)
    torch.testing.assert_close(out[:, 0], torch.full((3, 4, 5), 4.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(out[:, 1], torch.full((3, 4, 5), 6.0), rtol=0, atol=1e-4)
    assert norm.running_mean.tolist() == [1.0, -1.0] and norm.running_var.tolist() == [4.0, 9.0]
    out.sum().backward()
    torch.testing.assert_close(norm.weight.grad, 60 * torch.tensor([2.0, 2.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.bias.grad, torch.tensor([60.0, 60.0]))


def _normalise_on_rank(rank, world_size, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=world_size)
    torch.manual_seed(rank)
    norm = resolve_norm("SyncBN")(3)
    x = torch.rand(2, 3, 4, 4) * (1 + rank)
    torch.save((x, norm(x).detach(), type(norm).__name__), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_sync_norm_on_one_process_and_on_two(tmp_path):
    assert type(sync_batch_norm(4)) is nn.BatchNorm2d
    assert resolve_norm("GN") == "GN" and resolve_norm("") == ""
    torch.multiprocessing.spawn(_normalise_on_rank, (2, str(tmp_path)), nprocs=2)
    (x0, y0, kind), (x1, y1, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = nn.BatchNorm2d(3)(torch.cat([x0, x1])).detach()
    assert kind != "BatchNorm2d"
    torch.testing.assert_close(torch.cat([y0, y1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [RESNET_FPN, [*RESNET_FPN, *DEFORM], TINY_SWIN])
def test_fresh_backbone_is_tame(options):
    """A random backbone has small activations; Detectron2's initialisation gives thousands with norms in eval mode."""
    out = build(options).train()(torch.randn(1, 3, 64, 64))
    assert all(v.std() < 10 and v.abs().sum() > 0 for v in out.values())


# ---------------------------------------------------------------- dilation and config


def test_dilations_and_strides_of_d8():
    assert contracted_dilations(3, 1) == [1, 1, 1] and contracted_dilations(2, 4) == [2, 4]
    with torch.device("meta"):
        backbone = build([*RESNET_V1C, *D8])
    convs = [[block.conv2 for block in getattr(backbone, name)] for name in RES]
    assert [[c.dilation[0] for c in stage] for stage in convs] == [[1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]]
    assert [stage[0].stride[0] for stage in convs] == [1, 2, 1, 1]
    assert {name: spec.stride for name, spec in backbone.output_shape().items()} == dict(zip(RES, (4, 8, 8, 8)))


@pytest.mark.parametrize("height, width", [(64, 64), (65, 90), (1, 31)])
def test_deep_stem_size(height, width):
    stem = build([*RESNET_V1C, "MODEL.RESNETS.OUT_FEATURES", ["stem", "res2"]]).stem
    assert stem(torch.rand(1, 3, height, width)).shape[2:] == (math.ceil(height / 4), math.ceil(width / 4))


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.RESNETS.DEPTH", 51),
        ("MODEL.RESNETS.STEM_TYPE", "deep"),
        ("MODEL.RESNETS.RES4_DILATION", 0),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True]),
        ("MODEL.RESNETS.OUT_FEATURES", ["p2"]),
    ],
)
def test_wrong_resnet_config_names_the_key(key, value):
    with pytest.raises(ConfigError, match=key):
        build(["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", key, value])


def test_resnet18_refuses_what_its_blocks_cannot_do():
    small = ["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
    with pytest.raises(ConfigError, match="RES2_OUT_CHANNELS = 256 .* set 64"):
        build(small)
    with pytest.raises(ConfigError, match="RES5_DILATION"):
        build([*small, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.RES5_DILATION", 2])


def test_a_pyramid_without_output_convolutions_ends_with_its_sums():
    options = [*RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 8]
    torch.manual_seed(0)
    whole, bare = build(options).eval(), build([*options, "MODEL.FPN.OUTPUT_CONVS", False]).eval()
    missing, unexpected = bare.load_state_dict(whole.state_dict(), strict=False)
    assert missing == [] and {key.split(".")[0] for key in unexpected} == {f"fpn_output{i}" for i in range(2, 6)}
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        levels, sums = whole(x), bare(x)
        for name, conv in zip(("p5", "p4", "p3", "p2"), whole.output_convs, strict=True):
            torch.testing.assert_close(conv(sums[name]), levels[name])
