"""MODEL.COMPILE: what torch.compile gets, for how many sizes, and that results stay."""

import copy
import logging
import shutil
import sys

import pytest
import torch
from helpers import make_example, tiny_model
from torch import nn

from knet_d2.modeling import compilation
from knet_d2.modeling.cascade import KernelUpdateCascade
from knet_d2.modeling.structures import KernelState, NetworkOutput

OPTIONS = {
    "MODEL.COMPILE": True,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.KNET.NUM_STAGES": 2,
    "MODEL.RESNETS.NORM": "EvalBN",
}
has_compiler = shutil.which("g++") or shutil.which("clang++") or sys.platform == "win32" and shutil.which("cl")


class SmallNetwork(nn.Module):
    """One convolution in place of backbone and static kernels, and a cascade of one stage: few kernels to compile."""

    def __init__(self):
        super().__init__()
        options = {"update_dim": 8, "num_heads": 2, "ffn_dim": 8, "kernel_interaction": False}
        self.feature, self.kernels = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(1, 4, 8))
        self.cascade = KernelUpdateCascade(num_stages=1, dim=8, num_classes=5, soft_gather=False, **options)

    def static_network(self, images, image_sizes):
        feature = self.feature(images)
        masks = torch.einsum("bnc,bchw->bnhw", self.kernels, feature)
        state = KernelState(feature, self.kernels, masks)
        return NetworkOutput({}, state, self.cascade(state))


@pytest.mark.skipif(not has_compiler, reason="no C++ compiler for torch.compile")
def test_compiled_network_gives_the_same_results():
    """With PyTorch's own compiler; operators are no longer run one by one."""
    torch.manual_seed(0)
    model, compiled = SmallNetwork().eval(), compilation.CompiledNetwork()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found, expected = compiled(model, images, None), model.static_network(images, None)
        counts = []
        for network in (lambda *x: compiled(model, *x), model.static_network):
            with torch.profiler.profile() as profile:
                network(images, None)
            counts.append(sum(event.name.startswith("aten::") for event in profile.events()))
    for a, b in zip(found.stages[0], expected.stages[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert expected.stages[0].mask_logits.std() > 0.1
    assert counts[0] < counts[1] / 2


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without a compiler: it counts graphs, and runs them as they are."""
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(inputs))
        return graph.forward

    function = torch.compile(lambda model, *images: model.static_network(*images), dynamic=False, backend=backend)
    monkeypatch.setattr(compilation, "compiled_function", lambda: function)
    return sizes


def test_number_of_compiled_sizes_is_bounded(eager_backend, monkeypatch, caplog):
    """All of 5 sizes give what the model gives without compilation; after the second one, no other is compiled."""
    monkeypatch.setattr(compilation, "MOST_COMPILED", 2)
    model = tiny_model("panoptic", OPTIONS).eval()
    graphs = []
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for width in (32, 64, 96, 64, 128, 160):
            images = torch.rand(1, 3, 64, width)
            found, expected = model.network(images), model.static_network(images, None)
            assert torch.equal(found.stages[-1].mask_logits, expected.stages[-1].mask_logits)
            graphs.append(len(eager_backend))
    assert 0 < graphs[0] < graphs[1] == graphs[-1]
    assert caplog.text.count("MODEL.COMPILE: 2 sizes of batches are compiled, which is the limit") == 1


def test_training_is_compiled_and_a_copy_runs_its_own_weights(eager_backend):
    model = tiny_model("panoptic", OPTIONS)
    batch = [make_example((64, 64), 2)]
    losses = model(batch)
    sum(losses.values()).backward()
    assert eager_backend and all(p.grad is not None for p in model.parameters())
    plain = copy.deepcopy(model)
    plain.compiled = None
    assert {k: v.item() for k, v in plain(batch).items()} == {k: v.item() for k, v in losses.items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cascade.stages[-1].mask_branch[-1].weight.zero_()
        expected = other.static_network(torch.zeros(1, 3, 64, 64), None).stages[-1].mask_logits
        found = other.network(torch.zeros(1, 3, 64, 64)).stages[-1].mask_logits
    assert torch.equal(found, expected) and other.compiled is not model.compiled


def test_off_by_default():
    assert tiny_model("panoptic").compiled is None
