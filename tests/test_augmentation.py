"""INPUT.AUGMENTATIONS: names and arguments, large-scale jitter, and what a transform adds around an image."""

import itertools

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg
from detectron2.data import transforms as T
from fvcore.transforms.transform import PadTransform
from helpers import tiny_model

from knet_d2.data import KNetDatasetMapper, build_mapper, build_train_loader, load_dataset
from knet_d2.data.augmentation import ResizeTransform, build_augmentations
from knet_d2.data.mapper import build_truth_mapper
from knet_d2.data.shapes import STUFF_CLASSES, THING_CLASSES, write_shapes
from knet_d2.errors import ConfigError
from knet_d2.modeling.sampled_points import SampledPoints
from knet_d2.modeling.targets import build_targets

KINDS = {"instance": "coco_instance", "panoptic": "coco_panoptic", "semantic": "sem_seg"}
FLIP = {"name": "RandomFlip", "prob": 1.0}


def jitter(low, high, size):
    scales = {"min_scale": low, "max_scale": high, "target_height": size[0], "target_width": size[1]}
    return [{"name": "ResizeScale", **scales}, {"name": "FixedSizeCrop", "crop_size": list(size)}]


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    write_shapes(folder, num_images=6, seed=21, size=64)
    return {task: custom_entry(kind, folder) for task, kind in KINDS.items()}


def config(entries, task, augmentations):
    cfg = data_cfg(task, custom=(entries[task],))
    cfg.INPUT.AUGMENTATIONS = augmentations
    return cfg


def records_of(cfg):
    return load_dataset(cfg.DATASETS.TRAIN[0])


def examples_of(entries, task, augmentations):
    cfg = config(entries, task, augmentations)
    mapper = build_mapper(cfg, is_train=True)
    return [mapper(record) for record in records_of(cfg)]


def same(a, b):
    """Whether two examples have the same image, labels and instances."""
    equal = [torch.equal(a[key], b[key]) for key in ("image", "sem_seg") if key in a]
    if "instances" in a:
        masks = a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor
        equal += [torch.equal(a["instances"].gt_classes, b["instances"].gt_classes), torch.equal(*masks)]
    return all(equal)


# ---- the list


