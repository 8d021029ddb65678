"""Convert annotations of a label tool to a COCO instances JSON; or instances to a COCO panoptic data set.

    %(prog)s yolo_seg coco.json images=photos/images labels=photos/labels classes=data.yaml
    %(prog)s coco_instance panoptic.json json=coco.json images=photos --panoptic pngs
    %(prog)s coco_instance objects.json json=coco.json images=photos --one-class object

With --panoptic, pixels without an object are of the stuff class that --rest names. The types and their keys are those
of DATASETS.CUSTOM; see knet docs DATASETS. File names in the JSON are relative to the folder of the images.
"""

import argparse
import os
from typing import Any

import yaml

from ..data.coco_json import read_coco_json
from ..data.coco_mending import for_other_programs, log_mends
from ..data.custom import checked_entry
from ..data.files import refuse_to_replace, write_json
from ..data.formats import READERS, read_annotations
from ..data.panoptic_writer import write_panoptic
from ..errors import ConfigError

COCO = "coco_instance"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", choices=[*READERS, COCO], help="type of the annotations")
    parser.add_argument("output", metavar="JSON", help="file to write")
    parser.add_argument("keys", nargs="+", metavar="KEY=VALUE", help="keys of the type; lists as [a, b]")
    parser.add_argument("--panoptic", metavar="FOLDER", help="write a panoptic JSON, and PNGs into this folder")
    parser.add_argument(
        "--rest", metavar="NAME", default="rest", help='stuff class of all other pixels; default: "rest"'
    )
    parser.add_argument("--one-class", metavar="NAME", help="give all objects this class instead of their own")
    return parser


def of_one_class(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The same objects, all of one class: for models that find objects whatever they are."""
    annotations = [{**annotation, "category_id": 1} for annotation in content["annotations"]]
    return {**content, "annotations": annotations, "categories": [{"id": 1, "name": name}]}


def read_content(entry: dict[str, Any]) -> dict[str, Any]:
    """The content of a COCO instances JSON with the annotations of an entry of DATASETS.CUSTOM."""
    if entry["type"] == COCO:
        return read_coco_json(entry["json"], entry["images"])
    annotations = read_annotations(entry)
    source = READERS[entry["type"]].source(entry)
    content = annotations.checked(source)
    log_mends(source, annotations.notes)
    return content


def files_of(entry: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """The images and the annotation files of an entry of DATASETS.CUSTOM."""
    reader = READERS.get(entry["type"])
    source, root = (reader.source(entry), reader.images(entry)) if reader else (entry["json"], entry["images"])
    annotations = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    return [source, *annotations, *(os.path.join(root, image["file_name"]) for image in content["images"])]


def main(args: argparse.Namespace) -> None:
    entry = {"name": "data", "type": args.type}
    for word in args.keys:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"{word}: write it as KEY=VALUE.")
        entry[key] = yaml.safe_load(value)
    entry = checked_entry(entry, "The command line")
    content = read_content(entry)
    inputs = files_of(entry, content)
    refuse_to_replace(inputs, [args.output], args.output)
    if args.one_class:
        content = of_one_class(content, args.one_class)
    if args.panoptic:
        write_panoptic(content, args.output, args.panoptic, args.rest, inputs)
    else:
        write_json(args.output, for_other_programs(content))
    counts = ", ".join(f"{len(content[key])} {key}" for key in ("images", "annotations", "categories"))
    print(f"Wrote {args.output}: {counts}")
