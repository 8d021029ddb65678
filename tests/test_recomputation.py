"""MODEL.KNET.CHECKPOINT: less is kept for the backward pass, and all numbers stay."""

import copy

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm, batch_norm
from helpers import IMAGE_KERNELS, make_batch, make_example, tiny_model
from torch import nn

from knet_d2.modeling import compilation
from knet_d2.modeling.recomputation import checkpoint_activations

CHECKPOINT = {"MODEL.KNET.CHECKPOINT": True}
GROUPS = {"MODEL.KNET.DENOISING.NUM_KERNELS": 7, "MODEL.KNET.ONE_TO_MANY.NUM_KERNELS": 8}
CASES = {
    "instance": ("instance", {"MODEL.SEM_SEG_HEAD.NORM": "GN", **GROUPS}),
    "kernels from the image": ("instance", {**IMAGE_KERNELS, **GROUPS, "MODEL.KNET.LOSS.NUM_POINTS": 60}),
    "panoptic": ("panoptic", {"MODEL.SEM_SEG_HEAD.NORM": "BN", "MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True}),
    **{head: ("semantic", {"MODEL.SEM_SEG_HEAD.NAME": head}) for head in ("FCNKernelHead", "ASPPKernelHead")},
}


def steps(model, half=False):
    """The losses and gradients of the second of two steps without updates."""
    for _ in range(2):
        torch.manual_seed(3)  # dropout
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(make_batch([2, 0]))
        sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items()}, {k: p.grad for k, p in model.named_parameters()}


def assert_equal(found, expected):
    """Mappings of tensors that are equal bit by bit."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case, half", [*((case, False) for case in CASES), ("panoptic", True)])
def test_losses_gradients_and_statistics_are_equal_bit_by_bit(case, half):
    task, options = CASES[case]
    plain, model = (tiny_model(task, {**options, **more}).train() for more in ({}, CHECKPOINT))
    model = copy.deepcopy(model)  # as the average of the weights is
    (losses, gradients), (found, found_gradients) = steps(plain, half), steps(model, half)
    assert found == losses and losses
    assert_equal(found_gradients, gradients)
    assert_equal(model.state_dict(), plain.state_dict())  # running statistics count each batch once
    counts = [x.num_batches_tracked for x in model.modules() if isinstance(x, nn.BatchNorm2d)]
    assert counts and {int(x) for x in counts} == {2}


def kept_bytes(options):
    """Bytes that static kernels and cascade keep for their backward pass, without parameters."""
    model = tiny_model("panoptic", {"MODEL.SEM_SEG_HEAD.NORM": "GN", **options}).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    features = model.backbone(torch.rand(1, 3, 128, 128))
    features = {name: x.detach().requires_grad_() for name, x in features.items()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        stages = model.cascade(model.sem_seg_head(features))
    assert stages[-1].mask_logits.requires_grad
    return sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in parameters)


def test_little_is_kept_for_the_backward_pass():
    assert kept_bytes(CHECKPOINT) < kept_bytes({}) / 2.5


def test_evaluation_and_names_stay():
    plain, model = (tiny_model("instance", options).eval() for options in ({}, CHECKPOINT))
    assert_equal(dict(model.named_parameters()), dict(plain.named_parameters()))
    inputs = [make_example((64, 64), 2)]
    with torch.no_grad():
        (expected,), (found,) = plain(inputs), model(inputs)
    assert len(expected["instances"])
    for name in ("scores", "pred_masks"):
        assert torch.equal(found["instances"].get(name), expected["instances"].get(name))


def test_a_part_with_detectron2_s_sync_batch_norm_counts_a_batch_once(monkeypatch):
    """It reads the momentum alone."""
    monkeypatch.setattr(batch_norm.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm, "differentiable_all_reduce", lambda x: 2 * x)
    head = nn.ModuleDict({"branch": nn.Sequential(nn.Conv2d(3, 4, 1), NaiveSyncBatchNorm(4), nn.ReLU())})
    plain = copy.deepcopy(head)
    checkpoint_activations(head, [])
    for x in (plain, head):
        x["branch"](torch.arange(48.0).reshape(1, 3, 4, 4)).square().sum().backward()
    assert_equal(head.state_dict(), plain.state_dict())
    assert_equal(*({k: p.grad for k, p in x.named_parameters()} for x in (head, plain)))
    norm = head["branch"][1]
    assert norm.running_mean.abs().min() > 0 and norm.momentum == 0.1 and norm.num_batches_tracked is not None


def test_a_compiled_model_counts_a_batch_once(monkeypatch):
    """Its graph computes activations again by PyTorch's own rules."""
    function = torch.compile(
        lambda model, *images: model.static_network(*images), dynamic=False, backend="aot_eager", fullgraph=True
    )
    monkeypatch.setattr(compilation, "compiled_function", lambda: function)
    torch._dynamo.reset()
    options = {"MODEL.RESNETS.DEPTH": 18, "MODEL.KNET.NUM_STAGES": 1}
    plain, model = (
        tiny_model("semantic", {**options, **more}).train() for more in ({}, {**CHECKPOINT, "MODEL.COMPILE": True})
    )
    (losses, _), (found, _) = steps(plain), steps(model)
    assert found == pytest.approx(losses, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
