"""What every architecture must do, as one class that the test of each inherits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from helpers import (
    CUDA,
    IGNORE,
    Transfers,
    expected_losses,
    make_batch,
    make_example,
    move_to_fake_cuda,
    needs_fake_cuda,
    set_options,
    small,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from knet_d2.checkpoint import Checkpointer
from knet_d2.config import add_knet_config
from knet_d2.errors import ConfigError
from knet_d2.export import ExportableKNet, trace
from knet_d2.modeling.matcher import HungarianMatcher
from knet_d2.modeling.postprocessing import ImageGeometry, mask_probabilities
from knet_d2.modeling.structures import Targets

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")


def read_config(path):
    """The config of a file below configs/."""
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.merge_from_file(str(CONFIGS / path))
    return cfg


class StaticKernels(nn.Module):
    """The part of a model that depends on its architecture: images -> kernels and their mask logits."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.sem_seg_head = model.backbone, model.sem_seg_head

    def forward(self, images):
        state = self.sem_seg_head(self.backbone(images))
        return state.kernels, state.mask_logits


def random_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def predict(model):
    """Return the predictions of the last stage for a random image."""
    with torch.no_grad():
        return [x for x in model.eval().network(random_images(1, 3, 64, 96)).stages[-1] if x is not None]


def result_size(result):
    """Height and width of the only output of an image."""
    ((name, value),) = result.items()
    if name == "instances":
        assert value.pred_masks.shape[1:] == value.image_size
        return value.image_size
    return tuple((value[0] if name == "panoptic_seg" else value).shape[-2:])


