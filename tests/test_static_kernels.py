"""Producers of static kernels: position encoding, semantic FPN, learned kernels and decode heads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from helpers import tiny_config, tiny_model
from torch import nn

from knet_d2.errors import ConfigError
from knet_d2.modeling.cascade import static_predictions
from knet_d2.modeling.static_kernels import build_auxiliary_head
from knet_d2.modeling.static_kernels.decode_heads import FCNKernelHead, PyramidPooling, adaptive_average_pool
from knet_d2.modeling.static_kernels.semantic_fpn import (
    SemanticFPN,
    SemanticFPNKernelHead,
    coordinate_channels,
    sine_position_encoding,
)
from knet_d2.modeling.structures import KernelState
from knet_d2.tasks import TASKS, Assignment, KernelBank, KernelGroup

DIM = 32
LEVELS = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4, 5)}
BANKS = {
    "instance": TASKS["instance"].bank(num_matched=6, num_things=3, num_stuff=0),
    "panoptic": TASKS["panoptic"].bank(num_matched=6, num_things=3, num_stuff=2),
    "semantic": TASKS["semantic"].bank(num_matched=6, num_things=0, num_stuff=5),
}


def make_features(size=(64, 96), batch_size=2, channels=8):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(batch_size, channels, size[0] // s.stride, size[1] // s.stride, generator=generator)
        for name, s in LEVELS.items()
    }


def make_head(task="panoptic", position_encoding="sine"):
    torch.manual_seed(0)
    return SemanticFPNKernelHead(
        LEVELS, bank=BANKS[task], conv_dim=DIM, norm="GN", common_stride=8, position_encoding=position_encoding
    )


def recorded_outputs(modules, run):
    """What each of the named modules returns while run() is executed."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: output}))
        for name, module in modules.items()
    ]
    result = run()
    for handle in handles:
        handle.remove()
    return result, seen


# Position encodings


@pytest.mark.parametrize("channels, height, width", [(16, 3, 5), (256, 2, 3)])
def test_sine_encoding_closed_form(channels, height, width):
    encoding = sine_position_encoding(torch.zeros(2, channels, height, width, dtype=torch.float64))[0]
    per_axis = channels // 2
    for c in range(channels):
        i = c % per_axis
        wave = math.sin if i % 2 == 0 else math.cos
        for y in range(height):
            for x in range(width):
                position, length = (y + 1, height) if c < per_axis else (x + 1, width)
                value = position / (length + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / per_axis)
                assert encoding[c, y, x].item() == pytest.approx(wave(value), abs=3e-6)


