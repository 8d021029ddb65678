"""Check the data sets of a config before training: find faults in their files, and count objects by class and size.

    python tools/check_dataset.py --config-file my_config.yaml --output check

This writes sample images with their ground truth (check/NAME.jpg for each data set) and all faults
(check/report.json). The exit code is 1 if training or evaluation would fail or be wrong.
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
from ..data.files import read_picture
from ..data.pixels import PixelFormat
from ..errors import KNetError
from ..results.comparison import ground_truth, spread
from ..results.pictures import picture_sheet


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the pictures and report.json")
    parser.add_argument("--number", type=int, default=12, help="number of images to draw for each data set")
    parser.add_argument("--columns", type=int, default=4, help="number of images side by side")
    parser.add_argument("--most", type=int, default=10, help="largest number of faults of one kind to print")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def draw_ground_truth(cfg: CfgNode, name: str, number: int, columns: int, faults: list[Fault]) -> np.ndarray | None:
    """Draw evenly spaced images of a data set with their ground truth on one sheet; None if none can be drawn.

    Args:
        cfg: the config, with its classes resolved.
        name: name of the data set.
        number: number of images.
        columns: number of images side by side.
        faults: gets a fault for each image that can't be read for training.
    """
    pictures = []
    for record in spread(load_dataset(name), number):
        path = record["file_name"]
        try:
            pictures.append(ground_truth(cfg, record).draw(read_picture(path, PixelFormat.from_config(cfg))))
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
