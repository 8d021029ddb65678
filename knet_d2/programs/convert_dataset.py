"""Convert annotations of a label tool to a COCO instances JSON.

    python tools/convert_dataset.py yolo_seg coco.json images=photos/images labels=photos/labels classes=data.yaml

The types and their keys are those of DATASETS.CUSTOM; see docs/DATASETS.md. File names in the JSON are relative to the
folder of the images.
"""

import argparse
import json

import yaml

from ..data.coco_mending import for_other_programs, log_mends
from ..data.custom import checked_entry
from ..data.formats import READERS, read_annotations
from ..errors import ConfigError


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", choices=READERS, help="type of the annotations")
    parser.add_argument("output", metavar="JSON", help="file to write")
    parser.add_argument("keys", nargs="+", metavar="KEY=VALUE", help="keys of the type; lists as [a, b]")
    return parser


def main(args: argparse.Namespace) -> None:
    entry = {"name": "data", "type": args.type}
    for word in args.keys:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"{word}: write it as KEY=VALUE.")
        entry[key] = yaml.safe_load(value)
    entry = checked_entry(entry, "The command line")
    annotations = read_annotations(entry)
    source = READERS[args.type].source(entry)
    content = annotations.checked(source)
    log_mends(source, annotations.notes)
    with open(args.output, "w", encoding="utf-8") as f:
        json.dump(for_other_programs(content), f)
    counts = ", ".join(f"{len(content[key])} {key}" for key in ("images", "annotations", "categories"))
    print(f"Wrote {args.output}: {counts}")