def test_encoding_is_computed_in_float32_whatever_the_map_is():
    x = torch.zeros(1, 64, 7, 9)
    expected = sine_position_encoding(x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        encoding = sine_position_encoding(x.to(dtype))
        assert encoding.dtype == dtype
        assert torch.equal(encoding, expected.to(dtype))


def test_coordinates_are_x_then_y_from_minus_1_to_1():
    coordinates = coordinate_channels(torch.zeros(2, 8, 3, 5))
    assert coordinates.shape == (2, 2, 3, 5)
    xs, ys = coordinates[1]
    np.testing.assert_allclose(xs.numpy(), np.tile([-1, -0.5, 0, 0.5, 1], (3, 1)), atol=1e-7)
    np.testing.assert_allclose(ys.numpy(), np.tile([[-1], [0], [1]], (1, 5)), atol=1e-7)


# Semantic FPN


def test_levels_meet_at_the_common_stride():
    fpn = SemanticFPN(LEVELS, conv_dim=DIM, common_stride=8, norm="GN")
    fused, seen = recorded_outputs(fpn.levels, lambda: fpn(make_features()))
    assert fused.shape == (2, DIM, 8, 12)
    assert {name: tuple(x.shape) for name, x in seen.items()} == dict.fromkeys(LEVELS, (2, DIM, 8, 12))
    torch.testing.assert_close(fused, sum(seen.values()))
    kinds = {name: [type(m).__name__ for m in level] for name, level in fpn.levels.items()}
    assert kinds == {
        "p2": ["Conv2d"],
        "p3": ["Conv2d"],
        "p4": ["Conv2d", "Upsample", "Conv2d"],
        "p5": ["Conv2d", "Upsample", "Conv2d", "Upsample", "Conv2d"],
    }
    for level in fpn.levels.values():
        for conv in (m for m in level if isinstance(m, nn.Conv2d)):
            assert conv.kernel_size == (3, 3) and conv.bias is None
            assert isinstance(conv.norm, nn.GroupNorm) and conv.norm.num_groups == 32


def test_level_is_convolution_norm_relu_and_bilinear_upsampling():
    torch.manual_seed(0)
    fpn = SemanticFPN(LEVELS, conv_dim=DIM, common_stride=8, norm="GN", position_encoding="none").double()
    features = {name: x.double() for name, x in make_features().items()}
    _, seen = recorded_outputs(fpn.levels, lambda: fpn(features))

    def convolved(x, conv, stride=1):
        return F.group_norm(F.conv2d(x, conv.weight, stride=stride, padding=1), 32).relu()

    torch.testing.assert_close(seen["p2"], convolved(features["p2"], fpn.levels["p2"][0], stride=2))
    x = convolved(features["p4"], fpn.levels["p4"][0])
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen["p4"], convolved(x, fpn.levels["p4"][2]))


@pytest.mark.parametrize("encoding", ["sine", "coordinates", "none"])
def test_only_the_coarsest_level_gets_the_position(encoding):
    fpn = SemanticFPN(LEVELS, conv_dim=DIM, common_stride=8, norm="GN", position_encoding=encoding)
    features = make_features()
    seen = {}
    for name, level in fpn.levels.items():
        level.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    fpn(features)
    expected = {
        "sine": features["p5"] + sine_position_encoding(features["p5"]),
        "coordinates": torch.cat([features["p5"], coordinate_channels(features["p5"])], dim=1),
        "none": features["p5"],
    }
    assert torch.equal(seen["p5"], expected[encoding])
    assert all(torch.equal(seen[name], features[name]) for name in ("p2", "p3", "p4"))


# Learned kernels


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_kernels_are_weights_plus_sums_over_hard_masks(task):
    head = make_head(task).double()
    features = {name: x.double() for name, x in make_features().items()}
    branches = {"localization": head.localization_branch, "semantic": head.semantic_branch}
    state, seen = recorded_outputs(branches, lambda: head(features))

    torch.testing.assert_close(state.feature, seen["localization"] + seen["semantic"])
    weight = head.instance_kernels.weight.flatten(1)
    assert head.instance_kernels.bias is None
    masks = torch.einsum("nc,bchw->bnhw", weight, seen["localization"])
    torch.testing.assert_close(state.mask_logits[:, :6], masks)
    logits = torch.einsum("kc,bchw->bkhw", head.classifier.weight.flatten(1), seen["semantic"])
    logits = logits + head.classifier.bias[:, None, None]
    torch.testing.assert_close(state.semantic_logits, logits)
    for b in range(2):
        for n in range(6):
            expected = weight[n].clone()
            for y, x in np.argwhere(masks[b, n].detach().sigmoid().numpy() > 0.5):
                expected = expected + state.feature[b, :, y, x]
            torch.testing.assert_close(state.kernels[b, n], expected)
        if task == "panoptic":
            torch.testing.assert_close(state.kernels[b, 6:], head.classifier.weight.flatten(1)[3:])
    if task == "panoptic":
        torch.testing.assert_close(state.mask_logits[:, 6:], logits[:, 3:])
    assert state.kernels.shape[1] == state.mask_logits.shape[1] == {"instance": 6, "panoptic": 8}[task]
    assert state.semantic_logits.shape[1] == {"instance": 3, "panoptic": 5}[task]