@pytest.mark.parametrize("task", KINDS)
def test_entries_are_applied_in_their_order(entries, task):
    plain = examples_of(entries, task, [{"name": "Resize", "shape": [64, 64]}])
    assert all(map(same, plain, examples_of(entries, task, [])))  # the shapes have 64 pixels
    flipped = examples_of(entries, task, [{"name": "Default"}, FLIP])
    assert all(torch.equal(b["image"], a["image"].flip(-1)) for a, b in zip(plain, flipped))
    twice = examples_of(entries, task, [FLIP, {"name": "Default"}, FLIP])
    if task != "instance":  # polygons are drawn after they were moved, which turns single pixels
        assert all(map(same, plain, twice))
    darker = examples_of(entries, task, [{"name": "RandomBrightness", "intensity_min": 0.5, "intensity_max": 0.5}])
    for a, b in zip(plain, darker):
        assert same({**a, "image": a["image"] // 2}, b)


def test_an_entry_is_applied_with_its_probability(entries):
    cfg = config(entries, "instance", [{"name": "RandomRotation", "angle": [90, 90], "prob": 0.3}])
    (rotate,) = build_augmentations(cfg, True)
    np.random.seed(0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    inputs = [T.AugInput(image) for _ in range(300)]
    for x in inputs:
        rotate(x)
    changed = [not np.array_equal(x.image, image) for x in inputs]
    assert 60 < sum(changed) < 120
    assert np.array_equal(inputs[changed.index(True)].image, np.rot90(image))


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("RandomFlip", "use {name: NAME"),
        ({"prob": 0.5}, "use {name: NAME"),
        ({"name": "RandomFlip", "prob": 50}, "prob is a probability"),
        ({"name": "RandomExtent"}, "RandomFlip, .*ResizeScale"),
        ({"name": "Default", "prob": 0.5}, "use {name: NAME"),
        ({"name": "RandomFlip", "probability": 0.5}, r"RandomFlip\(prob=0.5, .*'probability'"),
        ({"name": "RandomRotation"}, r"RandomRotation\(angle, .*'angle'"),
        ({"name": "RandomRotation", "angle": [-10, 10], "prob": 3}, "prob is a probability"),
        ({"name": "RandomCrop", "crop_type": "absolut", "crop_size": [8, 8]}, "RandomCrop"),
        ({"name": "FixedSizeCrop", "crop_size": 64}, r"FixedSizeCrop\(crop_size"),
        ({"name": "FixedSizeCrop", "crop_size": [64, -70]}, "nothing is left"),
        ({"name": "RandomContrast", "intensity_min": "a", "intensity_max": 2}, "RandomContrast"),
        ({"name": "RandomSaturation", "intensity_min": 0.5, "intensity_max": 2}, "INPUT.FORMAT 'RGB', not 'BGR'"),
    ],
)
def test_wrong_entries_are_one_error_that_names_the_key(entries, entry, what):
    cfg = config(entries, "instance", [{"name": "Default"}, entry])
    cfg.INPUT.FORMAT = "BGR"
    state = np.random.get_state()[1].copy()
    with pytest.raises(ConfigError, match=rf"(?s)^INPUT\.AUGMENTATIONS\[1\] = .*{what}"):
        build_augmentations(cfg, True)
    assert np.array_equal(np.random.get_state()[1], state)


# ---- large-scale jitter


def test_the_scale_is_that_of_the_image_that_fits_the_target(entries):
    image = np.zeros((48, 64, 3), np.uint8)
    for scale, size in [(0.1, (8, 10)), (0.5, (38, 50)), (1.0, (75, 100)), (2.0, (150, 200))]:
        resize, crop = build_augmentations(config(entries, "instance", jitter(scale, scale, (100, 100))), True)
        transform = resize.get_transform(image)
        assert (transform.new_h, transform.new_w) == size and type(transform) is ResizeTransform
        crop(x := T.AugInput(transform.apply_image(image)))
        assert x.image.shape[:2] == (min(size[0], 100), min(size[1], 100))
    resize, _ = build_augmentations(config(entries, "instance", jitter(0.1, 2.0, (1000, 1000))), True)
    np.random.seed(0)
    scales = np.array([resize.get_transform(image).new_w / 1000 for _ in range(2000)])
    counts = np.histogram(scales, bins=4, range=(0.1, 2.0))[0]
    assert counts.sum() == 2000 and (abs(counts - 500) < 80).all()
    assert (resize.get_transform(np.zeros((2000, 1, 3), np.uint8))).new_w == 1  # not 0


@pytest.mark.parametrize("task", KINDS)
def test_a_small_image_is_padded_with_nothing_to_learn(entries, task):
    """The batch is as large as the crop; labels are ignored in its padding, masks are 0, no point lies there."""
    (example, *_) = examples_of(entries, task, jitter(0.25, 0.25, (128, 96)))
    assert example["image"].shape == (3, 24, 24) and example["padded_size"] == (128, 96)
    things = len(THING_CLASSES) if task != "semantic" else 0
    classes = {
        "MODEL.KNET.NUM_THING_CLASSES": things,
        "MODEL.KNET.NUM_STUFF_CLASSES": 0 if task == "instance" else len(THING_CLASSES + STUFF_CLASSES) - things,
    }
    model = tiny_model(task, classes)
    images = model.preprocess_image([example])
    assert images.tensor.shape == (1, 3, 128, 96) and images.image_sizes == [(24, 24)]
    (truth,) = model.send_ground_truth([example])
    full = build_targets(truth, images.tensor, None, 255)
    if task != "instance":
        assert (full.sem_seg[24:] == 255).all() and (full.sem_seg[:, 24:] == 255).all()
        assert (full.sem_seg[:24, :24] != 255).any()
    if task != "semantic":
        masks = torch.cat([full.masks, full.stuff_masks])
        assert masks[:, :24, :24].any() and not masks[:, 24:].any() and not masks[:, :, 24:].any()
        points = SampledPoints([full], torch.zeros(1), (32, 24), 500)._points
        assert (points[..., 1] <= 24 / 128).all() and (points[..., 0] <= 24 / 96).all()
    assert all(x.isfinite() for x in model.train()([example]).values())


def test_the_padded_size_is_for_training_batches_alone(entries):
    cfg = config(entries, "panoptic", jitter(0.5, 1.0, (64, 64)))
    record = records_of(cfg)[0]
    assert "padded_size" not in build_mapper(cfg, False)(record)
    assert "padded_size" not in build_truth_mapper(cfg, [])(record)
    cfg.INPUT.AUGMENTATIONS = [{"name": "Default"}]
    assert "padded_size" not in build_mapper(cfg, True)(record)


# ---- what a transform adds around an image


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("label", [0, 255])
def test_padding_is_no_class_and_no_object(entries, task, label):
    """Detectron2 0.6 pads label maps with 0, its main branch with 255."""
    cfg = config(entries, task, [])
    arguments = KNetDatasetMapper.from_config(cfg, True)
    pad = PadTransform(0, 0, 16, 8, 64, 64, pad_value=128.0, seg_pad_value=label)
    mapper = KNetDatasetMapper(**{**arguments, "augmentations": [pad]})
    for plain, record in zip(examples_of(entries, task, []), records_of(cfg), strict=True):
        if task == "instance":
            masks = plain["instances"].gt_masks.tensor.numpy()
            annotations = [{"category_id": int(k)} for k in plain["instances"].gt_classes]
            for x, mask in zip(annotations, masks):
                x["segmentation"] = mask
            record = {**record, "annotations": annotations}
        example = mapper(record)
        assert example["image"].shape == (3, 72, 80) and torch.equal(example["image"][:, :64, :64], plain["image"])
        if "sem_seg" in plain:
            assert torch.equal(example["sem_seg"][:64, :64], plain["sem_seg"])
            assert (example["sem_seg"][64:] == 255).all() and (example["sem_seg"][:, 64:] == 255).all()
        if "instances" in plain:
            masks, expected = (x["instances"].gt_masks.tensor for x in (example, plain))
            assert torch.equal(masks[:, :64, :64], expected) and masks.sum() == expected.sum()


@pytest.mark.parametrize("format", ["RGB", "L"])
def test_the_corners_of_a_rotated_image_have_no_label(entries, format):
    cfg = config(entries, "panoptic", [{"name": "RandomRotation", "angle": [45, 45], "expand": False}])
    cfg.INPUT.FORMAT = format
    if format == "L":
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0], [50.0]
    y, x = np.mgrid[:64, :64]
    distance = abs(y - 31.5) + abs(x - 31.5)  # the corners of a square that is turned by 45 degrees
    outside, inside = torch.from_numpy(distance > 46.5), torch.from_numpy(distance < 44)
    mapper, plain = build_mapper(cfg, True), build_truth_mapper(cfg, [])
    for record in records_of(cfg):
        example = mapper(record)
        assert example["image"].shape == ({"RGB": 3, "L": 1}[format], 64, 64)
        assert (example["image"][:, outside] == 0).all() and (example["sem_seg"][outside] == 255).all()
        assert not example["instances"].gt_masks.tensor[:, outside].any()
        void = [(labels["sem_seg"][inside] == 255).float().mean() for labels in (example, plain(record))]
        assert void[0] < void[1] + 0.1


def digests(cfg, count, start=0):
    loader = build_train_loader(cfg, start_iter=start)
    return [
        [(x["file_name"], x["image"].numpy().tobytes(), x["ground_truth"].labels.numpy().tobytes()) for x in batch]
        for batch in itertools.islice(loader, count)
    ]


def test_draws_depend_on_the_seed_and_the_position_alone(entries):
    augmentations = [*jitter(0.3, 2.0, (64, 64)), {"name": "RandomRotation", "angle": [-10, 10], "prob": 0.5}]
    cfg = config(entries, "panoptic", augmentations)
    whole = digests(cfg, 4)
    assert digests(cfg, 2, start=2) == whole[2:]
    cfg.DATALOADER.NUM_WORKERS = 2
    assert digests(cfg, 4) == whole
    cfg.SEED = 8
    assert digests(cfg, 1) != whole[:1]
