"""Large images with many objects: cut for training, predicted in tiles and joined for evaluation, counted before."""

import json
import logging
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data_helpers import custom_entry, data_cfg
from detectron2.structures import Boxes, Instances
from PIL import Image
from program_helpers import ROOT
from scipy import ndimage
from torch import nn

from knet_d2.config import get_knet_cfg
from knet_d2.data.build import build_test_loader, build_train_loader
from knet_d2.data.class_coverage import warn_of_crowded_images
from knet_d2.data.classes import with_classes
from knet_d2.data.shapes import write_shapes
from knet_d2.engine import Trainer
from knet_d2.errors import ConfigError, DataError
from knet_d2.evaluation import build, build_evaluators
from knet_d2.inference import ImagePredictor
from knet_d2.inference.tiled_model import TiledKNet
from knet_d2.programs import cut_tiles

SIZE = (110, 170)


def cut(*words):
    cut_tiles.main(cut_tiles.get_parser().parse_args([str(word) for word in words]))


def mask_of(top, left, height, width, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def record_of(mask, number, **keys):
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    box, area = mask_util.toBbox(rle).tolist(), int(mask.sum())
    segmentation = {**rle, "counts": rle["counts"].decode()}
    common = {"id": number, "image_id": 1, "category_id": 7, "iscrowd": 0, "bbox": box, "area": area}
    return {**common, "segmentation": segmentation, **keys}


def write_dataset(folder, annotations, pixels=None, file_name="large.png"):
    """A COCO data set of one image; returns the arguments of cut_tiles."""
    (folder / "images").mkdir(exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (*SIZE, 3), np.uint8) if pixels is None else pixels
    if file_name.endswith(".npy"):
        np.save(folder / "images" / file_name, pixels)
    else:
        Image.fromarray(pixels).save(folder / "images" / file_name)
    image = {"id": 1, "file_name": file_name, "height": SIZE[0], "width": SIZE[1]}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 7, "name": "cell"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json", folder / "images", folder / "tiles"


def tiles_in(folder):
    """Each tile's entry, pixels and annotations."""
    content = json.loads((folder / "instances.json").read_text())
    for image in content["images"]:
        path = folder / "images" / image["file_name"]
        pixels = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
        assert pixels.shape[:2] == (image["height"], image["width"])
        yield image, pixels, [x for x in content["annotations"] if x["image_id"] == image["id"]]


def test_tiles_make_up_the_image_and_its_objects(tmp_path):
    """Objects as RLE and as polygons, also beyond the border of the image."""
    triangle = [-3.0, 20.0, 120.5, 3.2, 140.0, 130.0]
    rle = mask_util.merge(mask_util.frPyObjects([triangle], *SIZE))
    masks = {1: mask_of(30, 40, 25, 60), 2: mask_util.decode(rle).astype(bool), 3: mask_of(108, 165, 2, 5)}
    records = [record_of(masks[i], i, category_id=7) for i in masks]
    records[1]["segmentation"] = [triangle]
    words = write_dataset(tmp_path, records)
    cut(*words, "--tile-size", 64, "--overlap", 0, "--min-part", 0)
    original = np.asarray(Image.open(tmp_path / "images" / "large.png"))
    joined, found, areas = np.zeros_like(original), np.zeros(SIZE, int), 0
    for image, pixels, annotations in tiles_in(words[-1]):
        window = np.s_[image["top"] : image["top"] + image["height"], image["left"] : image["left"] + image["width"]]
        joined[window] = pixels
        for x in annotations:
            mask = mask_util.decode(x["segmentation"])
            assert x["area"] == mask.sum() > 0 and x["bbox"] == mask_util.toBbox(x["segmentation"]).tolist()
            assert x["category_id"] == 7 and x["iscrowd"] == 0
            areas += x["area"]
            found[window] = np.maximum(found[window], mask)
    assert (joined == original).all()
    assert (found == np.any(list(masks.values()), axis=0)).all()
    assert areas >= sum(mask.sum() for mask in masks.values())  # tiles overlap where the size is no multiple


def test_tiles_stay_in_their_folder(tmp_path):
    words = write_dataset(tmp_path, [record_of(mask_of(5, 61, 10, 10), 1)])
    content = json.loads(words[0].read_text())
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = "../../images/x"
    words[0].write_text(json.dumps(content))
    cut(*words, "--tile-size", 128, "--overlap", 0)
    names = [image["file_name"] for image, *_ in tiles_in(words[-1])]
    assert names == ["1_large_0_0.png", "1_large_0_42.png"]
    assert [x.name for x in words[1].iterdir()] == ["large.png"]
    words[0].rename(tmp_path / "coco.json")
    with pytest.raises(ConfigError, match="its images are those to cut"):
        cut(tmp_path / "coco.json", words[1], tmp_path, "--tile-size", 128)


def test_prediction_says_that_it_makes_no_tiles(caplog):
    cfg, engine = get_knet_cfg(), mock.Mock()
    for size in (0, 512):
        cfg.TEST.TILES.SIZE = size
        ImagePredictor(cfg, mock.Mock(), engine)
        assert ("unless you give tile_size=512" in caplog.text) == (size > 0)


def test_parts_at_borders(tmp_path, capsys):
    """Of 10 columns, 3 are in the left tile and 10 in the one that overlaps it."""
    words = write_dataset(
        tmp_path, [record_of(mask_of(5, 61, 10, 10), 1), record_of(mask_of(40, 10, 5, 5), 2, iscrowd=1)]
    )
    cut(*words, "--tile-size", 64, "--overlap", 10)
    parts = [(image["left"], x["area"], x["iscrowd"]) for image, _, some in tiles_in(words[-1]) for x in some]
    assert parts == [(0, 30, 1), (0, 25, 1), (53, 100, 0)]
    assert "up to 1 objects" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there are tiles in it"):
        cut(*words, "--tile-size", 64)
    with pytest.raises(ConfigError, match="--overlap 64: use 0 to 63"):
        cut(*words, "--tile-size", 64, "--overlap", 64)


def test_values_of_more_than_8_bits_stay(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 65536, (*SIZE, 5)).astype(np.uint16)
    words = write_dataset(tmp_path, [], pixels, "large.npy")
    cut(*words, "--tile-size", 64, "--format", "5-channel")
    for image, tile, _ in tiles_in(words[-1]):
        top, left = image["top"], image["left"]
        assert tile.dtype == np.uint16 and (tile == pixels[top : top + 64, left : left + 64]).all()


def test_an_annotation_of_another_size(tmp_path):
    words = write_dataset(tmp_path, [record_of(mask_of(5, 5, 9, 9, (50, 60)), 1)])
    with pytest.raises(DataError, match=r"large.png: its size is \[50, 60\], but the image has \[110, 170\]"):
        cut(*words, "--tile-size", 64)


def test_the_limit_of_pixels_is_of_the_environment(tmp_path):
    Image.new("L", (1100, 1000)).save(tmp_path / "large.png")
    code = "import sys; from knet_d2.data.files import read_image; print(read_image(sys.argv[1], 'L').shape)"
    outcomes = {}
    for limit in ("1", "2", "many"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "KNET_D2_MAX_MEGAPIXELS": limit}
        command = [sys.executable, "-c", code, str(tmp_path / "large.png")]
        outcomes[limit] = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "images of up to 1 megapixels" in outcomes["1"].stderr and outcomes["2"].stdout == "(1000, 1100, 1)\n"
    assert "KNET_D2_MAX_MEGAPIXELS = 'many': set this" in outcomes["many"].stderr


def save_png(pixels, path, mode=None):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels, mode).save(path)


