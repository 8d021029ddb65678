"""Batch norm folded into convolutions, and channels last: the same results with fewer operations."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from helpers import TASKS, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from knet_d2.modeling.layers import EvalBatchNorm2d, channels_last, use_folded_convolutions

NORMS = {"BN": nn.BatchNorm2d, "EvalBN": EvalBatchNorm2d, "FrozenBN": FrozenBatchNorm2d}


def make_pair(norm, bias=False):
    """A convolution in float64 with a norm far from the identity, and the same one with use_folded_convolutions."""
    torch.manual_seed(0)
    plain = Conv2d(6, 8, 3, stride=2, dilation=2, groups=2, bias=bias, norm=norm(8), activation=F.relu).double()
    for name, value in plain.norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name in ("weight", "running_var") else -0.5))
    folded = copy.deepcopy(plain)
    use_folded_convolutions(nn.Sequential(folded))
    return plain.eval(), folded.eval()


class Operations(TorchDispatchMode):
    """Collects the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_folded_norms_change_no_result(norm, bias):
    plain, folded = make_pair(NORMS[norm], bias)
    x = torch.randn(2, 6, 17, 13, dtype=torch.float64)
    expected = plain(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # what changes later counts at once
        for module in (plain, folded):
            module.norm.running_mean += 1
            module.weight *= 2
    assert not torch.allclose(plain(x), expected)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)
    assert list(folded.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("norm", NORMS)
def test_training_is_as_before(norm):
    plain, folded = make_pair(NORMS[norm])
    x = torch.randn(2, 6, 17, 13, dtype=torch.float64)
    for module in (plain, folded):
        module.train()
        module(x).square().sum().backward()
    assert torch.equal(folded.weight.grad, plain.weight.grad)
    states = folded.state_dict(), plain.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    assert torch.equal(folded(x), plain(x))


def test_norms_of_a_batch_are_not_folded():
    plain, folded = make_pair(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    x = torch.randn(2, 6, 17, 13, dtype=torch.float64)
    assert torch.equal(folded(x), plain(x))


@pytest.mark.parametrize("task", TASKS)
def test_a_prediction_runs_no_batch_norm(task):
    model = tiny_model(task).eval()
    with torch.no_grad(), Operations() as operations:
        model([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}])
    assert operations.names.count("convolution") > 40
    assert not [name for name in operations.names if "batch_norm" in name]


def test_maps_are_channels_last_on_the_cpu():
    model = tiny_model("panoptic").eval()
    seen = []
    model.backbone.register_forward_hook(lambda module, args, maps: seen.extend([args[0], *maps.values()]))
    with torch.no_grad():
        model([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}])
    assert len(seen) > 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)
    on_device = torch.empty(1, 3, 4, 5, device="meta")
    assert channels_last(on_device) is on_device
