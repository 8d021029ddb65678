"""Copy-paste augmentation: what lies under pasted objects, which objects remain, and what the draws depend on."""

import itertools

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm

from knet_d2.data import build_mapper, build_train_loader, load_dataset
from knet_d2.data.copy_paste import CopyPasteMapper, moved, paste, with_copy_paste
from knet_d2.data.shapes import write_shapes
from knet_d2.errors import ConfigError

KINDS = {"instance": "coco_instance", "panoptic": "coco_panoptic", "semantic": "sem_seg"}


def example(size, boxes, value, with_labels=True):
    """An image of one value with boxes (class, top, left, bottom, right) on stuff of class 9."""
    masks, labels = torch.zeros(len(boxes), *size, dtype=torch.bool), torch.full(size, 9)
    for mask, (label, top, left, bottom, right) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
        labels[mask] = label
    classes = torch.tensor([box[0] for box in boxes], dtype=torch.int64)
    result = {"image": torch.full((3, *size), value, dtype=torch.uint8), "file_name": f"{value}.png", "height": 7}
    result["instances"] = Instances(size, gt_classes=classes, gt_masks=BitMasks(masks))
    return {**result, "sem_seg": labels} if with_labels else result


def parts(x):
    return x["instances"].gt_classes.tolist(), x["instances"].gt_masks.tensor


def test_a_pasted_object_covers_what_lies_under_it():
    """The first object loses 6 of its 16 pixels, the second one all 4, the third one none."""
    own = example((8, 10), [(0, 0, 0, 4, 4), (1, 2, 2, 4, 4), (2, 6, 6, 8, 10)], value=50)
    other = example((8, 10), [(5, 2, 1, 5, 4)], value=200)
    before = {key: own[key].clone() for key in ("image", "sem_seg")}
    result = paste(own, other)
    classes, masks = parts(result)
    assert classes == [0, 2, 5] and masks.flatten(1).sum(1).tolist() == [16 - 6, 8, 9]
    assert masks.sum(dim=0).max() == 1  # disjoint
    pasted = other["instances"].gt_masks.tensor[0]
    assert (result["image"][:, pasted] == 200).all() and (result["image"][:, ~pasted] == 50).all()
    assert (result["sem_seg"][pasted] == 5).all()
    # The label under the second object, which has vanished, is not its own any more
    assert torch.equal(result["sem_seg"][~pasted], own["sem_seg"][~pasted]) and 1 not in result["sem_seg"]
    assert result["file_name"] == "50.png" and result["height"] == 7
    assert all(torch.equal(own[key], x) for key, x in before.items()) and parts(own)[1].sum() == 16 + 4 + 8


def test_all_ground_truth_agrees_and_areas_add_up():
    """Of 100 draws: pixels of all masks, each once, carry their classes; the others are the stuff of the image."""
    own = example((40, 30), [(0, 0, 0, 20, 10), (1, 20, 5, 40, 30)], value=50)
    other = example((25, 60), [(5, 0, 0, 10, 10), (6, 10, 20, 20, 40), (7, 20, 50, 25, 60)], value=200)
    counts = []
    for seed in range(100):
        np.random.seed(seed)
        result = paste(own, other)
        classes, masks = parts(result)
        assert len(classes) == len(masks) and masks.flatten(1).any(dim=1).all() and masks.sum(dim=0).max() == 1
        painted = torch.full((40, 30), 9)
        for label, mask in zip(classes, masks):
            painted[mask] = label
        assert torch.equal(painted, result["sem_seg"])
        from_other = torch.isin(painted, torch.tensor([5, 6, 7]))
        assert torch.equal(result["image"], torch.where(from_other, 200, 50).byte().expand(3, -1, -1))
        areas = dict(zip(classes, masks.flatten(1).sum(1).tolist()))
        assert (
            areas.get(0, 0) + areas.get(1, 0)
            == 200 + 500 - (torch.isin(own["sem_seg"], torch.tensor([0, 1])) & from_other).sum()
        )
        counts.append(sum(k >= 5 for k in classes))
    # Of one to three objects; the window of 30 columns never shows all of the 60
    assert {0, 1, 2} <= set(counts)


def test_the_other_image_is_placed_within_the_image():
    x = torch.arange(12).view(3, 4)
    assert moved(x, (1, 2), (5, 6))[1:4, 2:].equal(x) and moved(x, (1, 2), (5, 6)).sum() == x.sum()
    assert moved(x, (-1, -2), (2, 2)).equal(x[1:, 2:])
    assert moved(x, (-1, 1), (2, 6)).tolist() == [[0, 4, 5, 6, 7, 0], [0, 8, 9, 10, 11, 0]]
    own, other = example((6, 9), [], 50), example((4, 12), [(3, 0, 0, 4, 12)], 200)
    rows, columns = set(), set()
    for seed in range(60):
        np.random.seed(seed)
        (_, (mask,)) = parts(paste(own, other))
        top = int(mask.any(1).nonzero()[0])
        assert mask[top : top + 4].all() and mask.sum() == 36
        rows.add(top)
    assert rows == {0, 1, 2}
    other = example((4, 12), [(3, 0, 0, 1, 1)], 200)
    for seed in range(60):
        np.random.seed(seed)
        columns.add(len(parts(paste(own, other))[0]))
    assert columns == {0, 1}  # the object lies outside of the crop, or in it


