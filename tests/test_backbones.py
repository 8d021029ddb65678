"""Backbones against recorded tensors of the official models, independent implementations and closed forms."""

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
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from reference_fill import fill, filled_state_dict
from torch import nn

import knet_d2.modeling.backbone  # noqa: F401  registers the builders
from knet_d2.checkpoint.key_table import KeyRule, translate_state_dict
from knet_d2.checkpoint.openmmlab_backbones import (
    merging_from_swin_release,
    openmmlab_backbone_rules,
    openmmlab_neck_rules,
    pretrained_backbone_rules,
)
from knet_d2.config import add_knet_config
from knet_d2.errors import ConfigError
from knet_d2.modeling.backbone.deform_conv import DeformConv2d
from knet_d2.modeling.backbone.resnet import contracted_dilations
from knet_d2.modeling.backbone.swin import SwinBlock, SwinTransformer, relative_position_index, shifted_window_mask
from knet_d2.modeling.norm import EvalBatchNorm2d, resolve_norm, sync_batch_norm

DATA = Path(__file__).parent / "data"
RES = ["res2", "res3", "res4", "res5"]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

RESNET_FPN = ["MODEL.BACKBONE.NAME", "build_knet_resnet_fpn_backbone", "MODEL.RESNETS.NORM", "EvalBN"]
RESNET_V1C = ["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", "MODEL.RESNETS.NORM", "SyncBN"]
RESNET_V1C += ["MODEL.RESNETS.STEM_TYPE", "deeplab", "MODEL.BACKBONE.FREEZE_AT", 0]
D8 = ["MODEL.RESNETS.RES4_DILATION", 2, "MODEL.RESNETS.RES5_DILATION", 4]
SWIN_L = ["MODEL.SWIN.EMBED_DIM", 192, "MODEL.SWIN.DEPTHS", [2, 2, 18, 2], "MODEL.SWIN.NUM_HEADS", [6, 12, 24, 48]]
DEFORM = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
TINY_SWIN = ["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
TINY_SWIN += ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [2, 1, 2, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4]]

