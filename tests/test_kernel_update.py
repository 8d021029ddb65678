"""One kernel update stage and the cascade against slow references, kernel by kernel and pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers import sigmoid, tiny_config, tiny_model
from torch import nn

from knet_d2.errors import ConfigError
from knet_d2.modeling.cascade import (
    AdaptiveKernelUpdate,
    KernelInteraction,
    KernelUpdateCascade,
    KernelUpdateHead,
    LinearKernelUpdate,
    PooledClasses,
    gather_group_features,
)
from knet_d2.modeling.structures import KernelState

B, N, K = 2, 5, 3


def randomized(module, seed=0):
    """Return the module in float64, with different random weights and norms in all its parts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return module


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(x):
    return x.detach().numpy()


def slow_linear(layer, x):
    return [
        sum(w * v for w, v in zip(row, x)) + (0 if layer.bias is None else layer.bias[i].item())
        for i, row in enumerate(layer.weight.tolist())
    ]


def slow_layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    scale = 1 / math.sqrt(variance + 1e-5)
    return [(v - mean) * scale * w + b for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist())]


def slow_adaptive_update(module, group_feature, kernel):
    """Section 3.2 of the paper for the channels of one group of one kernel: lists of numbers."""
    dim = len(kernel)
    a = slow_linear(module.feature_proj, group_feature)
    b = slow_linear(module.kernel_proj, kernel)
    gate = [x * y for x, y in zip(a[:dim], b[:dim])]
    feature_gate, kernel_gate = (
        [sigmoid(v) for v in slow_layer_norm(norm, slow_linear(linear, gate))]
        for linear, norm in (module.feature_gate, module.kernel_gate)
    )
    feature_out = slow_layer_norm(module.feature_norm, a[dim:])
    kernel_out = slow_layer_norm(module.kernel_norm, b[dim:])
    mixed = [g * f + h * k for g, f, h, k in zip(feature_gate, feature_out, kernel_gate, kernel_out)]
    return [max(v, 0) for v in slow_layer_norm(module.out_proj[1], slow_linear(module.out_proj[0], mixed))]


def slow_interaction(module, kernels):
    """Attention, residual, norm, feed-forward, residual, norm for the kernels [N][C] of one image."""
    count, dim = len(kernels), len(kernels[0])
    width = dim // module.num_heads
    qkv = [slow_linear(module.in_proj, k) for k in kernels]
    attended = [[0.0] * dim for _ in kernels]
    for head in range(module.num_heads):
        channels = range(head * width, (head + 1) * width)
        for i in range(count):
            scores = [sum(qkv[i][c] * qkv[j][dim + c] for c in channels) / math.sqrt(width) for j in range(count)]
            exps = [math.exp(s - max(scores)) for s in scores]
            for c in channels:
                attended[i][c] = sum(e / sum(exps) * qkv[j][2 * dim + c] for j, e in enumerate(exps))
    result = []
    for kernel, value in zip(kernels, attended):
        x = [k + v for k, v in zip(kernel, slow_linear(module.out_proj, value))]
        x = slow_layer_norm(module.attention_norm, x)
        hidden = [max(v, 0) for v in slow_linear(module.ffn[0], x)]
        x = [a + b for a, b in zip(x, slow_linear(module.ffn[2], hidden))]
        result.append(slow_layer_norm(module.ffn_norm, x))
    return result


def slow_transform(head, feature):
    """F' of one image [C, H, W], pixel by pixel."""
    result = np.zeros_like(feature)
    for y in range(feature.shape[1]):
        for x in range(feature.shape[2]):
            result[:, y, x] = slow_linear(head.feature_transform, feature[:, y, x].tolist())
    return result


def slow_weights(mask_logits, soft):
    """Weight of every pixel for every kernel of one image: [N, H, W]."""
    weights = np.zeros_like(mask_logits)
    for y in range(mask_logits.shape[1]):
        for x in range(mask_logits.shape[2]):
            column = mask_logits[:, y, x].tolist()
            if soft:
                exps = [math.exp(v - max(column)) for v in column]
                weights[:, y, x] = [e / sum(exps) for e in exps]
            else:
                weights[:, y, x] = [float(sigmoid(v) > 0.5) for v in column]
    return weights


def slow_group_features(weights, feature):
    result = np.zeros((len(weights), len(feature)))
    for n, kernel_weights in enumerate(weights):
        for y, x in np.ndindex(*kernel_weights.shape):
            result[n] += kernel_weights[y, x] * feature[:, y, x]
    return result


