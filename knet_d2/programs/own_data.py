"""Own images by one option: --data finds the annotations in a folder and writes the config of a training run."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from ..config import get_knet_cfg
from ..config.files import get_config_file
from ..config.merging import merge_config
from ..data.coco_json import parse_present
from ..data.coco_mending import MISSING_IMAGE, for_other_programs
from ..data.custom import COMMON_KEYS
from ..data.discovery import Found, find_annotations
from ..data.files import refuse_to_replace, write_json
from ..data.formats import READERS, read_annotations
from ..errors import ConfigError
from ..tasks import TASKS

# Names of images in a message
_MOST_NAMED = 5


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data and the options that belong to it, but --output, which programs also have without --data."""
    parser.add_argument(
        "--data", metavar="PATH", help="own images: folder with their annotations, or an annotation file"
    )
    parser.add_argument("--task", choices=TASKS, help="of --data; default: what the annotations are for")
    parser.add_argument(
        "--names",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,NAME",
        help="of the classes of masks in --data, in the order of their values, as membrane,cell for 0 and 255; of "
        "objects without a class; or of COCO's categories, in the order of their ids",
    )
    parser.add_argument(
        "--leave-out-missing", action="store_true", help="of --data: leave out annotated images that do not exist"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="config file that --data starts from; default: by task and device"
    )


def use_data(args: argparse.Namespace, others: Sequence[str] = (), subfolder: str = "") -> str | None:
    """Find the data of --data, write the config of a training run and print it, and set args.config_file to it.

    Args:
        args: with the arguments of :func:`add_data_arguments`, config_file, output and opts.
        others: further arguments that need --data.
        subfolder: of output/NAME, where args.output is not given.

    Returns:
        The folder of the config; None without --data.

    Raises:
        ConfigError: arguments are given that do not go together.
        DataError: see :func:`find_annotations`.
    """
    if not args.data:
        given = next((x for x in ("task", "names", "leave_out_missing", "recipe", *others) if getattr(args, x)), None)
        if given:
            raise ConfigError(f"--{given.replace('_', '-')}: only training on --data has this option.")
        return None
    if args.config_file:
        raise ConfigError(f"--data {args.data} writes a config: leave out --config-file, or --data.")
    found = find_annotations(args.data, args.task, args.names)
    options = dict(zip(args.opts[0::2], args.opts[1::2]))
    recipe = args.recipe or choose_recipe(found.task, options.get("MODEL.DEVICE"))
    name = os.path.basename(os.path.abspath(args.data))
    if os.path.isfile(args.data):
        name = os.path.splitext(name)[0]
    folder = args.output or os.path.normpath(os.path.join("output", name, subfolder))
    if args.leave_out_missing:
        found = without_missing_images(found, folder)
    args.config_file = write_config(found, recipe, folder)
    args.opts += _warmup_of_shorter_run(args.config_file, options)
    print(f"Found {found.what}.\nWrote {args.config_file}:\n")
    with open(args.config_file, encoding="utf-8") as f:
        print(f.read())
    return folder


def without_missing_images(found: Found, folder: str) -> Found:
    """Write the annotations of the images that exist into ``folder``, in COCO's format, and name these instead.

    Raises:
        ConfigError: the annotations are not of objects, or would be replaced.
        DataError: there is something else that can't be read.
    """
    entries, missing = [], []
    for entry in found.entries:
        if entry["type"] in READERS:
            reader, read = READERS[entry["type"]], read_annotations(entry)
            content, root = read.without(MISSING_IMAGE).checked(reader.source(entry)), reader.images(entry)
            missing += [os.path.relpath(path, root) for path, _, what in read.errors if MISSING_IMAGE in what]
            kept: dict[str, Any] = {key: entry[key] for key in COMMON_KEYS if key in entry}
        elif entry["type"] == "coco_instance":
            root, kept = entry["images"], entry
            content, lost = parse_present(entry["json"], root)
            missing += lost
        else:
            raise ConfigError(f"--leave-out-missing: is for annotations of objects, and not for {found.what}.")
        path = os.path.join(folder, f"{entry['name']}.json")
        sources = [entry[key] for key in ("json", "annotations") if key in entry]
        refuse_to_replace(sources, [path], f"--output {folder}")
        os.makedirs(folder, exist_ok=True)
        write_json(path, for_other_programs(content))
        entries.append({**kept, "type": "coco_instance", "json": path, "images": root})
    named = ", ".join([*missing[:_MOST_NAMED], *["..."] * (len(missing) > _MOST_NAMED)])
    print(
        f"Left out {len(missing)} of the annotated images, which do not exist: {named}."
        if missing
        else "No image is missing."
    )
    return found._replace(entries=entries)


def _warmup_of_shorter_run(config_file: str, options: dict[str, str]) -> list[str]:
    """SOLVER.WARMUP_ITERS in the ratio in which ``options`` shorten the recipe; [] if they do not, or state it."""
    stated = options.get("SOLVER.MAX_ITER", "")
    if not stated.isdecimal() or "SOLVER.WARMUP_ITERS" in options:  # what is no number is refused later
        return []
    cfg = get_knet_cfg()
    merge_config(cfg, config_file)
    recipe = cfg.SOLVER
    if int(stated) >= recipe.MAX_ITER:
        return []
    return ["SOLVER.WARMUP_ITERS", str(recipe.WARMUP_ITERS * int(stated) // recipe.MAX_ITER)]


def choose_recipe(task: str, device: str | None = None) -> str:
    """The config file below configs/ for a task; ``device``: value of MODEL.DEVICE, None for the best one there is."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"finetune/{task}{'_lite0' if device == 'cpu' else ''}.yaml"


def write_config(found: Found, recipe: str, folder: str) -> str:
    """Write the config of a training run on found data sets into its folder; returns the path."""
    content = {
        "_BASE_": os.path.abspath(recipe) if os.path.isfile(recipe) else get_config_file(recipe),
        "DATASETS": {"CUSTOM": found.entries, "TRAIN": found.train, "TEST": found.test},
        "OUTPUT_DIR": folder,
    }
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "data_config.yaml")
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(content, f, sort_keys=False, allow_unicode=True)
    return path