OPTIONS = {
    "r50_fpn": RESNET_FPN,
    "r101_fpn": RESNET_FPN + ["MODEL.RESNETS.DEPTH", 101],
    "r101_dcn_fpn": RESNET_FPN + ["MODEL.RESNETS.DEPTH", 101] + DEFORM,
    "r50_d8": RESNET_V1C + D8,
    "swin_t": ["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", "MODEL.BACKBONE.FREEZE_AT", 0],
    "swin_l_fpn": ["MODEL.BACKBONE.NAME", "build_knet_swin_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0] + SWIN_L,
}


def build(options):
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = RES
    cfg.merge_from_list(list(options))
    return build_backbone(cfg)


def manifest(name):
    with gzip.open(DATA / "backbone_manifests.json.gz") as f:
        return json.load(f)[name]


class Model(nn.Module):
    """Gives a backbone the prefix that it has in a model."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def translate(state_dict, backbone):
    prefix = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
    rules = openmmlab_backbone_rules(prefix) + openmmlab_neck_rules()
    return translate_state_dict(state_dict, rules, Model(backbone).state_dict().keys())


def randomise_norms(backbone):
    """Give batch norms statistics and weights that matter, with a tame residual stream."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in backbone.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.3 * noise if name.endswith(("mean", "bias")) else 0.4 + 0.3 * noise)


def relative_error(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


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
    frozen_norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen_norms) == (11 if "fpn" in name and "swin" not in name else 0)
    if "swin" in name:
        assert ignored == ["relative_position_index"] * len([k for k in ours if k.endswith("bias_table")])
    else:
        without_counter = [m for m in frozen_norms if getattr(m, "num_batches_tracked", None) is None]
        assert ignored == ["num_batches_tracked"] * len(without_counter)
    num_frozen_affine = sum(2 * m.num_features for m in frozen_norms)
    assert sum(p.numel() for p in backbone.parameters()) + num_frozen_affine == official["num_params"]


def test_pretrained_v1c_layout():
    """OpenMMLab's ImageNet model is the official backbone without its prefix, with a classifier."""
    with torch.device("meta"):
        model = Model(build(OPTIONS["r50_d8"]))
        official = {k[len("backbone.") :]: torch.empty(s) for k, s in manifest("r50_d8")["state_dict"].items()}
    official.update({"fc.weight": torch.empty(1000, 2048), "fc.bias": torch.empty(1000)})
    translation = translate_state_dict(official, pretrained_backbone_rules(official, "backbone."))
    assert translation.state_dict.keys() == model.state_dict().keys()
    assert translation.ignored == ["fc.weight", "fc.bias"] and translation.unknown == []
    assert pretrained_backbone_rules({"conv1.weight": 0}, "backbone.") is None


@pytest.mark.parametrize("name", ["r50_fpn", "r50_d8", "swin_t"])
def test_outputs_equal_official_ones(name):
    """The image has no friendly size: 100 x 150 (padded to 128 x 160) or 90 x 123."""
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
    rules = pretrained_backbone_rules(theirs.state_dict(), "")
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


def swin_release_layout(state_dict):
    """torchvision's Swin state dict in the keys of the Swin release; both have the same order of tensors' elements."""
    renamed = {}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        if part != "features":
            renamed[key] = value
            continue
        index, _, rest = rest.partition(".")
        if index == "0":
            part, _, rest = rest.partition(".")
            renamed[f"patch_embed.{ {'0': 'proj', '2': 'norm'}[part] }.{rest}"] = value
        elif int(index) % 2:
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            renamed[f"layers.{int(index) // 2}.blocks.{rest}"] = value
        else:
            renamed[f"layers.{int(index) // 2 - 1}.downsample.{rest}"] = value
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return renamed


def test_swin_equals_torchvision_through_the_release_layout():
    """At a size where no map fits into one window, where torchvision does not shift."""
    settings = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4], window_size=[7, 7], stochastic_depth_prob=0.0, num_classes=3, **settings
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    ours = SwinTransformer(**settings).eval()
    release = swin_release_layout(theirs.state_dict())
    translation = translate_state_dict(release, pretrained_backbone_rules(release, ""), ours.state_dict().keys())
    assert translation.unknown == []
    assert {"head.weight", "norm.bias", "layers.0.blocks.1.attn_mask"} < set(translation.ignored)
    incompatible = ours.load_state_dict(translation.state_dict, strict=False)
    assert incompatible.unexpected_keys == [] and all(k.startswith("out_norms") for k in incompatible.missing_keys)
    image = torch.rand(2, 3, 236, 260)
    with torch.no_grad():
        features, x = ours(image), image
        for i, layer in enumerate(theirs.features):
            x = layer(x)
            if i % 2:
                expected = F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
                assert relative_error(features[RES[i // 2]], expected) < 2e-5, i


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


def test_merging_permutation_by_hand():
    release = ["00", "10", "01", "11"]  # (y, x) of the release's four blocks of channels
    channels, columns = 3, []
    for block in release:
        columns += [int(f"{channel}{block}") for channel in range(channels)]
    ours = merging_from_swin_release(torch.tensor([columns, columns]))
    expected = [int(f"{channel}{y}{x}") for channel in range(channels) for y in "01" for x in "01"]
    assert ours.tolist() == [expected, expected]


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


def test_detection_resnet_trains_affine_weights_after_res2_only():
    backbone = build([*RESNET_FPN, "MODEL.BACKBONE.FREEZE_AT", 2]).train()
    before = {k: v.clone() for k, v in backbone.named_buffers()}
    out = backbone(torch.rand(2, 3, 64, 64))
    sum(v.square().sum() for v in out.values()).backward()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith(("bottom_up.stem", "bottom_up.res2"))
        assert (parameter.grad is None) == frozen, name
        assert parameter.requires_grad != frozen, name
    norms = [n for n, _ in backbone.named_parameters() if "norm" in n]
    assert len(norms) == 2 * (53 - 11)


def test_semantic_resnet_trains_everything_in_training_mode():
    backbone = build([*RESNET_V1C, "MODEL.RESNETS.OUT_FEATURES", ["res2"]]).train()
    mean = backbone.stem.conv1.norm.running_mean.clone()
    backbone(torch.rand(2, 3, 32, 32))["res2"].sum().backward()
    assert not torch.equal(backbone.stem.conv1.norm.running_mean, mean)
    assert all(p.grad is not None for p in backbone.parameters())


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
    """Detectron2's own initialisation with norms in eval mode gives values of thousands."""
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


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.SWIN.OUT_FEATURES", ["p2"]),
        ("MODEL.SWIN.OUT_FEATURES", []),
        ("MODEL.SWIN.DEPTHS", [2, 2]),
        ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 25]),
        ("MODEL.SWIN.DROP_PATH_RATE", 1.0),
    ],
)
def test_wrong_swin_config_names_the_key(key, value):
    with pytest.raises(ConfigError, match=key):
        build(["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", key, value])


# ---------------------------------------------------------------- deformable convolution


def sampled(image, y, x):
    """Bilinear value of a map [H, W] at a point, zeros outside; differentiable."""
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    value = image.new_zeros(())
    for yi, xi in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= yi < image.shape[0] and 0 <= xi < image.shape[1]:
            value = value + image[yi, xi] * (1 - (y - yi).abs()) * (1 - (x - xi).abs())
    return value


