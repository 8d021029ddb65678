"""Deformable convolution against its definition, and in a ResNet."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import DEFORM, RESNET_FPN, build, randomise_norms, relative_error
from torch import nn

from knet_d2.modeling.backbone.deform_conv import DeformConv2d


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
