"""Check the data sets of a config before training: find faults in their files, and count objects by class and size.

    %(prog)s --data my_photos
    %(prog)s --config-file my_config.yaml --output check

This writes sample images with their ground truth (NAME.jpg for each data set) and all faults (report.json) into the
folder --output. --draw draws the good images even if others have errors. --fix writes annotation files in COCO's
format, with everything corrected that training reads as it is meant, and without images that do not exist. The exit
code is 1 if training or evaluation would fail or be wrong; with --fix, if they would with the file that it wrote.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image

from ..config import get_knet_cfg
from ..config.merging import merge_config
from ..data import load_dataset, register_custom_datasets, resolve_classes
from ..data.check import Fault, Report, check_datasets
from ..data.check.faults import ERROR
from ..data.coco_json import parse_json, parse_present
from ..data.coco_mending import for_other_programs
from ..data.coco_records import readable_records
from ..data.files import read_picture, refuse_to_replace, write_json
from ..data.formats import Annotations
from ..data.pixels import PixelFormat
from ..data.split import load_part
from ..errors import ConfigError, DataError, KNetError
from ..results.comparison import ground_truth, spread
from ..results.pictures import picture_sheet
from .arguments import add_opts
from .own_data import add_data_arguments, use_data


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder for the pictures and report.json; with --data also for its config, default: output/NAME/check",
    )
    parser.add_argument(
        "--draw", action="store_true", help="with --output: draw the good images even if others have errors"
    )
    parser.add_argument(
        "--fix",
        metavar="JSON",
        help="write the annotations in COCO's format to this file, or for several annotation files to JSON_NAME.json",
    )
    parser.add_argument("--number", type=int, default=12, help="number of images to draw for each data set")
    parser.add_argument("--columns", type=int, default=4, help="number of images side by side")
    parser.add_argument("--most", type=int, default=10, help="largest number of faults of one kind to print")
    parser.add_argument("--config-file", metavar="FILE", help="config that names the data sets, instead of --data")
    add_opts(parser)
    return parser


def draw_ground_truth(cfg: CfgNode, name: str, number: int, columns: int, faults: list[Fault]) -> np.ndarray | None:
    """Draw evenly spaced images of a data set with their ground truth on one sheet; None if none can be drawn.

    Args:
        cfg: the config, with its classes resolved.
        name: name of the data set.
        number: number of images.
        columns: number of images side by side.
        faults: gets a fault for each image that can't be read for training, and has none yet.
    """
    pictures, reported = [], {fault.file for fault in faults if fault.level == ERROR}
    for record in spread(_drawable_records(name), number):
        path = record["file_name"]
        try:
            pictures.append(ground_truth(cfg, record).draw(read_picture(path, PixelFormat.from_config(cfg))))
        except KNetError as error:
            if path not in reported:
                faults.append(Fault("unusable", path, "", str(error)))
    return picture_sheet(pictures, columns, f"{name}: ground truth") if pictures else None


def _drawable_records(name: str) -> list[dict]:
    """Return the records of a data set; if it can't be read as a whole, those of the images that can be read alone."""
    try:
        return load_dataset(name)
    except DataError:
        metadata = MetadataCatalog.get(name)
        if metadata.get("read_annotations"):
            content, path = metadata.read_annotations().content, metadata.annotations
        elif metadata.get("json_file") and not metadata.get("panoptic_json"):
            content, path = parse_json(metadata.json_file, metadata.image_root)[0], metadata.json_file
        else:
            raise

        def readable() -> list[dict]:
            return readable_records(content, path, metadata.image_root, name)

        return load_part(readable, name) if metadata.get("part") else readable()


def draw_datasets(cfg: CfgNode, args: argparse.Namespace, report: Report) -> list[str]:
    """Draw the data sets into args.output; returns the paths of the pictures.

    A data set of which nothing can be drawn is left out: the report says what is wrong with it.
    """
    sheets = []
    names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    for name in names:
        with contextlib.suppress(KNetError):
            _drawable_records(name)  # sets the classes in the metadata, where the whole data set can't be read
    for name in names:
        try:
            resolve_classes(cfg)
            sheet = draw_ground_truth(cfg, name, args.number, args.columns, report.faults)
        except KNetError as error:
            print(f"{name} is not drawn: {error}")
            continue
        if sheet is not None:
            sheets.append(os.path.join(args.output, f"{name}.jpg"))
            Image.fromarray(sheet).save(sheets[-1])
    return sheets


def _converted(read: Callable[[], Annotations]) -> dict[str, Any]:
    return read().content


def _mended(path: str, image_root: str) -> dict[str, Any]:
    return parse_present(path, image_root)[0]


def write_fixed(cfg: CfgNode, target: str) -> list[str]:
    """Write the annotations of all data sets in COCO's format, mended; returns the paths of the files.

    Raises:
        ConfigError: no data set has annotations that can be read, or a file would replace one of them.
    """
    sources: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        metadata = MetadataCatalog.get(name)
        if metadata.get("read_annotations"):
            sources.setdefault(metadata.annotations, functools.partial(_converted, metadata.read_annotations))
        for path in (metadata.get("panoptic_json"), metadata.get("json_file")):
            if path and os.path.isfile(path):
                sources.setdefault(path, functools.partial(_mended, path, metadata.image_root))
    if not sources:
        raise ConfigError(f"--fix {target}: no data set has annotations that can be written in COCO's format.")
    stem, ending = os.path.splitext(target)
    names = [os.path.splitext(os.path.basename(path.rstrip(os.sep)))[0] for path in sources]
    targets = [target] if len(sources) == 1 else [f"{stem}_{i}_{name}{ending}" for i, name in enumerate(names)]
    refuse_to_replace(sources, targets, f"--fix {target}")
    for written, read in zip(targets, sources.values(), strict=True):
        write_json(written, for_other_programs(read()))
    return targets


def _way_out(report: Report, args: argparse.Namespace, fixed: list[str]) -> str:
    """Sentences, each on a line, on what helps with the errors of a report."""
    advice = []
    if fixed and not report.failed_when_fixed:
        advice.append(f"The errors above are not in {', '.join(fixed)}: name it in the place of the annotations.")
        if args.data:
            advice.append("--data takes it if it lies in the folder of the images.")
    elif not report.failed_when_fixed:
        advice.append("knet check --fix FILE.json writes annotations without these errors.")
    if args.output and not args.draw:
        advice.append("--draw draws the good images.")
    return "".join(f"{line}\n" for line in advice)


def main(args: argparse.Namespace) -> int:
    args.output = use_data(args, subfolder="check") or args.output  # a training run in output/NAME stays as it is
    if not args.config_file:
        raise ConfigError("Name what to check: --data FOLDER, or --config-file FILE.")
    cfg = get_knet_cfg()
    merge_config(cfg, args.config_file, args.opts)
    register_custom_datasets(cfg)
    report = check_datasets(cfg)
    written = []
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        if args.draw or not report.failed:
            written += draw_datasets(cfg, args, report)
        written.append(os.path.join(args.output, "report.json"))
        write_json(written[-1], report.as_json(), indent=1)
    print(report.text(args.most))
    fixed = write_fixed(cfg, args.fix) if args.fix else []
    if written or fixed:
        print(f"Wrote {', '.join([*written, *fixed])}")
    if report.failed:
        print(_way_out(report, args, fixed), end="")
    return int(report.failed_when_fixed if args.fix else report.failed)
