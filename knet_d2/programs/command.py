"""The command ``knet``: the programs under short names, and training on a folder of images with one line.

    knet train --data my_photos --task instance     find the annotations, split them, write a config, train
    knet train --config-file config.yaml ...        as train_net.py
    knet eval output/my_photos                      evaluate the best checkpoint of a training run
    knet predict output/my_photos photo.jpg --output pictures
    knet check --data my_photos                     check annotations; or --config-file config.yaml
    knet export output/my_photos model.onnx
    knet annotate output/my_photos new_photos --format labelme --output to_correct
    knet doctor                                     say what is installed and what is missing

A folder of a training run stands for its best checkpoint. The other programs of ``python -m knet_d2`` have their names
here, too. ``knet NAME --help`` lists the options of each.
"""

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import yaml

from ..config.files import get_config_file
from ..data.discovery import Found, find_annotations
from ..errors import ConfigError
from . import NAMES, check_dataset, guarded, run_program

TASKS = ("instance", "panoptic", "semantic")
_NEXT = """
The model is in {folder}. What is next:
  open {folder}/report.html in a browser
  knet predict {folder} PHOTOS --output {folder}/pictures
  knet export {folder} {folder}/model.onnx
"""
_CHECKPOINTS = ("model_best.pth", "model_final.pth")


class Recipe(NamedTuple):
    """Config files below configs/ for fine-tuning with a GPU and without one."""

    gpu: str
    cpu: str


RECIPES = {
    "instance": Recipe("finetune/instance.yaml", "finetune/instance_lite0.yaml"),
    "panoptic": Recipe("finetune/panoptic.yaml", "finetune/panoptic_lite0.yaml"),
    "semantic": Recipe("finetune/semantic.yaml", "finetune/semantic_lite0.yaml"),
}


