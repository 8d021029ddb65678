"""Precision and devices of the whole model: float64, mixed precision, and no mix of CPU and GPU tensors."""

import contextlib

import pytest
import torch
from helpers import (
    CUDA,
    IGNORE,
    TASKS,
    Transfers,
    expected_losses,
    make_batch,
    make_example,
    move_to_fake_cuda,
    needs_fake_cuda,
    spread_scores,
    tiny_config,
    tiny_model,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knet_d2.data.ground_truth import ground_truth_of
from knet_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from knet_d2.engine.train_step import TrainStep
from knet_d2.modeling.cascade import KernelUpdateCascade
from knet_d2.modeling.layers import full_precision
from knet_d2.modeling.postprocessing import ImageGeometry, ImageLogits, PostProcessor, ResultOptions, dense
from knet_d2.modeling.postprocessing.rules import best_pairs, masks_to_boxes
from knet_d2.modeling.structures import KernelState, NetworkOutput
from knet_d2.modeling.targets import build_targets
from knet_d2.tasks import TASKS

CPU = torch.device("cpu")


@pytest.mark.parametrize("task", TASKS)
def test_double_precision_throughout(task):
    options = {"MODEL.KNET.DROPOUT": 0.0, "MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 32}
    options.update({"MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 32})
    single, double = tiny_model(task, options), tiny_model(task, options).double()
    batch = make_batch([2, 0])
    losses, expected = single(batch), double(batch)
    assert {value.dtype for value in expected.values()} == {torch.float64}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-2), name
    sum(expected.values()).backward()
    with torch.no_grad():
        result = double.eval()(batch)[0]
    tensors = {"instance": lambda: result["instances"].scores, "semantic": lambda: result["sem_seg"]}
    if task in tensors:
        assert tensors[task]().dtype == torch.float64


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_has_float32_where_sums_are_taken(task):
    model = tiny_model(task)
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen[name] = output

        return hook

    model.sem_seg_head.register_forward_hook(record("static"))
    model.cascade.register_forward_hook(record("stages"))
    costs = []
    compute = model.criterion.matcher.cost_terms
    model.criterion.matcher.cost_terms = lambda *args: costs.append(compute(*args)) or costs[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_batch([2, 0]))
    assert set(losses) == expected_losses(task)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    assert seen["static"].mask_logits.dtype == torch.bfloat16  # convolutions do use the half type
    for stage in seen["stages"]:
        assert {x.dtype for x in stage if x is not None} == {torch.float32}
    if task != "semantic":
        assert seen["static"].kernels.dtype == torch.float32
        assert {cost.dtype for terms in costs for cost in terms.values()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = model.eval()(make_batch([2, 0]))[0]
    if task == "semantic":
        assert result["sem_seg"].isfinite().all()


def test_semantic_output_of_a_panoptic_model_is_not_rounded_under_autocast():
    model = spread_scores(tiny_model("panoptic", {"MODEL.KNET.TEST.OUTPUTS": ["sem_seg"]})).eval()
    seen = []
    model.cascade.register_forward_hook(lambda m, args, output: seen.append(output))
    x = make_example((64, 64), 0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.preprocess_image([x])
        result = model([x])[0]["sem_seg"]
    output = NetworkOutput({}, None, seen[0])  # outside of autocast
    expected = model.postprocessor(model.image_logits(output, [x], images)[0])["sem_seg"]
    assert torch.equal(result, expected)


def test_sums_over_large_maps_do_not_overflow_half_precision():
    """The sum over 40,000 pixels of value 4 is 160,000, but float16 ends at 65,504."""
    torch.manual_seed(0)
    options = {"num_heads": 4, "ffn_dim": 16, "update_dim": 32}
    cascade = KernelUpdateCascade(num_stages=2, dim=32, num_classes=5, soft_gather=False, **options)
    feature = torch.full((1, 32, 200, 200), 4.0, dtype=torch.float16)
    masks = torch.ones(1, 8, 200, 200, dtype=torch.float16)
    state = KernelState(feature, torch.randn(1, 8, 32), masks)
    seen = []
    cascade.stages[0].kernel_update.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = cascade(state)
    transform = cascade.stages[0].feature_transform
    expected = (160_000 * transform.weight.sum(1) + 40_000 * transform.bias).expand(1, 8, -1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1.0)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for stage in stages for x in stage)


def test_static_kernels_do_not_overflow_half_precision():
    head = tiny_model("panoptic").sem_seg_head

    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, *args):
            return self.value

    head.semantic_fpn = Returns(None)
    head.localization_branch = head.semantic_branch = Returns(torch.full((1, 32, 200, 200), 2.0).half())
    head.instance_kernels.forward = lambda x: torch.ones(1, 6, 200, 200).half()
    head.classifier.forward = lambda x: torch.ones(1, 5, 200, 200).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = head({})
    expected = head.instance_kernels.weight.flatten(1) + 160_000
    torch.testing.assert_close(state.kernels[0, :6], expected)


def test_full_precision_changes_half_types_only():
    types = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert full_precision(torch.zeros(1, dtype=dtype)).dtype == types.get(dtype, dtype)
    assert full_precision(None) is None


# Devices: with fake tensors, every operation on tensors of two devices is an error, without any GPU


@needs_fake_cuda
def test_fake_tensors_of_two_devices_do_not_mix():
    with FakeTensorMode(), pytest.raises(Exception, match="device"):
        torch.zeros(2, device="cuda") + torch.zeros(2)


@needs_fake_cuda
def test_transfers_and_waits_are_noticed():
    with FakeTensorMode(), Transfers() as transfers:
        x = torch.zeros(3, device="cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        x.cpu()
        x.copy_(torch.ones(3))
        for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.unique()):
            with contextlib.suppress(Exception):  # no fake tensor has values
                wait()
    assert transfers.copies == [("cpu", "cuda", True), ("cuda", "cpu", False), ("cpu", "cuda", False)]
    assert transfers.waits == ["_local_scalar_dense", "index", "nonzero", "_unique2"]


def test_waits_are_noticed_on_the_cpu_as_well():
    with Transfers(CPU) as transfers:
        assert torch.ones(3).sum().item() == 3
    assert transfers.waits == ["_local_scalar_dense"]


class Launches(TorchDispatchMode):
    """Counts operations on a device that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.count += any(x.device == CUDA for x in tensors) and not func.is_view
        return result


@needs_fake_cuda
def test_results_take_few_launches_on_accelerators_and_wait_at_the_end_only(monkeypatch):
    """Fake tensors have no values, so values that Detectron2 reads are replaced by invented ones."""
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: read.append(tuple(self.shape)) or [0] * len(self))
    read = []
    geometry = ImageGeometry((800, 1216), (800, 1200), (427, 640))
    with FakeTensorMode(), Launches() as launches, Transfers() as transfers:
        class_logits, mask_logits = torch.zeros(153, 133, device="cuda"), torch.zeros(153, 100, 152, device="cuda")
        bank = TASKS["panoptic"].bank(num_matched=100, num_things=80, num_stuff=53)
        options = ResultOptions(("panoptic_seg",), -1, 100, 0.0, 0.3, 0.6, 0.0, 1.0)
        postprocessor = PostProcessor(bank=bank, category_ids=list(range(133)), options=options).to("cuda")
        segment_map, _ = postprocessor(ImageLogits(class_logits, mask_logits, geometry))["panoptic_seg"]
        assert segment_map.device == CUDA
        assert launches.count <= 160 and read == [(153,)] * 3 and transfers.waits == []
        launches.count = 0
        _, kernels, _ = best_pairs(class_logits[:100, :80].sigmoid(), 100)
        masks = dense.binary_masks(mask_logits[:100], kernels, geometry)
        assert masks_to_boxes(masks).device == CUDA
    assert launches.count <= 70 and transfers.waits == []


@needs_fake_cuda
@pytest.mark.parametrize("task", TASKS)
def test_targets_move_to_the_model_s_device_without_waiting(task):
    """Masks as bits, labels as bytes: 1/8 and 1 byte for each pixel."""
    things, stuff = (0, 5) if task == "semantic" else (3, 2)
    bank = TASKS[task].bank(num_matched=6, num_things=things, num_stuff=stuff)
    truth = ground_truth_of(make_example((64, 90), 2), bank, IGNORE)
    classes, masks, labels = 2 * 8, 2 * 64 * 12, 64 * 90
    expected = {"instance": classes + masks, "panoptic": 2 * classes + masks + labels, "semantic": labels}
    assert sum(x.nbytes for x in truth[:4] if x is not None) == expected[task]
    with FakeTensorMode(allow_non_fake_inputs=True), Transfers() as transfers:
        targets = build_targets(truth.to(CUDA), torch.zeros(1, 3, 64, 96, device="cuda"), (16, 24), IGNORE)
    assert {t.device for t in targets if isinstance(t, torch.Tensor)} == {CUDA}
    # Classes and masks of things, classes of stuff, and labels
    assert transfers.copies == [("cpu", "cuda", True)] * (3 if task == "instance" else 4)
    assert transfers.waits == []


@needs_fake_cuda
@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
def test_the_update_reads_all_numbers_at_once(optimizer, monkeypatch):
    """Clipping, the check of losses and gradient, and the optimiser's step."""
    read = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: read.append((self.device, len(self))) or [1.0] * len(self))
    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model"}
    cfg = tiny_config("panoptic", {"SOLVER.OPTIMIZER": optimizer, **clip})
    model = tiny_model("panoptic")
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_cuda(model)
        step = TrainStep(model, build_optimizer(cfg, model), clip_gradients=build_gradient_clipper(cfg), seed=0)

        def backward(data):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            return {"loss_a": torch.zeros((), device="cuda"), "loss_b": torch.zeros((), device="cuda")}

        monkeypatch.setattr(step, "_backward", backward)
        step.iter = 0
        step._update([{}], 0.0)  # the first step creates the optimiser's state
        with Transfers() as transfers:
            assert set(step._update([{}], 0.0)[0]) == {"loss_a", "loss_b", "grad_norm", "data_time"}
    assert read == [(CUDA, 3)] * 2
    assert transfers.copies == transfers.waits == []