def slow_deform_conv(module, x):
    """The definition, one value at a time, for a batch of one."""
    predict, groups = module.conv_offset, module.groups
    offsets = F.conv2d(x, predict.weight, predict.bias, module.stride, module.padding, module.dilation)[0]
    kernel = module.weight.shape[-1]
    points = kernel * kernel
    offset_groups = offsets.shape[0] // (points * (3 if module.modulated else 2))
    masks = offsets[2 * points * offset_groups :].sigmoid()
    rows = []
    for oy, ox in np.ndindex(*offsets.shape[1:]):
        columns = []
        for channel in range(x.shape[1]):
            group = channel // (x.shape[1] // offset_groups)
            for point in range(points):
                dy, dx = offsets[2 * (group * points + point) :, oy, ox][:2]
                y = oy * module.stride[0] - module.padding[0] + point // kernel * module.dilation[0] + dy
                x_ = ox * module.stride[1] - module.padding[1] + point % kernel * module.dilation[1] + dx
                value = sampled(x[0, channel], y, x_)
                columns.append(value * masks[group * points + point, oy, ox] if module.modulated else value)
        columns = torch.stack(columns).view(groups, -1)
        weight = module.weight.view(groups, -1, columns.shape[1])
        rows.append(torch.einsum("gi,goi->go", columns, weight).flatten())
    return torch.stack(rows, 1).view(1, -1, *offsets.shape[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 2, "offset_groups": 2},
        {"modulated": True, "offset_groups": 2},
    ],
    ids=str,
)
def test_deformable_convolution_and_its_gradients_by_definition(settings):
    torch.manual_seed(0)
    module = DeformConv2d(4, 6, kernel_size=3, bias=False, **{"padding": 1, **settings}).double()
    nn.init.normal_(module.conv_offset.weight, std=0.3)
    nn.init.normal_(module.conv_offset.bias, std=1.0)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, module.weight, module.conv_offset.weight, module.conv_offset.bias]
    out, expected = module(x), slow_deform_conv(module, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, direction)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


