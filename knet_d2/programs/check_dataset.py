"""Check the data sets of a config before training: counts by class and size, and everything that is wrong.

    python tools/check_dataset.py --config-file my_config.yaml --output check

writes ground truth drawn over sample images (OUTPUT/NAME.jpg for each data set) and all faults (OUTPUT/report.json).
The exit code is 1 if training or evaluation would fail or be wrong.
"""

import argparse
import json
import os

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from ..config import get_knet_cfg
from ..config.merging import merge_config
from ..data import load_dataset, register_custom_datasets, resolve_classes
from ..data.check import Fault, check_datasets
from ..data.files import read_image
from ..errors import KNetError
from ..results.comparison import ground_truth, spread
from ..results.pictures import picture_sheet


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--output", metavar="FOLDER", help="where pictures and report.json are written")
    parser.add_argument("--number", type=int, default=12, help="images to draw of each data set")
    parser.add_argument("--columns", type=int, default=4, help="images side by side")
    parser.add_argument("--most", type=int, default=10, help="faults of one kind that are printed")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def draw_ground_truth(cfg: CfgNode, name: str, number: int, columns: int, faults: list[Fault]) -> np.ndarray | None:
    """A sheet of images with their ground truth, evenly spread over a data set; None where none can be drawn.

    What keeps an image from being read for training is added to ``faults``.
    """
    pictures = []
    for record in spread(load_dataset(name), number):
        path = record["file_name"]
        try:
            pictures.append(ground_truth(cfg, record).draw(read_image(path, "RGB")))
        except KNetError as error:
            faults.append(Fault("unusable", path, "", str(error)))
    return picture_sheet(pictures, columns, f"{name}: ground truth") if pictures else None


def main(args: argparse.Namespace) -> int:
    cfg = get_knet_cfg()
    merge_config(cfg, args.config_file, args.opts)
    register_custom_datasets(cfg)
    report = check_datasets(cfg)
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        sheets = []
        if not report.failed:
            resolve_classes(cfg)
            for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
                sheet = draw_ground_truth(cfg, name, args.number, args.columns, report.faults)
                if sheet is not None:
                    sheets.append(os.path.join(args.output, f"{name}.jpg"))
                    Image.fromarray(sheet).save(sheets[-1])
        with open(os.path.join(args.output, "report.json"), "w") as f:
            json.dump(report.as_json(), f, indent=1)
    print(report.text(args.most))
    if args.output:
        print(f"Wrote {', '.join([*sheets, os.path.join(args.output, 'report.json')])}")
    return int(report.failed)