def choose_recipe(task: str, device: str | None = None) -> str:
    """The config file below configs/ for a task; ``device``: value of MODEL.DEVICE, None for the best one there is."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return RECIPES[task].cpu if device == "cpu" else RECIPES[task].gpu


def write_config(found: Found, recipe: str, output: str) -> str:
    """Write the config of a training run on found data sets into its folder; returns the path."""
    content = {
        "_BASE_": os.path.abspath(recipe) if os.path.isfile(recipe) else get_config_file(recipe),
        "DATASETS": {"CUSTOM": found.entries, "TRAIN": found.train, "TEST": found.test},
        "OUTPUT_DIR": output,
    }
    os.makedirs(output, exist_ok=True)
    path = os.path.join(output, "data_config.yaml")
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(content, f, sort_keys=False, allow_unicode=True)
    return path


def checkpoint_of(path: str) -> str:
    """The best checkpoint of a training run's folder; any other path or name as it is.

    Raises:
        ConfigError: the folder has no checkpoint.
    """
    if not os.path.isdir(path):
        return path
    for name in _CHECKPOINTS:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise ConfigError(f"{path}: this folder has no {' or '.join(_CHECKPOINTS)}. Train first, or name a weights file.")


def _data_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"knet {name}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="folder with images and annotations, or an annotation file"
    )
    parser.add_argument("--task", choices=TASKS, help="default: what the annotations are for")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the results; default: output/NAME")
    parser.add_argument("--recipe", metavar="FILE", help="config file to start from; default: by task and device")
    return parser


def _config_of_data(args: argparse.Namespace, rest: Sequence[str]) -> str:
    """Find the data, write the config and print it; returns its path."""
    found = find_annotations(args.data, args.task)
    recipe = args.recipe or choose_recipe(found.task, dict(_pairs(rest)).get("MODEL.DEVICE"))
    name = os.path.basename(os.path.abspath(args.data))
    output = args.output or os.path.join("output", os.path.splitext(name)[0] if os.path.isfile(args.data) else name)
    path = write_config(found, recipe, output)
    print(f"Found {found.what}.\nWrote {path}:\n")
    with open(path, encoding="utf-8") as f:
        print(f.read())
    return path


def _train(arguments: Sequence[str]) -> int:
    if not _names_data(arguments):
        return run_program("train", arguments, "knet train")
    parser = _data_parser("train", "Train on a folder of images. Other options and KEY VALUE pairs: as train_net.py.")
    parser.add_argument("--no-check", action="store_true", help="do not check the data set before training")
    return _check_and_train(*parser.parse_known_args(arguments))


def _check_and_train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    config = _config_of_data(args, rest)
    if not args.no_check:
        options = [x for pair in _pairs(rest) for x in pair]
        parser = check_dataset.get_parser()
        # Not by run_program: training sets up its own log, and lines would appear twice
        if check_dataset.main(parser.parse_args(["--config-file", config, "--opts", *options])):
            print("Correct the errors above, or train without this check: --no-check.")
            return 1
    code = run_program("train", ["--config-file", config, *rest], "knet train")
    if code == 0:
        print(_NEXT.format(folder=os.path.dirname(config)))
    return code


def _pairs(rest: Sequence[str]) -> list[tuple[str, str]]:
    """The KEY VALUE pairs at the end of a command line."""
    first = next((i for i, x in enumerate(rest) if "." in x and x.split(".")[0].isupper()), len(rest))
    return list(zip(rest[first::2], rest[first + 1 :: 2]))


def _check(arguments: Sequence[str]) -> int:
    if not _names_data(arguments):
        return run_program("check_dataset", arguments, "knet check")
    parser = _data_parser("check", "Check a folder of images. Other options: as tools/check_dataset.py.")

    args, rest = parser.parse_known_args(arguments)
    config = _config_of_data(args, rest)
    return run_program("check_dataset", ["--config-file", config, "--output", os.path.dirname(config), *rest])


def _names_data(arguments: Sequence[str]) -> bool:
    return any(x == "--data" or x.startswith("--data=") for x in arguments)


def _eval(arguments: Sequence[str]) -> int:
    folder = arguments[0] if arguments else ""
    config = os.path.join(folder, "config.yaml")
    if not os.path.isfile(config):
        return run_program("train", ["--eval-only", *arguments], "knet eval")
    _refuse_weights(arguments)
    words = ["--config-file", config, "--eval-only", *arguments[1:], "MODEL.WEIGHTS", checkpoint_of(folder)]
    return run_program("train", words, "knet eval")


def _predict(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="knet predict", description="Segment images. Other options: as demo/demo.py.", allow_abbrev=False
    )
    parser.add_argument("model", help="folder of a training run, weights file, or knet:// name")
    parser.add_argument("inputs", nargs="*", help="image files, folders, or quoted patterns such as 'a/*.jpg'")
    args, rest = parser.parse_known_args(arguments)
    _refuse_weights(rest)
    place = rest.index("--opts") if "--opts" in rest else len(rest)
    options = [*rest[place + 1 :], "MODEL.WEIGHTS", checkpoint_of(args.model)]
    inputs = ["--input", *args.inputs] if args.inputs else []
    return run_program("demo", [*inputs, *rest[:place], "--opts", *options], "knet predict")


def _refuse_weights(arguments: Sequence[str]) -> None:
    if "MODEL.WEIGHTS" in arguments:
        raise ConfigError("MODEL.WEIGHTS: the model is the first argument. Name the weights file there.")


def _with_checkpoint(program: str, name: str, arguments: Sequence[str]) -> int:
    """Run a program whose first argument is a weights file."""
    words = [checkpoint_of(arguments[0]), *arguments[1:]] if arguments else []
    return run_program(program, words, f"knet {name}")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "check": _check,
    "export": functools.partial(_with_checkpoint, "export_model", "export"),
    "annotate": functools.partial(_with_checkpoint, "annotate", "annotate"),
}


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command of ``knet``, or one of the programs NAMES; returns the exit code."""
    if name in COMMANDS:
        return guarded(lambda: COMMANDS[name](arguments))
    if name not in NAMES:
        raise SystemExit(f"knet: there is no command {name!r}; use {', '.join([*COMMANDS, 'doctor'])} (knet --help).")
    return run_program(name, arguments, f"knet {name}")
