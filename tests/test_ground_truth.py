"""Ground truth as loaders hand it over: compact, checked in the workers, and the same for the model."""

import pytest
import torch
from data_helpers import custom_entry, data_cfg
from helpers import IGNORE, TASKS, make_example, tiny_model

from knet_d2.data import build_train_loader, compact_example
from knet_d2.data.ground_truth import CompactMapper, ground_truth_of
from knet_d2.data.shapes import write_shapes
from knet_d2.engine.dump import load_batch, save_batch
from knet_d2.errors import DataError
from knet_d2.tasks import TASKS as KINDS

BANK = KINDS["panoptic"].bank(num_matched=6, num_things=3, num_stuff=2)


@pytest.mark.parametrize("width", [1, 7, 8, 61])
def test_masks_are_packed_without_loss(width):
    x = make_example((12, width + 3), 3)
    masks = torch.rand(3, 12, width + 3, generator=torch.Generator().manual_seed(width)) < 0.5
    x["instances"].gt_masks.tensor = masks
    truth = ground_truth_of(x, BANK, IGNORE)
    assert truth.packed_masks.shape == (3, 12, -(-(width + 3) // 8))
    assert torch.equal(truth.masks(), masks.byte())


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_the_same_to_the_bit(task):
    model = tiny_model(task, {"MODEL.KNET.DROPOUT": 0.0})
    batch = [make_example((50, 75), 2), make_example((64, 64), 0)]
    losses = []
    for examples in (batch, [compact_example(x, model.bank, IGNORE) for x in batch]):
        losses.append({name: value.item() for name, value in model(examples).items()})
    assert losses[0] == losses[1]


def test_labels_beyond_a_byte_are_kept():
    """An ignore value of 1000 takes more than 8 bits; -1 is counted by sorting."""
    for ignore in (1000, -1, 10**9):
        x = make_example((16, 16), 0)
        x["sem_seg"][x["sem_seg"] == IGNORE] = ignore
        truth = ground_truth_of(x, BANK, ignore)
        assert torch.equal(truth.labels, x["sem_seg"]) and truth.stuff_classes.tolist() == [3, 4]


@pytest.mark.parametrize("label", [7, -2, 10**9])
def test_wrong_labels_are_found_where_the_example_is_made(label):
    x = make_example((16, 16), 1)
    x["sem_seg"][0, 0] = label
    with pytest.raises(DataError, match=rf"0.jpg: 'sem_seg' has labels \[{label}\]"):
        CompactMapper(lambda record: x, BANK, IGNORE)({})


def test_a_loader_checks_in_its_workers_and_its_batches_can_be_kept(tmp_path):
    write_shapes(str(tmp_path / "data"), num_images=3, seed=5, size=64)
    cfg = data_cfg("panoptic", custom=(custom_entry("coco_panoptic", str(tmp_path / "data")),))
    batch = next(iter(build_train_loader(cfg)))
    assert not {"instances", "sem_seg"} & set(batch[0]) and batch[0]["ground_truth"].labels.dtype == torch.uint8
    save_batch(str(tmp_path / "batch.pth"), batch)
    for before, after in zip(batch, load_batch(str(tmp_path / "batch.pth")), strict=True):
        assert before["ground_truth"].size == tuple(after["ground_truth"].size)
        for a, b in zip(before["ground_truth"][:4], after["ground_truth"][:4]):
            assert torch.equal(a, b)


def test_memory_is_pinned_for_cuda_alone(tmp_path, monkeypatch):
    write_shapes(str(tmp_path / "data"), num_images=3, seed=5, size=64)
    cfg = data_cfg("panoptic", custom=(custom_entry("coco_panoptic", str(tmp_path / "data")),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in (("cpu", False), ("cuda:1", True), ("mps", False)):
        cfg.MODEL.DEVICE = device
        assert build_train_loader(cfg).pin_memory is pinned
