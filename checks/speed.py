"""Compare the speed of this code with that of another checkout, in turns in one process.

    python -m checks.speed ../knet_d2_before --rounds 15 --size 480x640

Both packages build the same models with the same weights, and get the same images in evaluation and in training
(forward and backward). This prints the median over the rounds of the ratio of times (this / the other) with a 95 %
bootstrap interval, and the number of operators that each calls.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import BitMasks, Instances
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("coco/instance/knet_r50_fpn_1x.yaml", "coco/panoptic/knet_r50_fpn_1x.yaml")
DETECTRON2_DATASETS = frozenset(DatasetCatalog.list())
COUNTS = ["MODEL.KNET.NUM_THING_CLASSES", "80", "MODEL.KNET.NUM_STUFF_CLASSES", "53"]


class Counter(TorchDispatchMode):
    """Counts the calls of PyTorch operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def load_package(folder: Path) -> Callable[[str, list[str]], Any]:
    """Import knet_d2 from a folder instead of the imported one; returns its function that builds a model."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "knet_d2"]:
        del sys.modules[name]
    for registry in (META_ARCH_REGISTRY, BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY):
        for name, value in list(registry):
            if value.__module__.startswith("knet_d2"):
                del registry._obj_map[name]
    for name in set(DatasetCatalog.list()) - DETECTRON2_DATASETS:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    sys.path.insert(0, str(folder))
    try:
        engine = importlib.import_module("knet_d2.engine")
        assert Path(engine.__file__).is_relative_to(folder), f"{folder} has no knet_d2"
    finally:
        sys.path.remove(str(folder))

    def build(config: str, opts: list[str]) -> Any:
        return engine.Trainer.build_model(engine.load_config(str(folder / "configs" / config), opts))

    return build


def make_batch(size: tuple[int, int], count: int = 10) -> list[dict[str, Any]]:
    """Make a batch of one image with rectangles as instances on bands of stuff."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for i in range(count):
        top, left = (int(torch.randint(length * 3 // 4, (), generator=generator)) for length in size)
        masks[i, top : top + height // 4, left : left + width // 4] = True
    instances = Instances(size, gt_classes=torch.arange(count), gt_masks=BitMasks(masks))
    labels = (80 + torch.arange(height) * 53 // height)[:, None].expand(size).contiguous()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    return [{"image": image, "instances": instances, "sem_seg": labels}]


def run_once(model: Any, batch: list[dict[str, Any]], training: bool) -> None:
    model.train(training)
    if training:
        model.zero_grad()
        sum(model(batch).values()).backward()
    else:
        with torch.no_grad():
            model(batch)


def compare(models: list[Any], batch: list[dict[str, Any]], training: bool, rounds: int) -> list[Any]:
    """Measure two models; returns columns of the table: seconds of both, ratio, interval, operators of both."""
    operators = []
    for model in models:
        with Counter() as counter:
            run_once(model, batch, training)
        operators.append(counter.count)
    seconds = np.zeros((rounds, 2))
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            run_once(models[which], batch, training)
            seconds[number, which] = time.perf_counter() - start
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.random.default_rng(0).choice(ratios, (10_000, rounds))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    medians = np.median(seconds, axis=0)
    return [*medians, np.median(ratios), f"{low:.3f} .. {high:.3f}", *operators]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="480x640", help="size of the image, HxW")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="paths below configs/")
    return parser


def main(args: argparse.Namespace) -> None:
    folders = [folder.resolve() for folder in (args.other, ROOT)]
    height, width = (int(number) for number in args.size.split("x"))
    batch, rows = make_batch((height, width)), []
    for config in args.configs:
        counts = COUNTS if "panoptic" in config else COUNTS[:2]
        opts = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *counts]
        torch.manual_seed(0)
        # Each is built before the other package replaces its architecture in Detectron2's registries
        models = [load_package(folder)(config, opts) for folder in folders]
        assert type(models[0]) is not type(models[1])
        models[1].load_state_dict(models[0].state_dict())
        for training in (False, True):
            rows.append([config, "training" if training else "inference"])
            rows[-1] += compare(models, batch, training, args.rounds)
            headers = ["model", "mode", "other [s]", "this [s]", "ratio", "95 % interval", "operators, other", "this"]
            print(tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f"), flush=True)


if __name__ == "__main__":
    main(get_parser().parse_args())