def test_deformable_convolution_passes_gradcheck():
    torch.manual_seed(0)
    module = DeformConv2d(2, 2, kernel_size=3, padding=1, bias=True).double()
    nn.init.normal_(module.conv_offset.bias)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_fresh_deformable_convolution_is_an_ordinary_one():
    x = torch.randn(2, 4, 7, 9)
    plain = DeformConv2d(4, 6, kernel_size=3, padding=1, stride=2, bias=True)
    modulated = DeformConv2d(4, 6, kernel_size=3, padding=1, stride=2, bias=False, modulated=True)
    torch.testing.assert_close(plain(x), F.conv2d(x, plain.weight, plain.bias, 2, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(modulated(x), 0.5 * F.conv2d(x, modulated.weight, None, 2, 1), rtol=0, atol=1e-5)


def test_deformable_backbone_takes_part_in_mixed_precision_and_training():
    backbone = build(["MODEL.BACKBONE.NAME", "build_knet_resnet_backbone", "MODEL.RESNETS.NORM", "EvalBN", *DEFORM])
    randomise_norms(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backbone.train()(torch.rand(1, 3, 32, 64))["res5"]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    deformable = [m for m in backbone.modules() if isinstance(m, DeformConv2d)]
    assert len(deformable) == 4 + 6 + 3
    assert all(m.conv_offset.bias.grad.abs().sum() > 0 for m in deformable)


def test_deformable_convolution_keeps_its_type_and_samples_in_float32():
    torch.manual_seed(0)
    module = DeformConv2d(4, 4, kernel_size=3, padding=1, bias=False, norm=nn.BatchNorm2d(4)).bfloat16().eval()
    nn.init.normal_(module.conv_offset.bias)
    x = torch.randn(1, 4, 6, 6).bfloat16()
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), module.double()(x.double()).detach()) < 0.02


def test_modulation_and_groups_follow_the_config():
    options = ["MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2]
    with torch.device("meta"):
        backbone = build([*RESNET_FPN, *DEFORM, *options])
    assert backbone.bottom_up.res3[0].conv2.conv_offset.out_channels == 2 * 27
    assert not hasattr(backbone.bottom_up.res2[0].conv2, "conv_offset")


# ---------------------------------------------------------------- Swin


def slow_window_attention(block, x):
    """Attention over all positions of the map; a position sees those of its own cell of the (shifted) grid."""
    window, attention = block.window_size, block.attention
    batch, height, width, dim = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    padded = x.shape[1:3]
    y, x_ = (p.flatten() for p in torch.meshgrid(torch.arange(padded[0]), torch.arange(padded[1]), indexing="ij"))
    cell = [(p - block.shift).div(window, rounding_mode="floor") for p in (y, x_)]
    seen = (cell[0][:, None] == cell[0]) & (cell[1][:, None] == cell[1])
    dy, dx = y[:, None] - y + window - 1, x_[:, None] - x_ + window - 1
    row = (dy * (2 * window - 1) + dx).where(seen, torch.tensor(0))
    q, k, v = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[row].permute(2, 0, 1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    out = attention.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
    return out[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("height, width", [(10, 15), (11, 7), (3, 4), (5, 5)])
def test_window_attention_by_definition(shift, height, width):
    """Also on maps smaller than a window, where the official models shift as well."""
    torch.manual_seed(0)
    block = SwinBlock(8, num_heads=2, window_size=5, shift=shift, mlp_ratio=4.0, drop_path=0.0).double().eval()
    nn.init.normal_(block.attention.relative_position_bias_table)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    padded = [length + -length % 5 for length in (height, width)]
    y = x + slow_window_attention(block, block.norm1(x))
    y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x, shifted_window_mask(*padded, 5, shift)), y, rtol=0, atol=1e-12)


def test_shift_mask_and_position_index_by_hand():
    mask = shifted_window_mask(4, 4, window_size=2, shift=1)
    assert mask.shape == (4, 4, 4) and not mask[0].any()
    beside, below = mask[1] == 0, mask[2] == 0  # windows that join left | right, upper | lower parts
    assert beside.tolist() == [[i % 2 == j % 2 for j in range(4)] for i in range(4)]
    assert below.tolist() == [[i // 2 == j // 2 for j in range(4)] for i in range(4)]
    assert torch.equal(mask[3], -100.0 * (1 - torch.eye(4)))
    assert relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    index = relative_position_index(7)
    assert (index[0, 0], index[0, 48], index[48, 0], int(index.sum())) == (84, 0, 168, 84 * 49 * 49)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 33), (90, 123), (61, 224)])
def test_swin_takes_any_size(height, width):
    backbone = build(TINY_SWIN).eval()
    out = backbone(torch.rand(2, 3, height, width))
    for i, (name, value) in enumerate(out.items()):
        assert name == RES[i] and value.is_contiguous()
        stride, channels = 4 * 2**i, 8 * 2**i
        assert value.shape == (2, channels, math.ceil(height / stride), math.ceil(width / stride))
        assert backbone.output_shape()[name] == ShapeSpec(channels=channels, stride=stride)
        torch.testing.assert_close(value.mean(1), torch.zeros_like(value[:, 0]), rtol=0, atol=1e-5)


def test_padding_is_zeros_at_the_bottom_and_right():
    backbone = build(TINY_SWIN).eval()
    image = torch.rand(1, 3, 30, 45)
    padded = F.pad(image, (0, 3, 0, 2))
    for name, value in backbone(image).items():
        assert torch.equal(value, backbone(padded)[name])


def test_swin_out_features_and_freezing():
    backbone = build([*TINY_SWIN, "MODEL.SWIN.OUT_FEATURES", ["res4", "res3"], "MODEL.BACKBONE.FREEZE_AT", 2])
    assert list(backbone(torch.rand(1, 3, 32, 32))) == ["res3", "res4"]
    assert len(backbone.stages) == 3
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(("patch_embed", "stages.0"))}


def test_drop_path_grows_linearly_and_drops_whole_images():
    backbone = build([*TINY_SWIN, "MODEL.SWIN.DROP_PATH_RATE", 0.5])
    rates = [block.drop_path.p for stage in backbone.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))
    block = SwinBlock(4, num_heads=1, window_size=2, shift=0, mlp_ratio=1.0, drop_path=0.5).train()
    x = torch.rand(64, 2, 2, 4)
    torch.manual_seed(0)
    untouched = (block(x, None) == x).flatten(1).all(1)  # both branches dropped: with probability 1/4
    assert 4 < untouched.sum() < 32
    assert not (block.eval()(x, None) == x).flatten(1).all(1).any()


def test_other_swin_settings_reach_the_model():
    with torch.device("meta"):
        backbone = build([*TINY_SWIN, "MODEL.SWIN.WINDOW_SIZE", 5, "MODEL.SWIN.MLP_RATIO", 2.0])
    block = backbone.stages[0].blocks[1]
    assert block.mlp[0].out_features == 16 and block.shift == 2
    assert block.attention.relative_position_bias_table.shape == (81, 1)
