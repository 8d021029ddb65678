"""How often a training step and a prediction make the CPU wait for a device, and how much they launch there.

Fake CUDA tensors have no values, so the few values that are read are replaced by invented ones. Their backward pass
needs a GPU; it is counted with fake tensors of the CPU, which have the same operations.
"""

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import CUDA, IGNORE, Transfers, make_example, move_to_fake_cuda, needs_fake_cuda, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knet_d2.data import compact_example
from knet_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from knet_d2.engine.train_step import TrainStep

SIZE = (800, 1216)
THINGS, STUFF = 80, 53
COCO = {
    "MODEL.KNET.NUM_KERNELS": 100,
    "MODEL.KNET.NUM_THING_CLASSES": THINGS,
    "MODEL.KNET.NUM_STUFF_CLASSES": STUFF,
    "MODEL.KNET.THING_CATEGORY_IDS": list(range(THINGS)),
    "MODEL.KNET.STUFF_CATEGORY_IDS": list(range(STUFF)),
    "MODEL.RESNETS.NORM": "EvalBN",
}


class Launches(TorchDispatchMode):
    """Counts the operators that compute on a device."""

    def __init__(self, device=CUDA):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((result, args)) if isinstance(x, torch.Tensor)}
        self.count += self.device in devices and not func.is_view and func.namespace == "aten"
        return result


@pytest.fixture
def reads(monkeypatch):
    """Shapes of the tensors on a device whose values are read, each of which is a wait."""
    found = []

    def tolist(tensor):
        found.append(tuple(tensor.shape))
        return np.ones(tensor.shape, int).tolist()

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    return found


def make_model(task, more=()):
    options = {key: value for key, value in COCO.items() if task == "panoptic" or "STUFF" not in key} | dict(more)
    return tiny_model(task, options), tiny_config(task, options)


def make_batch(model):
    """Two images with 7 instances each, as a loader gives them."""
    examples = [make_example(SIZE, 7, seed=i, num_classes=THINGS + 2) for i in range(2)]
    return [compact_example(x, model.bank, IGNORE) for x in examples]


def take_step(step, monkeypatch):
    """A training step whose backward pass is left out."""
    parameters = list(step.model.parameters())

    def backward(loss):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def assign(costs, shapes):
        return [np.tile(np.arange(min(shape)), (2, 1)) for shape in shapes]

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(step.model.criterion.matcher, "_assign", assign)
    monkeypatch.setattr(step, "_check_gradients", lambda: None)
    with EventStorage(0):
        step.iter = 0
        step.run_step()


@needs_fake_cuda
@pytest.mark.parametrize(
    "task, options, copies, num_losses",
    [
        ("instance", {}, 4, 12),
        ("panoptic", {}, 5, 16),
        ("panoptic", {"MODEL.KNET.ONE_TO_MANY.NUM_KERNELS": 300}, 5, 27),
    ],
)
def test_a_training_step_waits_twice(task, options, copies, num_losses, reads, monkeypatch):
    """For the matching costs of all images and stages, and for all losses together with the norm of the gradient."""
    model, cfg = make_model(task, options)
    batch = [
        compact_example(make_example(SIZE, 7, seed=i, num_classes=THINGS + 2), model.bank, IGNORE) for i in range(2)
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_cuda(model)
        step = TrainStep(model, build_optimizer(cfg, model), clip_gradients=build_gradient_clipper(cfg), seed=0)
        step.data_loader = [batch, batch]
        take_step(step, monkeypatch)
        reads.clear()
        with Transfers() as transfers:
            take_step(step, monkeypatch)
    assert transfers.waits == [] and reads == [(num_losses + 1,)]
    to_cpu = [copy for copy in transfers.copies if copy[0] == "cuda"]
    to_device = [copy for copy in transfers.copies if copy[0] == "cpu"]
    assert to_cpu == [("cuda", "cpu", False)]  # the costs
    # Of each image its pixels, classes, masks, stuff classes, and panoptic labels; once the matches
    assert to_device == [("cpu", "cuda", True)] * (2 * copies + 1)


@needs_fake_cuda
def test_launches_of_a_training_step(monkeypatch):
    """Forward pass and losses of two images, and their backward pass."""
    model, _ = make_model("panoptic")
    batch = [
        compact_example(make_example(SIZE, 7, seed=i, num_classes=THINGS + 2), model.bank, IGNORE) for i in range(2)
    ]
    monkeypatch.setattr(
        model.criterion.matcher, "_assign", lambda costs, shapes: [np.tile(np.arange(7), (2, 1)) for _ in shapes]
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        total = sum(model(batch).values())
        with Launches(torch.device("cpu")) as backward:
            total.backward()
        move_to_fake_cuda(model)
        with Launches() as forward:
            model(batch)
    print(f"forward {forward.count}, backward {backward.count}")
    assert forward.count <= 1150 and backward.count <= 800


@needs_fake_cuda
def test_a_prediction_launches_less_when_its_weights_have_been_folded(reads):
    model, _ = make_model("panoptic")
    model.eval()
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move_to_fake_cuda(model)
        for _ in range(2):
            with Launches() as launches, Transfers() as transfers:
                (logits,) = model([{"image": torch.zeros(3, *SIZE, dtype=torch.uint8)}], do_postprocess=False)
            counts.append(launches.count)
            assert transfers.waits == [] and transfers.copies == [("cpu", "cuda", True)]
        with Launches() as launches, Transfers() as transfers:
            model.postprocessor(logits)
    print(f"network {counts}, post-processing {launches.count}")
    assert counts[0] - counts[1] >= 53 * 4 and counts[1] <= 480
    assert launches.count <= 85 and transfers.waits == [] and reads == [(153,)] * 3