@pytest.mark.parametrize("kind", ["grey", "deep", "colour", "palette"])
def test_label_maps_are_cut_with_their_images(kind, tmp_path):
    """Values stay as they are, so that the same classes, label_values and colors fit."""
    *_, images, output = write_dataset(tmp_path, [])
    values = np.random.RandomState(1).randint(0, 256, SIZE).astype(np.uint8)
    labels = Image.fromarray({"deep": values * np.uint16(257), "colour": np.dstack([values] * 3)}.get(kind, values))
    if kind == "palette":
        labels.putpalette(list(range(255, -1, -1)) * 3)
    (tmp_path / "maps").mkdir()
    labels.save(tmp_path / "maps" / "large.png")
    cut(tmp_path / "maps", images, output, "--tile-size", 64, "--overlap", 12)
    whole, found, photo = (
        np.asarray(labels),
        np.zeros_like(np.asarray(labels)),
        np.asarray(Image.open(images / "large.png")),
    )
    tiles = sorted((output / "labels").iterdir())
    assert len(tiles) == 2 * 4 and sorted(x.name for x in (output / "images").iterdir()) == [x.name for x in tiles]
    for path in tiles:
        top, left = map(int, path.stem.split("_")[-2:])
        tile = Image.open(path)
        assert tile.mode == labels.mode and tile.getpalette() == labels.getpalette()
        found[top : top + 64, left : left + 64] = np.asarray(tile)
        image = np.asarray(Image.open(output / "images" / path.name))
        assert (image == photo[top : top + 64, left : left + 64]).all()
    assert (found == whole).all()