def test_no_gradient_passes_the_hard_masks_of_the_static_kernels():
    head = make_head()
    state, seen = recorded_outputs({"masks": head.instance_kernels}, lambda: head(make_features()))
    assert torch.autograd.grad(state.kernels.sum(), seen["masks"], allow_unused=True, retain_graph=True) == (None,)
    weight = head.localization_branch[0].weight
    assert torch.autograd.grad(state.kernels[:, :6].sum(), weight)[0].abs().sum() > 0


def test_static_predictions_score_kernels_by_the_semantic_probabilities_in_their_masks():
    with torch.no_grad():
        state = make_head("panoptic").double()({name: x.double() for name, x in make_features().items()})
    state.mask_logits[0, 2] = -1  # an empty mask
    kernels, masks, logits = static_predictions(state)
    assert torch.equal(kernels, state.kernels) and torch.equal(masks, state.mask_logits)
    probs = state.semantic_logits.sigmoid()
    for b in range(2):
        for n in range(8):
            inside = state.mask_logits[b, n] > 0
            expected = probs[b][:, inside].mean(dim=1) if inside.any() else torch.zeros(5).double()
            torch.testing.assert_close(logits[b, n].sigmoid(), expected, atol=2e-6, rtol=1e-9)


def test_static_predictions_of_a_semantic_model_have_no_scores():
    state = KernelState(*(torch.randn(1, 5, 5, 5).half() for _ in range(3)))
    _, masks, logits = static_predictions(state)
    assert torch.equal(masks, state.mask_logits.float())
    assert logits is None


def test_initialisation():
    head = make_head()
    assert head.instance_kernels.weight.std().item() == pytest.approx(1, rel=0.2)
    torch.testing.assert_close(head.classifier.bias, torch.full((5,), -math.log(99)))
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module is not head.instance_kernels:
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_batch_of_any_size_gives_the_same_kernels():
    head, features = make_head(), make_features(batch_size=3)
    state = head(features)
    for b in range(3):
        alone = head({name: x[b : b + 1] for name, x in features.items()})
        for x, y in zip(state[:4], alone):
            torch.testing.assert_close(x[b : b + 1], y, rtol=1e-3, atol=1e-4)


# Decode heads


def test_fcn_kernels_are_the_weights_of_the_classifier():
    torch.manual_seed(0)
    head = FCNKernelHead({"res5": ShapeSpec(channels=8, stride=8)}, num_classes=5, conv_dim=DIM, norm="", dropout=0.5)
    x = torch.randn(2, 8, 6, 7)
    head.eval()
    state = head({"res5": x})
    first, second = head.convs
    y = F.conv2d(F.conv2d(x, first.weight, first.bias, padding=1).relu(), second.weight, second.bias, padding=1).relu()
    expected = F.conv2d(torch.cat([x, y], dim=1), head.fuse.weight, head.fuse.bias, padding=1).relu()
    torch.testing.assert_close(state.feature, expected)
    for kernels in state.kernels:
        assert torch.equal(kernels, head.classifier.conv.weight[:, :, 0, 0])
    logits = torch.einsum("bnc,bchw->bnhw", state.kernels, state.feature) + head.classifier.conv.bias[:, None, None]
    torch.testing.assert_close(state.mask_logits, logits)
    assert state.semantic_logits is None

    head.train()  # dropout is before the classifier only
    trained = head({"res5": x})
    torch.testing.assert_close(trained.feature, expected)
    assert not torch.allclose(trained.mask_logits, logits)


def test_auxiliary_head_is_one_convolution_and_a_classifier():
    model = tiny_model("semantic").eval()
    head = model.auxiliary_head
    x = torch.randn(1, 32, 8, 8)
    y = head.conv.norm(F.conv2d(x, head.conv.weight, padding=1)).relu()
    expected = F.conv2d(y, head.classifier.conv.weight, head.classifier.conv.bias)
    torch.testing.assert_close(head({"res3": x}), expected)
    assert expected.shape == (1, 5, 8, 8)
    assert tiny_model("semantic", {"MODEL.KNET.LOSS.AUXILIARY_WEIGHT": 0.0}).auxiliary_head is None


