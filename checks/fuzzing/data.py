"""Fuzzing of annotations, panoptic PNGs, label maps and images."""

import io
import itertools
import json
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.structures import Boxes, Instances
from PIL import Image

from knet_d2.config import get_knet_cfg
from knet_d2.data import build_test_loader, build_train_loader, load_dataset, register_custom_datasets, resolve_classes
from knet_d2.data.build import MappedDataset
from knet_d2.data.check import check_datasets
from knet_d2.data.files import read_image, read_labels, read_panoptic
from knet_d2.data.mapper import build_mapper
from knet_d2.errors import KNetError
from knet_d2.evaluation import PanopticEvaluator, build_evaluators

from .mutations import mutate_bytes, mutate_png, mutate_tree

SIZE = 16
CATEGORIES = [{"id": 3 * i + 1, "name": name, "isthing": int(i < 2)} for i, name in enumerate("abcd")]

Reached = Callable[[], None]


def default_config() -> CfgNode:
    cfg = get_knet_cfg()
    return cfg


class Files:
    """A valid data set of two images in every format."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        for name in ("images", "panoptic", "labels"):
            os.makedirs(os.path.join(folder, name))
        pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
        self.ids = np.zeros((SIZE, SIZE), np.int64)
        self.ids[:, 8:], self.ids[2:8, 2:8], self.ids[10:, :5] = 7, 300, 70000
        for i in range(2):
            Image.fromarray(pixels[i]).save(self.path("images", f"{i}.png"))
            rgb = np.stack([self.ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(self.path("panoptic", f"{i}.png"))
            Image.fromarray((self.ids % 4).astype(np.uint8)).save(self.path("labels", f"{i}.png"))
        self.pixels = pixels

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def images(self) -> list[dict[str, Any]]:
        return [{"id": 5 * i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(2)]

    def instances(self) -> dict[str, Any]:
        """Return an instances JSON with polygons, both kinds of RLE and a crowd."""
        mask = np.asfortranarray((self.ids == 300).astype(np.uint8))
        rle = mask_util.encode(mask)
        runs = [len(list(group)) for _, group in itertools.groupby(mask.reshape(-1, order="F"))]
        forms = [
            [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0], [1, 1, 3, 1, 3, 4, 1, 4]],
            {"size": rle["size"], "counts": rle["counts"].decode()},
            {"size": [SIZE, SIZE], "counts": runs},
        ]
        annotations = [
            {"id": 10 * i + j, "image_id": 5 * i, "category_id": 1 + 3 * (j % 2), "bbox": [2.0, 2.0, 6.0, 6.0]}
            | {"area": 36.0, "iscrowd": int(i == j == 1), "segmentation": form}
            for i in range(2)
            for j, form in enumerate(forms)
        ]
        return {"images": self.images(), "annotations": annotations, "categories": CATEGORIES[:2]}

    def panoptic(self) -> dict[str, Any]:
        segments = [
            {"id": id_, "category_id": category, "iscrowd": crowd, "area": int((self.ids == id_).sum())}
            for id_, category, crowd in ((7, 7, 0), (300, 1, 0), (70000, 4, 1))
        ]
        annotations = [{"image_id": 5 * i, "file_name": f"{i}.png", "segments_info": segments} for i in range(2)]
        return {"images": self.images(), "annotations": annotations, "categories": CATEGORIES}

    def config(self, task: str, name: str, kind: str, **entry: Any) -> CfgNode:
        """Return a config whose loader has no worker processes and one batch of both images; registers the data set."""
        cfg = default_config()
        cfg.MODEL.KNET.TASK = task
        cfg.DATASETS.CUSTOM = [{"name": name, "type": kind, "images": self.path("images"), **entry}]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (SIZE,), SIZE
        cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, cfg.SEED = 2, 0, 1
        register_custom_datasets(cfg)
        return cfg


class Annotations:
    """Reads JSONs of COCO instances and COCO panoptic: for training, in evaluation, and by the check of data sets."""

    may_take_memory = False

    def __init__(self, folder: str) -> None:
        self._files = Files(folder)
        self._number = itertools.count()
        self._json = self._files.path("annotations.json")

    def make(self, draw: random.Random) -> None:
        self._kind = draw.choice(("coco_instance", "coco_panoptic"))
        valid = self._files.instances() if self._kind == "coco_instance" else self._files.panoptic()
        form = draw.random()
        if form < 0.02:
            text = "[" * (depth := draw.choice((50, 5000, 200_000))) + "]" * depth if form < 0.01 else "{" * 100_000
        else:
            text = json.dumps(mutate_tree(valid, draw, draw.choice((1, 1, 1, 2))) if form < 0.85 else valid)
        content = text.encode()
        with open(self._json, "wb") as f:
            f.write(content if form < 0.85 else mutate_bytes(content, draw))

    def use(self, draw: random.Random, reached: Reached) -> None:
        name = f"fuzz_{next(self._number)}"
        if self._kind == "coco_instance":
            cfg = self._files.config("instance", name, self._kind, json=self._json)
        else:
            entry = {"panoptic_json": self._json, "panoptic_root": self._files.path("panoptic")}
            cfg = self._files.config(draw.choice(("instance", "panoptic")), name, self._kind, **entry)
        if draw.random() < 0.2:
            check_datasets(cfg.clone())
        resolve_classes(cfg)
        loader = build_train_loader(cfg)
        reached()
        if draw.random() < 0.3:
            cfg.MODEL.KNET.TEST.OUTPUTS = ["panoptic_seg" if "panoptic" in self._kind else "instances"]
            cfg.MODEL.KNET.TASK = "panoptic" if "panoptic" in self._kind else "instance"
            evaluators = DatasetEvaluators(build_evaluators(cfg, name, self._files.folder))
            inference_on_dataset(_predict_something, build_test_loader(cfg, name), evaluators)
        next(iter(loader))


def _predict_something(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    masks = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    masks[:, 2:9, 2:9] = True
    fields = {"scores": torch.ones(1), "pred_classes": torch.zeros(1, dtype=torch.int64), "pred_masks": masks}
    instances = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.tensor([[2.0, 2.0, 9.0, 9.0]])), **fields)
    info = [{"id": 1, "isthing": True, "category_id": 0}]
    return [{"instances": instances, "panoptic_seg": (masks[0].to(torch.int32), info)}]


class PanopticPngs:
    """Reads panoptic PNGs and label maps for training, and panoptic PNGs also in evaluation."""

    may_take_memory = False

    def __init__(self, folder: str) -> None:
        self._files = files = Files(folder)
        with open(files.path("panoptic.json"), "w") as f:
            json.dump(files.panoptic(), f)
        panoptic = {"panoptic_json": files.path("panoptic.json"), "panoptic_root": files.path("panoptic")}
        labels = {"labels": files.path("labels"), "classes": list("abcd")}
        self._datasets = {}
        for task, kind, entry in (("panoptic", "coco_panoptic", panoptic), ("semantic", "sem_seg", labels)):
            cfg = files.config(task, f"fuzz_{kind}", kind, **entry)
            resolve_classes(cfg)
            records = load_dataset(f"fuzz_{kind}")
            self._datasets[task] = MappedDataset(records, build_mapper(cfg, is_train=True), seed=0)
        self._paths = {"panoptic": files.path("panoptic", "0.png"), "semantic": files.path("labels", "0.png")}
        self._images = {task: np.array(Image.open(path)) for task, path in self._paths.items()}

    def make(self, draw: random.Random) -> None:
        self._task = draw.choice(("panoptic", "semantic"))
        array, path = self._images[self._task].copy(), self._paths[self._task]
        for _ in range(draw.choice((0, 0, 1, 3))):
            y, x = draw.randrange(SIZE), draw.randrange(SIZE)
            array[y : y + draw.choice((1, 9)), x : x + 9] = draw.choice((0, 1, 3, 7, 255))
        if draw.random() < 0.1:
            array = array[: draw.randrange(1, SIZE + 1), : draw.randrange(1, SIZE + 1)]
        image = Image.fromarray(array)
        if draw.random() < 0.2:
            image = image.convert(draw.choice(("L", "P", "RGBA", "LA", "1", "I;16", "RGB")))
        image.save(path)
        with open(path, "rb") as f:
            content = f.read()
        form = draw.random()
        with open(path, "wb") as f:
            f.write(content if form < 0.3 else mutate_png(content, draw) if form < 0.8 else mutate_bytes(content, draw))

    def use(self, draw: random.Random, reached: Reached) -> None:
        path = self._paths[self._task]
        (read_panoptic if self._task == "panoptic" else read_labels)(path, "0.png", (SIZE, SIZE))
        reached()
        if self._task == "panoptic" and draw.random() < 0.2:
            evaluator = PanopticEvaluator("fuzz_coco_panoptic")
            MetadataCatalog.get("fuzz_coco_panoptic").image_ids = [0]
            evaluator.reset()
            evaluator.process([{"file_name": "0.png", "image_id": 0}], _predict_something([]))
            evaluator.evaluate()
        example = self._datasets[self._task][0]
        if isinstance(example, KNetError):
            raise example


class Images:
    """Reads images of all types for training and prediction."""

    may_take_memory = False

    def __init__(self, folder: str) -> None:
        files = Files(folder)
        pixels, self._valid = files.pixels[0], []
        photo, deep = Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        for image, suffix, options in (
            (photo, "jpg", {"quality": 90, "exif": _exif()}),
            (photo, "png", {}),
            (photo, "bmp", {}),
            (photo, "gif", {}),
            (photo, "tif", {"compression": "tiff_lzw"}),
            (photo, "tiff", {}),
            (photo, "webp", {}),
            (photo, "ppm", {}),
            (deep, "png", {}),
            (deep, "tif", {"compression": "tiff_adobe_deflate"}),
            (deep, "tif", {"save_all": True, "append_images": [deep, deep]}),
            (Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255), "tif", {}),
        ):
            stream = io.BytesIO()
            image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
            self._valid.append((suffix, stream.getvalue()))
        for array in (pixels, pixels[:, :, 0].astype(np.uint16), pixels.transpose(2, 0, 1).astype(np.float32) / 255):
            stream = io.BytesIO()
            np.save(stream, array)
            self._valid.append(("npy", stream.getvalue()))
        cfg = default_config()
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TRAIN = SIZE, (SIZE,)
        self._mapper = build_mapper(cfg, is_train=False)
        self._folder = folder

    def make(self, draw: random.Random) -> None:
        suffix, content = draw.choice(self._valid)
        content = mutate_png(content, draw) if suffix == "png" and draw.random() < 0.7 else mutate_bytes(content, draw)
        self._path = os.path.join(self._folder, f"image.{suffix}")
        with open(self._path, "wb") as f:
            f.write(content)

    def use(self, draw: random.Random, reached: Reached) -> None:
        read_image(self._path, "BGR")
        reached()
        record = {"file_name": self._path}
        if draw.random() < 0.5:
            record |= {"height": SIZE, "width": SIZE}
        (example,) = (self._mapper(record),)
        assert example["image"].shape[0] == 3


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    return exif