class ArchitectureTests:
    """The tests, and the outcome that is expected of an architecture; a class without one of them fails."""

    config: str  # file below configs/; its widths are made small, its depths stay
    options: dict = {}  # changes to the config
    strides: dict[str, int]  # feature of the backbone -> stride
    frozen: tuple[str, ...]  # how the names of the parameters begin that aren't trained
    updates_statistics: bool  # whether training changes the statistics of the backbone's norms
    has_windows: bool  # whether it is exported for one size of images only

    @classmethod
    def build(cls, seed=0, **options):
        cfg = read_config(cls.config)
        set_options(cfg, {**small(cfg.MODEL.KNET.TASK), **cls.options, **options})
        torch.manual_seed(seed)
        return build_model(cfg)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return cls.build()

    @property
    def task(self):
        return read_config(self.config).MODEL.KNET.TASK

    @property
    def expected_losses(self):
        knet = read_config(self.config).MODEL.KNET
        centers = {"loss_center_s0"} if knet.LOSS.CENTER_WEIGHT > 0 else set()
        return expected_losses(self.task, knet.NUM_STAGES) | centers

    def assert_trains(self, model, batch):
        losses = model.train()(batch)
        assert set(losses) == self.expected_losses
        assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
        model.zero_grad()
        with Transfers(CPU) as transfers:
            sum(losses.values()).backward()
        assert transfers.waits == []  # what waits for a value here, waits for a GPU there
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(self.frozen), name
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def test_builds(self, model):
        assert {name: shape.stride for name, shape in model.backbone.output_shape().items()} == self.strides
        features = model.eval().backbone(random_images(1, 3, 64, 96))
        sizes = {name: (-(-64 // stride), -(-96 // stride)) for name, stride in self.strides.items()}
        assert {name: tuple(x.shape[2:]) for name, x in features.items()} == sizes
        assert all(x.isfinite().all() and x.std() > 0 for x in features.values())

    def test_forward_and_backward(self, model):
        before = {name: x.clone() for name, x in model.backbone.named_buffers() if "running" in name}
        self.assert_trains(model, make_batch([2, 0]))
        for name, buffer in model.backbone.named_buffers():
            if "running" in name:
                assert torch.equal(buffer, before[name]) != self.updates_statistics, name

    def test_odd_sizes(self, model):
        sizes = [(61, 97), (33, 40)]
        batch = [make_example(size, 2, seed=i) for i, size in enumerate(sizes)]
        self.assert_trains(model, batch)
        with torch.no_grad():
            results = model.eval()([{"image": x["image"]} for x in batch])
        assert [result_size(result) for result in results] == sizes

    def test_images_without_ground_truth(self, model):
        batch = make_batch([0, 0])
        for x in batch:
            x["sem_seg"].fill_(IGNORE)
        self.assert_trains(model, batch)

    def test_saves_and_loads(self, model, tmp_path):
        expected, others = predict(model), [self.build(seed=1), self.build(seed=2)]
        assert not any(torch.equal(predict(other)[-1], expected[-1]) for other in others)
        others[0].load_state_dict(model.state_dict())
        Checkpointer(model, str(tmp_path)).save("model")
        Checkpointer(others[1]).load(str(tmp_path / "model.pth"))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(predict(other), expected, strict=True))

    def test_exports(self, model):
        """Only the static kernels depend on the architecture; test_export.py exports the rest for each task."""
        network = StaticKernels(ExportableKNet(model.eval()).model)
        step = max(model.size_divisibility, 32)
        # Each further dynamic length takes seconds
        dynamic, batch, rows = {2: step * Dim("rows", min=2)}, 2, 5 * step
        if self.has_windows:
            with pytest.raises(ConfigError, match=r"MODEL\.BACKBONE\.NAME: .* --size HxW .* knet_d2\.load"):
                trace(model)
            dynamic, batch, rows = {0: Dim("batch", min=1)}, 3, 3 * step
        with torch.no_grad():
            images = random_images(2, 3, 3 * step, 2 * step)
            program = torch.export.export(network, (images,), dynamic_shapes=(dynamic,), strict=False)
            images = random_images(batch, 3, rows, 2 * step)
            for found, expected in zip(program.module()(images), network(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @needs_fake_cuda
    def test_runs_on_the_model_s_device_with_one_transfer_back(self, monkeypatch):
        # The assignment is solved on the CPU, with values
        first_two = staticmethod(lambda costs, shapes: [np.tile(np.arange(2), (2, 1))] * len(shapes))
        monkeypatch.setattr(HungarianMatcher, "_assign", first_two)
        model, task = self.build().train(), self.task
        model.criterion.num_points = 0  # there is no generator for fake CUDA tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            move_to_fake_cuda(model)
            with Transfers() as transfers:
                output, losses = compute_losses_on_fake_cuda(model, task)
            predict_on_fake_cuda(model, task, output)
        assert losses == self.expected_losses
        to_device = ("cpu", "cuda", True)
        expected = [to_device] * 2  # the images
        if task != "semantic":
            expected += [("cuda", "cpu", False), to_device]  # costs of all stages and images, and their matches
        assert transfers.copies == expected
        assert transfers.waits == []


def compute_losses_on_fake_cuda(model, task):
    """A training step's forward pass for two images with two things and, panoptic, two stuff classes each."""
    images = model.preprocess_image([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}] * 2)
    output = model.network(images.tensor)
    auxiliary = None if model.auxiliary_head is None else model.auxiliary_head(output.features)
    height, width = output.state.mask_logits.shape[-2:]
    masks = torch.zeros(2, 2 * height, 2 * width, device="cuda")  # losses are taken at twice the network's resolution
    labels = torch.zeros(64, 96, dtype=torch.int64, device="cuda")
    classes = torch.zeros(2, dtype=torch.int64, device="cuda")
    stuff = 2 if task == "panoptic" else 0
    covered = torch.zeros(2, height, width, device="cuda")
    target = Targets(classes, masks, 3 + classes[:stuff], masks[:stuff], labels, covered=covered)
    losses = model.criterion(output.state, output.stages, [target, target], auxiliary)
    assert {x.device for x in losses.values()} == {CUDA}
    return output, set(losses)


def predict_on_fake_cuda(model, task, output):
    geometry = ImageGeometry((64, 96), (60, 90), (30, 45))
    assert mask_probabilities(output.stages[-1].mask_logits[0], geometry).device == CUDA
    if task != "instance":
        images = ImageList(torch.zeros(2, 3, 64, 96), [(60, 90)] * 2)
        prediction = model.image_logits(output, [{"height": 30, "width": 45}] * 2, images)[1]
        options = model.postprocessor.options._replace(outputs=("sem_seg",))
        assert model.postprocessor(prediction, options)["sem_seg"].device == CUDA