@pytest.mark.parametrize(("own_boxes", "other_boxes"), [([], [(5, 1, 1, 4, 4)]), ([(0, 1, 1, 4, 4)], [])])
def test_images_without_objects(own_boxes, other_boxes):
    own, other = (example((8, 8), boxes, i, with_labels=False) for i, boxes in enumerate((own_boxes, other_boxes)))
    result = paste(own, other)
    classes, masks = parts(result)
    assert classes == [box[0] for box in own_boxes + other_boxes] and masks.sum() == 9
    assert "sem_seg" not in result


def test_floats_stay_floats():
    own, other = example((8, 8), [], 50), example((8, 8), [(5, 1, 1, 4, 4)], 200)
    other["image"] = other["image"] + 0.25
    assert paste(own, other)["image"].unique().tolist() == [50.0, 200.25]


# ---- in the loader


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=6, seed=21, size=64)
    return {task: custom_entry(kind, folder) for task, kind in KINDS.items()}


def test_half_of_the_images_and_never_their_own_objects():
    records = [{"file_name": f"{i}.png"} for i in range(6)]
    read = []

    def mapper(record):
        read.append(record["file_name"])
        return example((8, 8), [(5, 1, 1, 4, 4)], int(record["file_name"][0]))

    mixing = CopyPasteMapper(mapper, records, range(4), 0.5)
    np.random.seed(0)
    sources = []
    for i in range(1000):
        read.clear()
        mixing(records[i % 4])
        sources.append(read[1:])
    assert 450 < sum(map(bool, sources)) < 550
    assert all(source != [f"{i % 4}.png"] for i, source in enumerate(sources))
    found = [source[0] for i, source in enumerate(sources) if source and i % 4 == 0]
    assert {*found} == {"1.png", "2.png", "3.png"}
    assert len(mixing(records[0])["instances"]) == 1  # at the same place, one object covers the other
    alone = CopyPasteMapper(mapper, records[:1], [0], 1.0)
    read.clear()
    alone(records[0])
    assert read == ["0.png"]


def digests(cfg, count, start=0):
    loader = build_train_loader(cfg, start_iter=start)
    keys = ("image", "ground_truth")
    return [
        [
            (x["file_name"], *(np.asarray(y).tobytes() for y in (x["image"], *x[keys[1]][:3])), x[keys[1]].seed)
            for x in batch
        ]
        for batch in itertools.islice(loader, count)
    ]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_draws_depend_on_the_seed_and_the_position_alone(entries, task, monkeypatch):
    cfg = data_cfg(task, custom=(entries[task],))
    plain = digests(cfg, 3)
    cfg.INPUT.COPY_PASTE = 0.7
    whole = digests(cfg, 3)
    changed = [a[1] != b[1] for x, y in zip(plain, whole) for a, b in zip(x, y)]
    assert 0 < sum(changed) < 12
    assert digests(cfg, 1, start=2) == whole[2:]
    cfg.DATALOADER.NUM_WORKERS = 2
    assert digests(cfg, 3) == whole
    cfg.DATALOADER.NUM_WORKERS = 0
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        halves.append(digests(cfg, 3))
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_a_pasted_panoptic_example_is_checked_ground_truth(entries):
    cfg = data_cfg("panoptic", custom=(entries["panoptic"],))
    records = load_dataset(cfg.DATASETS.TRAIN[0])
    cfg.INPUT.COPY_PASTE = 1.0
    mapper, pasted = build_mapper(cfg, True), 0
    mixing = with_copy_paste(cfg, mapper, records)
    for seed, record in enumerate(records):
        np.random.seed(seed)
        plain, found = mapper(record), mixing(record)
        pasted += not torch.equal(plain["image"], found["image"])
        for label, mask in zip(*parts(found)):
            assert (found["sem_seg"][mask] == label).all()
    assert pasted >= 4


def test_objects_come_from_images_that_have_some(tmp_path):
    """Of 6 images, 4 are without objects: all others get some nevertheless."""
    write_shapes(str(tmp_path), num_images=6, seed=21, size=64)
    entry = custom_entry("coco_instance", str(tmp_path))
    cfg = data_cfg("instance", custom=(entry,))
    records = load_dataset(cfg.DATASETS.TRAIN[0])
    for record in records[2:]:
        record["annotations"] = []
    mapper = build_mapper(cfg, True)
    assert with_copy_paste(cfg, mapper, records) is mapper
    cfg.INPUT.COPY_PASTE = 1.0
    mixing = with_copy_paste(cfg, mapper, records)
    assert all(len(mixing(record)["instances"]) for record in records)
    assert with_copy_paste(cfg, mapper, records[2:]) is mapper


def test_options_that_make_no_sense(entries):
    cfg = data_cfg("semantic", custom=(entries["semantic"],))
    cfg.INPUT.COPY_PASTE = 0.5
    with pytest.raises(ConfigError, match=r"INPUT\.COPY_PASTE = 0.5: set it to 0\. MODEL\.KNET\.TASK 'semantic'"):
        build_train_loader(cfg)
    cfg = data_cfg("instance", custom=(entries["instance"],))
    cfg.INPUT.COPY_PASTE = 1.5
    with pytest.raises(ConfigError, match=r"INPUT\.COPY_PASTE = 1\.5: use a probability"):
        build_train_loader(cfg)
    cfg.INPUT.COPY_PASTE, cfg.MODEL.KNET.VIDEO.EMBEDDING = 0.5, True
    with pytest.raises(ConfigError, match=r"INPUT\.COPY_PASTE = 0\.5: set it to 0\. In pairs of frames"):
        with_copy_paste(cfg, build_mapper(cfg, is_train=True), [])