def test_panoptic_pngs_are_cut_with_their_images(tmp_path, capsys):
    """A square of 20 x 20 in four tiles without overlap: 6 x 8, 6 x 12, 14 x 8, 14 x 12; half of it is 200 pixels."""
    *_, images, output = write_dataset(tmp_path, [])
    ids = np.full(SIZE, 300, np.int64)
    ids[40:60, 77:97] = 70000
    ids[:10, :10] = 0
    save_png(np.dstack([ids % 256, ids // 256 % 256, ids // 65536]).astype(np.uint8), tmp_path / "pngs" / "large.png")
    kinds = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 8, "name": "rest", "isthing": 0}]
    segments = [{"id": 70000, "category_id": 7, "iscrowd": 0}, {"id": 300, "category_id": 8, "iscrowd": 0}]
    annotation = {"image_id": 1, "file_name": "large.png", "segments_info": segments}
    image = {"id": 1, "file_name": "large.png", "height": SIZE[0], "width": SIZE[1]}
    content = {"images": [image], "annotations": [annotation], "categories": kinds}
    json_file = tmp_path / "panoptic.json"
    json_file.write_text(json.dumps(content))
    words = json_file, images, output, "--tile-size", 85, "--overlap", 0
    with pytest.raises(ConfigError, match="its annotations are panoptic. Name the folder of their PNGs: --panoptic"):
        cut(*words)
    cut(*words, "--panoptic", tmp_path / "pngs", "--min-part", 0.4)
    cut_content, found, things = json.loads((output / "panoptic.json").read_text()), np.zeros(SIZE, np.int64), {}
    for image, annotation in zip(cut_content["images"], cut_content["annotations"], strict=True):
        top, left = image["top"], image["left"]
        tile = np.asarray(Image.open(output / "panoptic" / annotation["file_name"])).astype(np.int64) @ [1, 256, 65536]
        found[top : top + image["height"], left : left + image["width"]] = tile
        assert annotation["image_id"] == image["id"]
        for x in annotation["segments_info"]:
            assert x["area"] == (tile == x["id"]).sum()
            if x["category_id"] == 7:
                things[top, left] = x["bbox"], x["area"], x["iscrowd"]
            else:
                assert x["iscrowd"] == 0
    assert (found == ids).all()
    assert things == {
        (0, 0): ([77, 40, 8, 20], 160, 0),
        (0, 85): ([0, 40, 12, 20], 240, 0),
        (25, 0): ([77, 15, 8, 20], 160, 0),
        (25, 85): ([0, 15, 12, 20], 240, 0),
    }
    assert "4 tiles with 4 objects and 0 small parts" in capsys.readouterr().out


TILE_SETS = {
    "instance": ("coco_instance", "instances.json"),
    "panoptic": ("coco_panoptic", "panoptic.json"),
    "semantic": ("sem_seg", "semantic"),
}


@pytest.mark.parametrize("task", TILE_SETS)
def test_tiles_are_a_data_set(task, tmp_path):
    kind, annotations = TILE_SETS[task]
    source, tiles = tmp_path / "shapes", tmp_path / "tiles"
    write_shapes(str(source), 2, seed=5, size=128)
    panoptic = ["--panoptic", source / "panoptic"] if task == "panoptic" else []
    cut(source / annotations, source / "images", tiles, "--tile-size", 80, *panoptic)
    changes = {"labels": str(tiles / "labels")} if task == "semantic" else {}
    cfg = data_cfg(task, custom=(custom_entry(kind, str(tiles), **changes),))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    batch = next(iter(build_train_loader(cfg)))
    assert len(batch) == 4 and all(x["image"].shape == (3, 64, 64) for x in batch)
    truths = [x["ground_truth"] for x in batch]
    assert any(len(x.classes) for x in truths) == (task != "semantic")
    assert all((x.labels is None) == (task == "instance") for x in truths)


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Colours(nn.Module):
    """Stands for a model: every connected region of red is an object, all else one stuff class."""

    def __init__(self, output):
        super().__init__()
        self.output, self.sizes = output, []

    def forward(self, batched_inputs):
        return [self._predict(x["image"]) for x in batched_inputs]

    def _predict(self, image):
        self.sizes.append(tuple(image.shape[1:]))
        regions, count = ndimage.label(image[0].numpy() > 128)
        if self.output == "sem_seg":
            return {"sem_seg": torch.from_numpy(np.stack([regions > 0, regions == 0])).float()}
        if self.output == "panoptic_seg":
            kinds = [{"id": i, "isthing": True, "category_id": 0, "score": 0.9} for i in range(1, count + 1)]
            ids = torch.from_numpy(np.where(regions, regions, count + 1))
            return {
                "panoptic_seg": (ids, [*kinds, {"id": count + 1, "isthing": False, "category_id": 1, "score": 1.0}])
            }
        masks = torch.from_numpy(regions == np.arange(1, count + 1)[:, None, None])
        found = Instances(regions.shape, pred_masks=masks, pred_boxes=Boxes(torch.zeros(count, 4)))
        found.scores, found.pred_classes = torch.full((count,), 0.9), torch.zeros(count, dtype=torch.int64)
        return {"instances": found}


BARS = [mask_of(10 * i + 2, 5, 6, 160) for i in range(9)] + [mask_of(95, 20, 10, 20), mask_of(95, 60, 10, 9)]


def entries(folder):
    """A data set of each task with long bars, each through several tiles."""
    write_dataset(folder, [record_of(mask, i) for i, mask in enumerate(BARS, 1)])
    red, ids = np.any(BARS, axis=0), np.zeros(SIZE, np.uint8)
    Image.fromarray(np.stack([red * 255] * 3, axis=2).astype(np.uint8)).save(folder / "images" / "large.png")
    for number, mask in enumerate([*BARS, ~red], 1):
        ids[mask] = number
    for name, pixels in (("semantic", np.where(red, 0, 1)), ("panoptic", np.stack([ids, 0 * ids, 0 * ids], axis=2))):
        (folder / name).mkdir()
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / "large.png")
    segments = [{"id": i, "category_id": 7 if i <= len(BARS) else 8, "iscrowd": 0} for i in range(1, len(BARS) + 2)]
    content = json.loads((folder / "instances.json").read_text())
    kinds = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 8, "name": "rest", "isthing": 0}]
    annotation = {"image_id": 1, "file_name": "large.png", "segments_info": segments}
    content = {"images": content["images"], "annotations": [annotation], "categories": kinds}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return {
        "instance": custom_entry("coco_instance", str(folder)),
        "panoptic": custom_entry("coco_panoptic", str(folder)),
        "semantic": custom_entry("sem_seg", str(folder), classes=["cell", "rest"]),
    }


