"""Backbones of timm: maps, freezing, norms, rates, normalisation of images, and what is refused."""

import copy
import logging
import math
import sys

import pytest
import timm
import timm_helpers  # noqa: F401  registers small networks
import torch
from backbone_helpers import RES
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from helpers import make_batch, set_options, tiny_config
from torch import nn
from torch.nn import functional as F

from knet_d2.config import get_knet_cfg
from knet_d2.data.timm_names import fill_pixel_statistics
from knet_d2.engine.optimizer import build_optimizer
from knet_d2.errors import ConfigError
from knet_d2.modeling.backbone.timm import TimmBackbone
from knet_d2.modeling.layers import AppliedNorm
from knet_d2.modeling.meta_arch import KNet


def timm_config(name, **options):
    options = {key.replace("__", "."): value for key, value in options.items()}
    plain = {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.TIMM.NAME": name}
    return set_options(get_knet_cfg(), {**plain, "MODEL.FPN.IN_FEATURES": RES, "MODEL.FPN.OUT_CHANNELS": 8, **options})


def build(name, channels=3, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(timm_config(name, **options), ShapeSpec(channels=channels))


def image(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def maps(backbone, x):
    with torch.no_grad():
        return backbone.eval()(x)


# ---------------------------------------------------------------- maps


def test_a_square_map_with_as_many_channels_as_rows_is_not_turned():
    backbone = build("knet_test_swin", MODEL__TIMM__OUT_FEATURES=["res2"])
    x = image(1, 3, 64, 64)
    expected = backbone.network.layers[0](backbone.network.patch_embed(x))[0].permute(2, 0, 1)
    assert torch.equal(maps(backbone, x)["res2"][0], expected) and expected.shape == (16, 16, 16)


def test_each_map_is_the_one_asked_for_alone_and_deeper_layers_are_gone():
    whole = build("mobilenetv4_conv_small")
    x = image(1, 3, 64, 96)
    for i, (name, value) in enumerate(maps(whole, x).items()):
        stride = 4 * 2**i
        assert value.shape == (1, whole.output_shape()[name].channels, 64 // stride, 96 // stride)
        alone = build("mobilenetv4_conv_small", MODEL__TIMM__OUT_FEATURES=[name])
        missing, unexpected = alone.load_state_dict(whole.state_dict(), strict=False)
        assert missing == [] and (unexpected != []) == (name != "res5")
        assert torch.equal(maps(alone, x)[name], value)


@pytest.mark.parametrize("name", ["knet_test_swin", "test_vit"])
def test_only_the_deepest_map_is_normalised_as_in_timm_s_own_forward(name):
    features = ["res4"] if name == "test_vit" else RES
    backbone = build(name, MODEL__TIMM__OUT_FEATURES=features)
    network = backbone.network
    nn.init.normal_(network.norm.weight)
    x = image(1, 3, 160, 160)
    with torch.no_grad():
        expected = network.eval().forward_features(x)
    found = maps(backbone, x)
    if name == "test_vit":
        rows = expected[:, network.num_prefix_tokens :]
        torch.testing.assert_close(found["res4"].flatten(2).transpose(1, 2), rows, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(found["res5"].permute(0, 2, 3, 1), expected, rtol=0, atol=1e-6)
        network.norm.weight.data.zero_()
        assert torch.equal(maps(backbone, x)["res4"], found["res4"])


def test_position_embeddings_of_a_network_that_is_not_square():
    """At its native size it is timm's fixed network to the bit; other sizes have their own number of tokens."""
    backbone = build("knet_test_vit14", MODEL__TIMM__OUT_FEATURES=["res4"])
    fixed = timm.create_model("knet_test_vit14", num_classes=0, global_pool="").eval()
    fixed.load_state_dict(backbone.network.state_dict())
    native = image(1, 3, 56, 84)
    with torch.no_grad():
        expected = fixed.forward_features(native)[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    backbone.window = backbone.patch  # no resizing
    assert torch.equal(maps(backbone, native)["res4"], expected)
    for size in [(84, 56), (70, 98)]:
        assert maps(backbone, image(1, 3, *size))["res4"].shape == (1, 32, size[0] // 14, size[1] // 14)


def test_a_patch_of_14_pixels_covers_16_of_the_image():
    backbone = build("knet_test_vit14", MODEL__TIMM__OUT_FEATURES=["res4"])
    x = image(1, 3, 64, 96)
    fitted = F.interpolate(x, (56, 84), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = backbone.network.eval().forward_features(fitted)[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(maps(backbone, x)["res4"], expected, rtol=0, atol=1e-6)
    assert backbone.output_shape()["res4"] == ShapeSpec(channels=32, stride=16)


@pytest.mark.parametrize("name", ["test_vit", "knet_test_vit14"])
def test_the_pyramid_of_a_plain_vit_pads_to_whole_patches(name):
    backbone = build(name, MODEL__BACKBONE__NAME="build_timm_fpn_backbone")
    x = image(1, 3, 70, 97)
    levels = maps(backbone, x)
    padded = maps(backbone, F.pad(x, (0, 112 - 97, 0, 80 - 70)))
    assert list(levels) == ["p2", "p3", "p4", "p5"] and backbone.size_divisibility == 32
    for level, (name, value) in enumerate(levels.items(), start=2):
        size = (math.ceil(70 / 2**level), math.ceil(97 / 2**level))
        assert value.shape == (1, 8, *size) and value.std() > 0
        torch.testing.assert_close(padded[name][..., : size[0], : size[1]], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_tensorflow_s_padding_is_timm_s_for_whole_strides(size):
    """An image of another size is one with zeros at the right and bottom."""
    backbone = build("tf_efficientnet_lite0")
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    theirs.load_state_dict(backbone.network.state_dict(), strict=False)
    x = image(1, 3, *size)
    padded = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        expected = theirs.forward_intermediates(padded, indices=[1, 2, 3, 4], intermediates_only=True)
    for stride, a, b in zip((4, 8, 16, 32), maps(backbone, x).values(), expected, strict=True):
        rows, columns = (math.ceil(length / stride) for length in size)
        assert torch.equal(a, b[..., :rows, :columns])
    assert backbone.size_divisibility == 32


def test_channels_of_the_image():
    backbone = build("test_resnet", channels=5)
    assert backbone.in_channels == 5 and maps(backbone, image(1, 5, 64, 64))["res5"].shape[2:] == (2, 2)


def test_a_network_that_states_other_channels_than_it_has_is_refused(monkeypatch):
    class Lying(timm.models.SwinTransformer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.feature_info[1]["num_chs"] = 256

    monkeypatch.setattr(timm_helpers, "SwinTransformer", Lying)
    with pytest.raises(ConfigError, match=r"res3 of this network has \(32, .*timm states \(256"):
        build("knet_test_swin")


def test_a_backbone_of_detectron2_s_lazy_configs():
    """It is given to the constructor; here RegNet, which Detectron2 configures in no other way."""
    bottom_up = LazyCall(RegNet)(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=4,
        w_a=14,
        w_0=8,
        w_m=2,
        group_width=8,
        out_features=["s1", "s2", "s3", "s4"],
    )
    backbone = instantiate(LazyCall(FPN)(bottom_up=bottom_up, in_features=["s1", "s2", "s3", "s4"], out_channels=32))
    model = KNet(tiny_config("panoptic"), backbone=backbone).train()
    sum(model(make_batch([1, 0])).values()).backward()
    assert model.backbone is backbone and all(x.grad is not None for x in backbone.bottom_up.s1.parameters())


# ---------------------------------------------------------------- norms, freezing, memory


def test_frozen_norms_keep_their_activations():
    """Conversions that rebuild a bare norm lose the activation in it, and the result with it."""
    network = "tf_efficientnet_lite0"
    plain, frozen = build(network), build(network, seed=1, MODEL__TIMM__NORM="FrozenBN", MODEL__WEIGHTS="x")
    frozen.load_state_dict(plain.state_dict(), strict=False)
    x = image(1, 3, 64, 64)
    for a, b in zip(maps(plain, x).values(), maps(frozen, x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in frozen.named_parameters() if "bn" in name]
    frozen.train()
    assert all(torch.equal(a, b) for a, b in zip(frozen(x).values(), maps(frozen, x).values()))


FROZEN = {
    "test_resnet": ("network.conv1", "network.bn1", "network.layer1."),
    "tf_efficientnet_lite0": ("network.conv_stem", "network.bn1", "network.blocks.0."),
    "knet_test_swin": ("network.patch_embed", "network.layers.0."),
    "test_vit": (
        "network.cls_token",
        "network.reg_token",
        "network.pos_embed",
        "network.patch_embed",
        "network.blocks.0.",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_stages_stay_as_they_are(name):
    features = ["res4"] if name == "test_vit" else RES
    options = {"MODEL__BACKBONE__FREEZE_AT": 2, "MODEL__TIMM__OUT_FEATURES": features, "MODEL__WEIGHTS": "x"}
    backbone = build(name, **options).train()
    assert {x for x, p in backbone.named_parameters() if not p.requires_grad} == {
        x for x, _ in backbone.named_parameters() if x.startswith(FROZEN[name])
    }
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(value.square().mean() for value in backbone.train()(image(2, 3, 64, 64)).values()).backward()
        optimizer.step()
    for key, value in backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, before[key]) == key.startswith(FROZEN[name]), key


def test_frozen_random_layers_are_told(caplog):
    for options, count in [({}, 0), ({"MODEL__BACKBONE__FREEZE_AT": 1}, 1), ({"MODEL__TIMM__NORM": "FrozenBN"}, 1)]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "knet_d2"):
            backbone = build("test_resnet", **options).eval()
            assert not caplog.messages  # a model that only predicts gets its weights later
            backbone.train().train()
        assert sum("random layers of the backbone are frozen" in x for x in caplog.messages) == count


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "tf_efficientnet_lite0", "knet_test_swin", "test_vit"]
)
def test_activation_checkpointing_computes_again_and_changes_nothing(name):
    counts, gradients, statistics = [], [], []
    features = ["res4"] if name == "test_vit" else RES
    for checkpoint in (False, True):
        backbone = build(name, MODEL__TIMM__CHECKPOINT=checkpoint, MODEL__TIMM__OUT_FEATURES=features)
        calls = []
        kinds = (nn.Conv2d, nn.Linear)
        for module in backbone.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        backbone = copy.deepcopy(backbone)  # as the average of the weights is
        sum(value.square().sum() for value in backbone.train()(image(2, 3, 64, 64)).values()).backward()
        counts.append(len(calls))
        gradients.append([p.grad for p in backbone.parameters()])
        statistics.append({name: x for name, x in backbone.named_buffers() if "running" in name or "tracked" in name})
    assert counts[1] > 1.5 * counts[0]
    assert statistics[0].keys() == statistics[1].keys()
    for key, value in statistics[0].items():  # they count a batch once
        torch.testing.assert_close(statistics[1][key], value, msg=key)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_drop_path_skips_branches_in_training_only():
    backbone = build("test_convnext", MODEL__TIMM__DROP_PATH_RATE=0.5)
    x = image(1, 3, 64, 64)
    assert torch.equal(maps(backbone, x)["res5"], maps(build("test_convnext"), x)["res5"])
    backbone.train()
    assert not torch.equal(backbone(x)["res5"], backbone(x)["res5"])


# ---------------------------------------------------------------- parameter groups


def test_layers_have_falling_rates_and_what_timm_lists_has_no_weight_decay():
    cfg = timm_config("test_vit", MODEL__BACKBONE__NAME="build_timm_fpn_backbone", SOLVER__LAYER_DECAY=0.5)
    set_options(cfg, {"SOLVER.BASE_LR": 1.0, "SOLVER.BACKBONE_MULTIPLIER": 0.25, "SOLVER.WEIGHT_DECAY": 0.05})
    set_options(cfg, {"SOLVER.WEIGHT_DECAY_NORM": 0.0})
    model = nn.Module()
    model.backbone = build_backbone(cfg, ShapeSpec(channels=3))
    network = model.backbone.bottom_up.network
    depth = len(network.blocks)
    rates, decays = {}, {}
    for group in build_optimizer(cfg, model).param_groups:
        for name in group["param_names"]:
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    prefix = "backbone.bottom_up.network."
    assert rates["backbone.levels.p4.0.weight"] == 1.0
    for i in range(depth):
        assert rates[f"{prefix}blocks.{i}.attn.qkv.weight"] == pytest.approx(0.25 * 0.5 ** (depth - i))
    assert rates[prefix + "pos_embed"] == pytest.approx(0.25 * 0.5 ** (depth + 1))
    assert rates[prefix + "norm.weight"] == pytest.approx(0.25 * 0.5)
    undecayed = [prefix + "pos_embed", prefix + "blocks.0.norm1.weight", "backbone.levels.p4.0.norm.weight"]
    assert [decays[name] for name in undecayed] == [0.0] * 3
    assert decays[prefix + "blocks.0.attn.qkv.weight"] == decays["backbone.levels.p4.0.weight"] == 0.05
    assert len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize("value, backbone", [(0.5, "build_resnet_backbone"), (0.0, "build_timm_backbone")])
def test_wrong_layer_decay_is_refused(value, backbone):
    cfg = timm_config("test_resnet", MODEL__BACKBONE__NAME=backbone, SOLVER__LAYER_DECAY=value)
    model = nn.Module()
    model.backbone = build_backbone(cfg, ShapeSpec(channels=3))
    with pytest.raises(ConfigError, match="SOLVER.LAYER_DECAY"):
        build_optimizer(cfg, model)


# ---------------------------------------------------------------- normalisation of the images


@pytest.mark.parametrize(
    "name, options, mean, std",
    [
        ("tf_efficientnet_lite0", {}, [127.0] * 3, [128.0] * 3),
        ("mobilenetv2_100", {}, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("mobilenetv2_100", {"INPUT__FORMAT": "BGR"}, [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
        ("mobilenetv2_100", {"INPUT__FORMAT": "L"}, [114.495], [57.63]),
        ("mobilenetv2_100", {"MODEL__PIXEL_STD": [1.0, 2.0, 3.0]}, [123.675, 116.28, 103.53], [1.0, 2.0, 3.0]),
    ],
)
def test_the_weights_state_the_normalisation_unless_the_config_does(name, options, mean, std):
    empty = {"MODEL__PIXEL_MEAN": [], "MODEL__PIXEL_STD": [], "INPUT__FORMAT": "RGB"}
    cfg = timm_config(name, **{**empty, **options})
    fill_pixel_statistics(cfg)
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx(mean) and cfg.MODEL.PIXEL_STD == pytest.approx(std)


def test_a_model_without_resolved_statistics_resolves_them():
    cfg = tiny_config("instance", {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.TIMM.NAME": "test_resnet"})
    set_options(cfg, {"MODEL.PIXEL_MEAN": [], "MODEL.PIXEL_STD": []})
    assert KNet(cfg).preprocessor.pixel_mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert cfg.MODEL.PIXEL_MEAN == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet5O", {}, r"MODEL\.TIMM\.NAME = 'resnet5O': timm has no such network.*'resnet50'"),
        ("test_vit", {}, r"no map of stride 4 \(res2\), but of \[16\]. Use build_timm_fpn_backbone"),
        ("levit_128s", {"MODEL__TIMM__OUT_FEATURES": ["res2"]}, r"no map of stride 4 .*of \[16, 32, 64\]"),
        ("poolformer_s12", {"MODEL__BACKBONE__FREEZE_AT": 1}, "does not tell the layers .*FREEZE_AT 0"),
        ("test_maxvit", {}, "can't be a backbone for images of any size"),
        ("test_resnet", {"MODEL__TIMM__OUT_FEATURES": ["p2"]}, r"MODEL\.TIMM\.OUT_FEATURES: 'p2' is no feature map"),
        ("test_resnet", {"MODEL__TIMM__OUT_FEATURES": []}, r"MODEL\.TIMM\.OUT_FEATURES = \[\]"),
        ("test_resnet", {"MODEL__TIMM__NORM": "GN"}, r"MODEL\.TIMM\.NORM = 'GN': use one of"),
        ("test_resnet", {"MODEL__TIMM__DROP_PATH_RATE": 1.0}, r"MODEL\.TIMM\.DROP_PATH_RATE = 1\.0"),
        ("vgg11", {"MODEL__TIMM__DROP_PATH_RATE": 0.1}, "has no drop path"),
        ("levit_128s", {"MODEL__TIMM__OUT_FEATURES": ["res4"]}, "can't be a backbone"),
    ],
)
def test_a_network_that_can_t_be_used_is_refused_in_one_sentence(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    "options", [{"INPUT__FORMAT": "5-channel"}, {"MODEL__BACKBONE__NAME": "build_resnet_backbone"}]
)
def test_statistics_that_nothing_states_are_refused(options):
    cfg = timm_config("test_resnet", MODEL__PIXEL_MEAN=[], **options)
    with pytest.raises(ConfigError, match=r"MODEL\.PIXEL_MEAN .*Give numbers"):
        fill_pixel_statistics(cfg)


def test_without_timm_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs the package timm. Install it with: python -m pip install"):
        build("test_resnet")


# ---------------------------------------------------------------- frozen norms in the convolutions


def with_random_norms(backbone):
    generator = torch.Generator().manual_seed(1)
    for name, buffer in backbone.named_buffers():
        low = 0.5 if name.endswith((".weight", "running_var")) else -0.5
        buffer.copy_(low + torch.rand(buffer.shape, generator=generator))
    return backbone.double()


@pytest.mark.parametrize(
    ("name", "outside"), [("tf_efficientnet_lite0", 0), ("test_resnet", 0), ("resnetv2_50", 17), ("hrnet_w18_small", 0)]
)
def test_frozen_norms_are_folded_into_the_convolutions_before_them(name, outside, monkeypatch):
    """Same maps, gradients and names; a norm stays where something else reads its input, as a residual does."""
    options = {"MODEL__TIMM__NORM": "FrozenBN", "MODEL__WEIGHTS": "some"}
    folded = with_random_norms(build(name, **options))
    monkeypatch.setattr(TimmBackbone, "fold_frozen_norms", lambda self: None)
    plain = with_random_norms(build(name, **options))
    assert list(folded.state_dict()) == list(plain.state_dict())
    frozen = [m for m in plain.modules() if "FrozenBatchNorm" in type(m).__name__]
    assert sum(isinstance(m, AppliedNorm) for m in folded.modules()) == len(frozen) - outside > 10
    x = image(2, 3, 64, 96).double()
    for a, b in zip(maps(folded, x).values(), maps(plain, x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert b.std() > 0.01
    for backbone in (folded, plain):
        sum(x.square().mean() for x in backbone.train()(x).values()).backward()
    for a, b in zip(folded.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11 * float(b.grad.abs().max()))


def test_folded_norms_follow_their_buffers_into_copies():
    backbone = with_random_norms(build("test_resnet", MODEL__TIMM__NORM="FrozenBN", MODEL__WEIGHTS="some"))
    copied, x = copy.deepcopy(backbone), image(1, 3, 64, 64).double()
    before = maps(backbone, x)["res5"]
    assert torch.equal(maps(copied, x)["res5"], before)
    norm = next(m for m in backbone.modules() if isinstance(m, AppliedNorm))
    norm.running_mean += 1
    assert not torch.allclose(maps(backbone, x)["res5"], before)
    assert torch.equal(maps(copied, x)["res5"], before)