# Banks and configs


def test_kernel_bank_of_each_task():
    t, f = True, False
    expected = {
        "instance": [[t, t, t]] * 6,
        "panoptic": [[t, t, t, f, f]] * 6 + [[f, f, f, t, f], [f, f, f, f, t]],
        "semantic": np.eye(5, dtype=bool).tolist(),
    }
    for task, mask in expected.items():
        assert BANKS[task].class_mask().tolist() == mask
    assert (BANKS["panoptic"].num_kernels, BANKS["panoptic"].num_matched, BANKS["panoptic"].num_things) == (8, 6, 3)


def test_semantic_bank_has_no_things():
    bank = TASKS["semantic"].bank(num_matched=6, num_things=3, num_stuff=5)
    assert (bank.num_classes, bank.num_things, bank.fixed_class_ids) == (5, 0, [0, 1, 2, 3, 4])


def test_kernel_bank_refuses_groups_that_contradict_themselves():
    with pytest.raises(ValueError, match="3 kernels can't stand for 2 classes"):
        KernelBank([KernelGroup(3, Assignment.IDENTITY, [0, 1])], num_classes=2)
    matched, fixed = KernelGroup(3, Assignment.HUNGARIAN, [0]), KernelGroup(1, Assignment.IDENTITY, [1])
    with pytest.raises(ValueError, match="first group"):
        KernelBank([fixed, matched], num_classes=2)


@pytest.mark.parametrize(
    "task, build, options, message",
    [
        ("panoptic", SemanticFPNKernelHead, {"MODEL.KNET.POSITION_ENCODING": "cosine"}, "POSITION_ENCODING = 'cosine'"),
        ("semantic", SemanticFPNKernelHead, {"MODEL.KNET.POSITION_ENCODING": "sine"}, "SEM_SEG_HEAD.NAME"),
        ("panoptic", FCNKernelHead, {}, "'FCNKernelHead'.*'semantic'|SEM_SEG_HEAD.NAME"),
        ("semantic", build_auxiliary_head, {"MODEL.KNET.AUXILIARY_HEAD.IN_FEATURE": "res9"}, "IN_FEATURE = 'res9'"),
        ("instance", build_auxiliary_head, {"MODEL.KNET.LOSS.AUXILIARY_WEIGHT": 0.4}, "AUXILIARY_WEIGHT"),
    ],
)
def test_bad_config_is_an_error_that_names_the_key(task, build, options, message):
    cfg = tiny_config(task, options)
    shapes = {name: ShapeSpec(channels=8, stride=8) for name in ("p2", "p3", "p4", "p5", "res3", "res4")}
    with pytest.raises(ConfigError, match=message):
        build(cfg, shapes, BANKS[task])


# Decode heads


@pytest.mark.parametrize("size, bins", [((7, 11), 3), ((2, 3), 6), ((12, 6), 6), ((5, 4), 1)])
def test_adaptive_pooling_equals_pytorch(size, bins):
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(adaptive_average_pool(x, bins), F.adaptive_avg_pool2d(x, bins))


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_pooling_one_image_with_batch_norm_is_an_error_that_names_the_key(norm):
    pooling, x = PyramidPooling(4, 64, norm, (1, 2)), torch.randn(1, 4, 5, 7)
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH leaves one image.*NORM .GN."):
        pooling(x)
    for number, works in ((2, pooling), (1, PyramidPooling(4, 64, "GN", (1, 2))), (1, pooling.eval())):
        assert [y.shape for y in works(x.expand(number, -1, -1, -1))] == [(number, 64, 5, 7)] * 2