METRICS = {
    "instance": ("instances", "segm", "AP"),
    "panoptic": ("panoptic_seg", "panoptic_seg", "PQ"),
    "semantic": ("sem_seg", "sem_seg", "mIoU"),
}


@pytest.mark.parametrize("task", METRICS)
def test_whole_images_are_evaluated_in_tiles(task, tmp_path):
    """Objects are longer than a tile; without joining them the metrics would be low."""
    output, kind, metric = METRICS[task]
    cfg = data_cfg(task, custom=(entries(tmp_path)[task],))
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path / "out"), cfg.DATASETS.TRAIN
    cfg.INPUT.MIN_SIZE_TEST = 0  # tiles keep their size
    cfg.TEST.TILES.SIZE, cfg.TEST.DETECTIONS_PER_IMAGE = 64, 12
    model = Colours(output).eval()
    results = Trainer.test(cfg, model)
    assert set(model.sizes) == {(64, 64)} and len(model.sizes) == 2 * 4
    assert results[kind][metric] == pytest.approx(100)


@pytest.mark.parametrize("task", METRICS)
def test_an_object_in_four_tiles_is_one_segment(task, tmp_path):
    """Tiles of 64 with 16 in common give rows up to 55 and columns 49 to 85, where the square's corner tiles meet."""
    cfg = data_cfg(task, custom=(entries(tmp_path)[task],))
    cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.TILES.SIZE, cfg.TEST.DETECTIONS_PER_IMAGE = 0, 64, 12
    square, lone = mask_of(48, 78, 14, 14), mask_of(5, 5, 10, 10)
    image = torch.from_numpy(np.stack([(square | lone) * np.uint8(255)] * 3))
    sample = {"image": image, "height": SIZE[0], "width": SIZE[1]}
    output = METRICS[task][0]
    model = Colours(output).eval()
    (whole,), (tiled,) = model([sample]), TiledKNet(with_classes(cfg), model)([sample])
    assert len(model.sizes) == 1 + 2 * 4
    if task == "semantic":
        assert (tiled[output] == whole[output].argmax(0)).all()
        return
    if task == "panoptic":
        segment_map, segments = tiled[output]
        masks = [(segment_map == x["id"]).numpy() for x in segments if x["isthing"]]
        assert ((segment_map == next(x["id"] for x in segments if not x["isthing"])).numpy() == ~(square | lone)).all()
    else:
        masks = [mask_util.decode(rle).astype(bool) for rle in tiled[output].rles]
    assert sorted(mask.sum() for mask in masks) == [100, 196]
    assert all((mask == (square if mask.sum() == 196 else lone)).all() for mask in masks)


