"""Batch norm folded into convolutions, and channels last: the same results with fewer operations."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from helpers import TASKS, needs_fake_cuda, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from knet_d2.modeling.layers import (
    EvalBatchNorm2d,
    FoldedConv2d,
    channels_last,
    mask_convolution,
    use_folded_convolutions,
)

NORMS = {"BN": nn.BatchNorm2d, "EvalBN": EvalBatchNorm2d, "FrozenBN": FrozenBatchNorm2d}


def make_pair(norm, bias=False):
    """A convolution in float64 with a norm far from the identity, and the same one with use_folded_convolutions."""
    torch.manual_seed(0)
    plain = Conv2d(6, 8, 3, stride=2, dilation=2, groups=2, bias=bias, norm=norm(8), activation=F.relu).double()
    for name, value in plain.norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name in ("weight", "running_var") else -0.5))
    modules = nn.Sequential(copy.deepcopy(plain))
    use_folded_convolutions(modules)  # which replaces the convolution
    assert type(modules[0]) is FoldedConv2d
    return plain.eval(), modules[0].eval()


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


def count(operations, name):
    return operations.names.count(name)


@pytest.mark.parametrize("norm", NORMS)
def test_folded_weights_are_kept_while_the_weights_stay(norm):
    """Every way in which weights change is noticed: in place, by a new tensor, by another type, in training."""
    plain, folded = make_pair(NORMS[norm])
    x = torch.randn(2, 6, 17, 13, dtype=torch.float64)

    def replace(module):
        module.weight = nn.Parameter(module.weight.detach() * 3)

    changes = {
        "nothing": lambda module: None,
        "buffer": lambda module: module.norm.running_var.mul_(2),
        "weight": lambda module: module.weight.add_(0.1),
        "load": lambda module: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
        "replaced": replace,
        "data": lambda module: (module.weight.data.mul_(2), module.eval()),
    }
    with torch.no_grad():
        folded(x)
        for name, change in changes.items():
            for module in (plain, folded):
                change(module)
            with Operations() as operations:
                result = folded(x)
            assert (count(operations, "rsqrt") == 0) == (name == "nothing"), name
            torch.testing.assert_close(result, plain(x), rtol=1e-12, atol=1e-12)
        assert folded.float()(x.float()).dtype == torch.float32
        with torch.inference_mode():
            folded(x.float())
        assert not folded(x.float()).isnan().any()
    assert folded(x.float()).requires_grad  # not the kept ones, which have no gradient
    assert copy.deepcopy(folded).state_dict().keys() == folded.state_dict().keys()


def test_folded_weights_are_kept_in_the_type_of_autocast():
    _, folded = make_pair(nn.BatchNorm2d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert folded(torch.randn(2, 6, 17, 13, dtype=torch.float64)).dtype == torch.float64
    folded, x = folded.float(), torch.randn(2, 6, 17, 13)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            single = folded(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = folded(x)
            with Operations() as operations:
                assert torch.equal(folded(x), half)
        assert half.dtype == torch.bfloat16 and torch.equal(folded(x), single)
    assert count(operations, "_to_copy") == 1  # of x


@needs_fake_cuda
def test_maps_on_cuda_are_channels_last_in_half_precision():
    with FakeTensorMode():
        for dtype, is_last in ((torch.float32, False), (torch.float16, True), (torch.bfloat16, True)):
            images = channels_last(torch.empty(1, 3, 4, 5, dtype=dtype, device="cuda"))
            assert images.is_contiguous(memory_format=torch.channels_last) is is_last


@needs_fake_cuda
def test_masks_that_gate_are_matrix_products_on_cuda():
    """cuDNN's convolutions use TF32 by default, and PyTorch's matrix products don't."""
    conv, x = nn.Conv2d(8, 5, 1), torch.randn(2, 8, 6, 7)
    product = (conv.weight.flatten(1) @ x.flatten(2) + conv.bias[:, None]).unflatten(2, (6, 7))
    torch.testing.assert_close(mask_convolution(conv, x), product)
    with FakeTensorMode(), Operations() as operations:
        conv = nn.Conv2d(8, 5, 1, device="cuda")
        masks = mask_convolution(conv, torch.empty(2, 8, 6, 7, device="cuda"))
    assert masks.shape == (2, 5, 6, 7) and "convolution" not in operations.names