def make_head(*, soft=False, dim=8, seed=0, **options):
    arguments = {"num_heads": 2, "ffn_dim": 12, "update_dim": dim, "num_classes": None if soft else K, **options}
    return randomized(KernelUpdateHead(dim=dim, soft_gather=soft, **arguments), seed)


def make_inputs(dim=8, size=(4, 6), seed=3):
    masks = random(B, N, *size, seed=seed)
    masks[0, 0, 0, :2] = 0  # sigmoid(0) is not above 0.5
    return random(B, dim, *size, seed=seed + 1), random(B, N, dim, seed=seed + 2), masks


def recorded_group_features(head, *inputs):
    """Record the group features that the stage passes to its kernel update."""
    seen = []
    handle = head.kernel_update.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    head(*inputs)
    handle.remove()
    return array(seen[0])


@pytest.mark.parametrize("dim, channels", [(6, 6), (6, 18), (256, 512)])
def test_adaptive_update_matches_a_loop_over_kernels_and_channel_groups(dim, channels):
    module = randomized(AdaptiveKernelUpdate(dim))
    count = 1 if dim == 256 else 3
    features, kernels = random(1, count, channels), random(1, count, channels, seed=2)
    result = array(module(features, kernels))[0]
    for n in range(count):
        for start in range(0, channels, dim):
            part = slice(start, start + dim)
            expected = slow_adaptive_update(module, features[0, n, part].tolist(), kernels[0, n, part].tolist())
            np.testing.assert_allclose(result[n, part], expected, rtol=1e-9, atol=1e-10)


def test_linear_update_projects_group_features_and_ignores_kernels():
    module = randomized(LinearKernelUpdate(4))
    features = random(1, 2, 8)
    result = array(module(features, random(1, 2, 8, seed=2)))
    for n, start in ((0, 0), (1, 4)):
        expected = slow_linear(module.proj, features[0, n, start : start + 4].tolist())
        np.testing.assert_allclose(result[0, n, start : start + 4], expected, rtol=1e-12)
    assert torch.equal(module(features, random(1, 2, 8, seed=5)), torch.from_numpy(result))


def test_gather_sums_over_pixels():
    weights, feature = random(B, N, 3, 4), random(B, 6, 3, 4, seed=2)
    result = array(gather_group_features(weights, feature))
    for b in range(B):
        np.testing.assert_allclose(result[b], slow_group_features(array(weights[b]), array(feature[b])), rtol=1e-9)


@pytest.mark.parametrize("soft", [False, True])
def test_group_features_are_sums_of_the_transformed_feature(soft):
    head, (feature, kernels, masks) = make_head(soft=soft), make_inputs()
    result = recorded_group_features(head, feature, kernels, masks)
    for b in range(B):
        weights = slow_weights(array(masks[b]), soft)
        expected = slow_group_features(weights, slow_transform(head, array(feature[b])))
        np.testing.assert_allclose(result[b], expected, rtol=1e-9, atol=1e-9)


def test_logits_of_exactly_zero_are_outside_of_hard_masks():
    head, (feature, kernels, masks) = make_head(), make_inputs()
    outside = masks.clone()
    outside[0, 0, 0, :2] = -1
    inside = masks.clone()
    inside[0, 0, 0, :2] = 1
    result = recorded_group_features(head, feature, kernels, masks)
    np.testing.assert_array_equal(result, recorded_group_features(head, feature, kernels, outside))
    assert np.abs(result - recorded_group_features(head, feature, kernels, inside)).max() > 0.1