def test_tiles_are_resized_as_images_are(tmp_path):
    cfg = data_cfg("instance", custom=(entries(tmp_path)["instance"],))
    cfg.DATASETS.TEST, cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.TILES.SIZE = cfg.DATASETS.TRAIN, 0, 64
    (sample,) = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    cfg.INPUT.MIN_SIZE_TEST = 96
    model = Colours("instances").eval()
    TiledKNet(cfg, model)([sample])
    assert set(model.sizes) == {(96, 96)}


class AlsoInstances(Colours):
    def _predict(self, image):
        return {**super()._predict(image), **Colours("instances")._predict(image)}


def test_a_tile_is_computed_once_for_all_outputs(tmp_path):
    cfg = data_cfg("panoptic", custom=(entries(tmp_path)["panoptic"],))
    cfg.DATASETS.TEST, cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.TILES.SIZE = cfg.DATASETS.TRAIN, 0, 64
    (sample,) = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    model = AlsoInstances("panoptic_seg").eval()
    (both,) = TiledKNet(cfg, model)([sample])
    assert list(both) == ["panoptic_seg", "instances"] and len(model.sizes) == 2 * 4
    for output, found in both.items():
        (alone,) = TiledKNet(cfg, Colours(output).eval())([sample])
        if output == "instances":
            assert found.rles == alone[output].rles and len(found) == len(BARS)
        else:
            assert torch.equal(found[0], alone[output][0]) and found[1] == alone[output][1]


def test_options_that_make_no_sense(tmp_path, monkeypatch):
    cfg = data_cfg("instance", custom=(entries(tmp_path)["instance"],))
    cfg.TEST.TILES.SIZE, cfg.TEST.TILES.OVERLAP = 64, 64
    with pytest.raises(ConfigError, match="TEST.TILES.OVERLAP = 64: use 1 to 63"):
        TiledKNet(cfg, Colours("instances"))
    cfg.TEST.TILES.SIZE = -8
    with pytest.raises(ConfigError, match="TEST.TILES.SIZE = -8: use 0 .whole images., or at least 4"):
        TiledKNet(cfg, Colours("instances"))
    cfg.TEST.TILES.SIZE = 64
    monkeypatch.setattr(build, "_TILED", ())
    with pytest.raises(ConfigError, match="TEST.TILES.SIZE = 64: .*'coco' can't be evaluated in tiles"):
        build_evaluators(cfg, cfg.DATASETS.TRAIN[0])


# ---- more objects than kernels ---------------------------------------------------------------------------------------


def _with_kernels(task, number):
    cfg = get_knet_cfg()
    cfg.MODEL.KNET.TASK, cfg.MODEL.KNET.NUM_KERNELS = task, number
    return cfg


def test_crowded_images_are_counted_before_training(caplog):
    objects = [{"iscrowd": 0}] * 5 + [{"iscrowd": 1}] * 9
    segments = [{"isthing": True}] * 6 + [{"isthing": False}] * 9
    records = [
        {"file_name": "a.png", "annotations": objects},
        {"file_name": "b.png", "segments_info": segments},
        {"file_name": "c.png", "annotations": []},
    ]
    with caplog.at_level(logging.WARNING):
        for task, num_kernels in (("panoptic", 6), ("semantic", 4)):
            warn_of_crowded_images(records, _with_kernels(task, num_kernels))
        assert not caplog.messages
        warn_of_crowded_images(records, _with_kernels("panoptic", 4))
    (message,) = caplog.messages
    assert "NUM_KERNELS = 4: 2 of 3 training images have more objects (b.png has 6)" in message


def test_training_starts_with_that_warning(tmp_path, caplog):
    cfg = data_cfg("instance", custom=(entries(tmp_path)["instance"],))
    for num_kernels, expected in ((len(BARS), 0), (len(BARS) - 1, 1)):
        caplog.clear()
        cfg.MODEL.KNET.NUM_KERNELS = num_kernels
        build_train_loader(cfg)
        assert sum("have more objects" in x for x in caplog.messages) == expected
