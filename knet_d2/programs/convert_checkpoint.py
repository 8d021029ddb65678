"""Write an official K-Net checkpoint (OpenMMLab), or one of a training, as a file to share: .pth or .safetensors.

MODEL.WEIGHTS takes the official files as they are; converted ones are smaller (they hold no optimiser state), have our
names, and bring their config and class names, so that knet_d2.load needs nothing else.
"""

import argparse
import os

import torch

from ..checkpoint import LoadReport, as_checkpoint, describe_model, has_description, load_file, read_description
from ..checkpoint.load_report import build_report, find_misfits, recognise
from ..checkpoint.saving import save_weights
from ..checkpoint.zoo import build_on_meta, fitting_entries, fitting_hint
from ..engine import load_config
from ..errors import CheckpointError
from ..model_zoo import get_config_file, names


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="the checkpoint, a .pth file")
    parser.add_argument("output", help="the file to write: .pth or .safetensors")
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="name in the model zoo, or a config file; default: that of the checkpoint, or the model of the zoo that "
        "it is of",
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def find_config(path: str, state_dict: dict[str, torch.Tensor]) -> str:
    """The name of the zoo's model that a checkpoint is of; schedules differ by the official names in file names.

    Raises:
        CheckpointError: no model, or several; names them.
    """
    fitting = fitting_entries(recognise(state_dict, state_dict.keys()).translation.state_dict)
    named = [x for x in fitting if x.official_name and os.path.basename(path).startswith(x.official_name + "_")]
    candidates = named or fitting
    if len(candidates) == 1:
        return candidates[0].name
    if not candidates:
        raise CheckpointError(f"{path}: of no model in the zoo. Give its config with --config FILE.")
    found = " or ".join(x.name for x in candidates)
    raise CheckpointError(f"{path}: may be of {found}. Give one of them with --config NAME.")


def convert(
    path: str, config: str | None, opts: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, str], LoadReport]:
    """Returns the parameters in our names, their description, and what became of each entry of the file."""
    checkpoint = as_checkpoint(load_file(path), path)
    state_dict = checkpoint["model"]
    if config is None and not opts and has_description(checkpoint):
        config, metadata = "the config in it", checkpoint["metadata"]
        cfg = read_description(checkpoint, path).cfg
    else:
        config = config or find_config(path, state_dict)
        cfg = load_config(get_config_file(config) if config.removesuffix(".yaml") in names() else config, opts)
        metadata = describe_model(cfg)
    model_state = build_on_meta(cfg).state_dict()
    layout = recognise(state_dict, model_state)
    report = build_report(layout, state_dict, model_state)
    reasons = find_misfits(report, layout, partial=False)
    if reasons:
        hint = fitting_hint(layout.translation.state_dict) if layout.scope == "model" else ""
        raise CheckpointError(f"{path} ({layout.name}) does not fit {config}: {'; '.join(reasons)}.{hint}")
    loaded = set(report.loaded)
    converted = {name: value for name, value in layout.translation.state_dict.items() if name in loaded}
    return converted, {**metadata, "source": os.path.basename(path)}, report


def main(args: argparse.Namespace) -> None:
    converted, metadata, report = convert(args.input, args.config, tuple(args.opts))
    save_weights(args.output, converted, metadata)
    print(report.as_text())
    print(f"Wrote {args.output}")