def test_masks_are_dynamic_kernels_on_the_transformed_feature():
    head, (feature, kernels, masks) = make_head(), make_inputs()
    output = head(feature, kernels, masks)
    for b, n in ((0, 0), (1, 4)):
        transformed = slow_transform(head, array(feature[b]))
        linear, norm, _, last = head.mask_branch
        hidden = slow_layer_norm(norm, slow_linear(linear, output.kernels[b, n].tolist()))
        dynamic = slow_linear(last, [max(v, 0) for v in hidden])
        expected = sum(k * channel for k, channel in zip(dynamic, transformed))
        np.testing.assert_allclose(array(output.mask_logits[b, n]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("soft", [False, True])
def test_residual_masks_add_to_those_of_the_stage_before(soft):
    """The sum of both, with another gradient alone: all that the stage computes itself is as without."""
    plain, residual = make_head(soft=soft), make_head(soft=soft, residual_masks=True)
    feature, kernels, masks = make_inputs()
    expected, output = plain(feature, kernels, masks), residual(feature, kernels, masks.requires_grad_())
    torch.testing.assert_close(output.mask_logits, masks + expected.mask_logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(output.kernels, expected.kernels)
    output.mask_logits.sum().backward()
    assert masks.grad.abs().sum() > 0
    untrained = KernelUpdateHead(dim=8, num_classes=K, soft_gather=soft, update_dim=8, num_heads=2, residual_masks=True)
    with torch.no_grad():
        assert torch.equal(untrained.double()(feature, kernels, masks).mask_logits, masks)


def test_pooled_classes_add_a_linear_function_of_the_mean_under_the_mask():
    """The mean of the pyramid's feature, normalised, under the stage's own mask; an untrained stage adds nothing."""
    plain, pooling = make_head(num_classes=K), make_head(num_classes=K, pooled_channels=4)
    feature, kernels, masks = make_inputs()
    pyramid_feature = random(B, 4, *feature.shape[-2:], seed=7)
    expected = plain(feature, kernels, masks).class_logits
    output = pooling(feature, kernels, masks, pyramid_feature=pyramid_feature)
    pooled = pooling.pooled_classes
    for b in range(B):
        for n in range(N):
            cells = pyramid_feature[b][:, output.mask_logits[b, n] > 0]
            mean = cells.mean(dim=1).tolist() if cells.shape[1] else [0.0] * 4
            logits = slow_linear(pooled.classifier, slow_layer_norm(pooled.norm, mean))
            np.testing.assert_allclose(array(output.class_logits[b, n] - expected[b, n]), logits, rtol=1e-9, atol=1e-9)
    pooled.init_weights()
    untrained = pooling(feature, kernels, masks, pyramid_feature=pyramid_feature)
    torch.testing.assert_close(untrained.class_logits, expected, rtol=1e-9, atol=1e-9)


def test_pooled_classes_read_the_level_that_has_the_size_of_the_feature():
    model = tiny_model("panoptic", {"MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True}).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, PooledClasses):
            module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        output = model.network(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 3 and all(torch.equal(x, output.features["p3"]) for x in seen)


def test_interaction_matches_explicit_heads():
    module = randomized(KernelInteraction(8, num_heads=2, ffn_dim=12))
    kernels = random(B, N, 8)
    for image, result in zip(kernels.tolist(), array(module(kernels))):
        np.testing.assert_allclose(result, slow_interaction(module, image), rtol=1e-9, atol=1e-10)


def test_stage_gathers_then_updates_then_interacts_then_classifies():
    head, (feature, kernels, masks) = make_head(update_dim=4), make_inputs()
    output = head(feature, kernels, masks)
    group_features = recorded_group_features(head, feature, kernels, masks)
    for b in range(B):
        updated = []
        for features, kernel in zip(group_features[b].tolist(), kernels[b].tolist()):
            halves = [slow_adaptive_update(head.kernel_update, features[i : i + 4], kernel[i : i + 4]) for i in (0, 4)]
            updated.append(halves[0] + halves[1])
        expected = slow_interaction(head.interaction, updated)
        np.testing.assert_allclose(array(output.kernels[b]), expected, rtol=1e-8, atol=1e-8)
        linear, norm, _, last = head.class_branch
        for kernel, logits in zip(expected, output.class_logits[b].tolist()):
            hidden = [max(v, 0) for v in slow_layer_norm(norm, slow_linear(linear, kernel))]
            np.testing.assert_allclose(logits, slow_linear(last, hidden), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("soft", [False, True])
def test_cascade_is_equivariant_to_the_order_of_kernels(soft):
    cascade = KernelUpdateCascade(
        num_stages=3, dim=8, num_classes=None if soft else K, soft_gather=soft, update_dim=4, num_heads=2, ffn_dim=12
    )
    feature, kernels, masks = make_inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    randomized(cascade)
    stages = cascade(KernelState(feature, kernels, masks))
    permuted = cascade(KernelState(feature, kernels[:, order], masks[:, order]))
    assert len(stages) == 3
    for stage, other in zip(stages, permuted):
        for x, y in zip(stage, other):
            if x is not None:
                torch.testing.assert_close(x[:, order], y, rtol=1e-8, atol=1e-8)
    assert (stages[0].class_logits is None) == soft


def test_each_stage_gets_kernels_and_masks_of_the_one_before():
    cascade = KernelUpdateCascade(
        num_stages=2, dim=8, num_classes=K, soft_gather=False, update_dim=8, num_heads=2, ffn_dim=12
    )
    randomized(cascade)
    feature, kernels, masks = make_inputs()
    first, second = cascade(KernelState(feature, kernels, masks))
    expected = cascade.stages[1](feature, first.kernels, first.mask_logits)
    torch.testing.assert_close(second, expected, rtol=0, atol=0)
    assert not torch.equal(cascade.stages[0].feature_transform.weight, cascade.stages[1].feature_transform.weight)


@pytest.mark.parametrize("soft", [False, True])
def test_gradient_passes_soft_masks_only(soft):
    head, (feature, kernels, masks) = make_head(soft=soft), make_inputs()
    inputs = [x.requires_grad_() for x in (feature, kernels, masks)]
    head(*inputs).kernels.square().sum().backward()
    assert feature.grad.abs().sum() > 0
    assert kernels.grad.abs().sum() > 0
    assert (masks.grad is None) != soft
    if soft:
        assert masks.grad.abs().sum() > 0


def test_gradient_flows_from_stage_to_stage_through_the_kernels():
    cascade = KernelUpdateCascade(
        num_stages=2, dim=8, num_classes=K, soft_gather=False, update_dim=8, num_heads=2, ffn_dim=12
    )
    randomized(cascade)
    feature, kernels, masks = make_inputs()
    cascade(KernelState(feature, kernels, masks))[-1].class_logits.sum().backward()
    assert cascade.stages[0].kernel_update.feature_proj.weight.grad.abs().sum() > 0
    assert cascade.stages[0].mask_branch[0].weight.grad is None  # only the hard masks of stage 1 depend on it


def test_without_interaction_kernels_do_not_see_each_other():
    feature, kernels, masks = make_inputs()
    changed = kernels.clone()
    changed[:, 0] += 1
    for interaction in (False, True):
        head = make_head(kernel_interaction=interaction)
        before, after = head(feature, kernels, masks).kernels, head(feature, changed, masks).kernels
        assert not torch.allclose(before[:, 0], after[:, 0])
        assert torch.equal(before[:, 1:], after[:, 1:]) != interaction


def test_without_adaptive_update_old_kernels_are_not_used():
    feature, kernels, masks = make_inputs()
    for update in (False, True):
        head = make_head(kernel_update=update)
        same = torch.equal(head(feature, kernels, masks).kernels, head(feature, kernels + 1, masks).kernels)
        assert same != update


def test_initialisation_of_the_detection_release():
    torch.manual_seed(0)
    head = KernelUpdateHead(dim=32, num_classes=7, soft_gather=False, update_dim=32, num_heads=4, ffn_dim=64)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * bound < module.weight.abs().max() <= bound
    torch.testing.assert_close(head.class_branch[-1].bias, torch.full((7,), -math.log(99)))
    assert head.interaction.in_proj.bias.abs().max() == head.feature_transform.bias.abs().max() == 0


def test_initialisation_of_the_segmentation_release():
    torch.manual_seed(0)
    head = KernelUpdateHead(
        dim=32, num_classes=None, soft_gather=True, update_dim=32, num_heads=4, ffn_dim=64, xavier_init=False
    )
    torch_bound = 1 / math.sqrt(32)  # of nn.Linear
    assert 0.9 * torch_bound < head.kernel_update.kernel_proj.weight.abs().max() <= torch_bound
    assert head.feature_transform.weight.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.1)
    assert head.feature_transform.bias.abs().max() == 0


@pytest.mark.parametrize(
    "key, value", [("FEATURE_DIM", 12), ("FEATURE_DIM", 0), ("NUM_HEADS", 5), ("INIT", "orthogonal")]
)
def test_bad_update_head_config_is_an_error_that_names_the_key(key, value):
    cfg = tiny_config("panoptic", {f"MODEL.KNET.UPDATE_HEAD.{key}": value})
    with pytest.raises(ConfigError, match=rf"MODEL\.KNET\.UPDATE_HEAD\.{key} = '?{value}"):
        build_model(cfg)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("semantic", {}, "use False for semantic segmentation"),
        (
            "panoptic",
            {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p4", "p5"]},
            "needs a feature of stride 8 .*COMMON_STRIDE",
        ),
    ],
)
def test_pooled_classes_without_a_feature_are_an_error(task, options, message):
    cfg = tiny_config(task, {"MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True, **options})
    with pytest.raises(ConfigError, match=rf"POOLED_CLASSES.*{message}"):
        build_model(cfg)
