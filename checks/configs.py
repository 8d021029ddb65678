"""Build each model of the zoo, and run one training step and one prediction with it, on small random images.

python -m checks.configs                                         # all models, on the CPU
python -m checks.configs coco/panoptic/knet_swin_l_fpn_3x.yaml   # these models
"""

import argparse
import sys
import time
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from knet_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from knet_d2.programs import run

from .references.cases import ROOT, zoo_config

IMAGE_SIZES = ((64, 96), (64, 64))
OBJECT = (slice(8, 40), slice(16, 48))


def zoo_config_files() -> list[str]:
    """Return the paths of the configs of the zoo, relative to configs/; the modern recipes are not published models."""
    paths = (path for path in (ROOT / "configs").glob("*/*/knet_*.yaml") if not path.stem.endswith("_modern"))
    return sorted(str(path.relative_to(ROOT / "configs")) for path in paths)


def random_example(size, bank, seed: int) -> dict[str, Any]:
    """Make an image with a rectangle of class 0 (object or region) on a region of the last class."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(1, *size, dtype=torch.bool)
    masks[0][OBJECT] = True
    labels = torch.full(size, bank.num_classes - 1).masked_fill(masks[0], 0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    instances = Instances(size, gt_classes=torch.zeros(1, dtype=torch.int64), gt_masks=BitMasks(masks))
    return {"image": image, "instances": instances, "sem_seg": labels}


def train_and_predict(cfg: CfgNode) -> dict[str, Any]:
    """Run one optimiser step on a batch, then one prediction.

    Returns:
        "losses": losses of the step; "changed": number of trainable tensors that the step changed; "trained": number
        of trainable tensors; "parameters": number of parameters; "result": result for the first image.
    """
    model = build_model(cfg).train()
    batch = [random_example(size, model.bank, seed) for seed, size in enumerate(IMAGE_SIZES)]
    optimizer, clip_gradients = build_optimizer(cfg, model), build_gradient_clipper(cfg)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [float(parameter.detach().double().sum()) for parameter in trained]
    losses = model(batch)
    sum(losses.values()).backward()
    clip_gradients(trained)
    optimizer.step()
    changed = sum(float(p.detach().double().sum()) != before for p, before in zip(trained, sums))
    with torch.no_grad():
        result = model.eval()([{"image": batch[0]["image"], "height": 48, "width": 72}])[0]
    return {
        "losses": {name: float(value) for name, value in losses.items()},
        "changed": changed,
        "trained": len(trained),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "result": result,
    }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="paths below configs/")
    parser.add_argument("--device", default="cpu")
    return parser


def main(args: argparse.Namespace) -> int:
    failures = 0
    for path in args.configs or zoo_config_files():
        torch.manual_seed(0)
        start = time.perf_counter()
        outcome = train_and_predict(zoo_config(path, args.device))
        total = sum(outcome["losses"].values())
        failures += not total < float("inf")
        print(
            f"{path:50s} {outcome['parameters'] / 1e6:7.2f} M parameters, loss {total:8.3f}, "
            f"{outcome['changed']} of {outcome['trained']} tensors changed, gives {list(outcome['result'])}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
